"""Programs that others have written talk to the gateway: FFmpeg by WHIP, vosk's own client, curl as one of OpenAI's."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from edge_asr.audio import read_file
from edge_asr.events import Json
from edge_asr.gateway import certificates, formats
from tests.broker import PATIENCE_S, Broker, Subscriber
from tests.gateway import Box, box, recording, run, transcribed

STOP = recording("20-emergency-stop")
SPEED = recording("03-set-mixer-speed")


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, mosquitto: Broker) -> Iterator[tuple[Box, Subscriber]]:
    with Subscriber(mosquitto) as subscriber, box(tmp_path_factory.mktemp("clients"), mosquitto) as running:
        yield running, subscriber


def test_ffmpeg_calls_by_whip_and_its_command_reaches_the_broker(site: tuple[Box, Subscriber], tmp_path: Path) -> None:
    running, subscriber = site
    certificates.make(tmp_path, [])
    files = certificates.Files(tmp_path)
    command = [sys.executable, "-m", "tests.whip_by_ffmpeg", f"{running.url}/whip", running.token, str(STOP)]
    done = subprocess.run(
        [*command, str(files.server), str(files.server_key)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + running.log
    subscriber.wait_for(lambda _: subscriber.on("evt/command"), "its command")
    (said,) = subscriber.on("evt/command")
    assert (said.data["intent"], said.data["source"]) == ("EmergencyStop", "tablet")


def said_by(running: Box, client: str, *arguments: str) -> Any:
    """What a client of somebody else's, a program that trusts the box's own authority, prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", client, *arguments],
        env={**os.environ, "SSL_CERT_FILE": str(running.folder / "state/gateway/ca.crt")},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr + running.log
    return json.loads(done.stdout)


def test_vosks_own_client_works_unchanged(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    (expected,) = transcribed(STOP)
    address = running.url.replace("https://", f"wss://station:{running.token}@")
    (said,) = [each for each in said_by(running, "tests.vosk_by_itself", address, str(STOP)) if each["text"]]
    assert said["text"] == expected["text"]
    assert [word["word"] for word in said["result"]] == said["text"].split()
    assert all(0 <= word["start"] < word["end"] < len(read_file(STOP)) / 32_000 for word in said["result"])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two utterances with five seconds between the beginnings."""
    first = read_file(STOP)
    path = tmp_path_factory.mktemp("two") / "two.wav"
    pcm = first + bytes(5 * 32_000 - len(first)) + read_file(SPEED)
    soundfile.write(path, np.frombuffer(pcm, "<i2"), 16_000)
    return path


def test_openais_own_client_works_unchanged_and_raises_what_it_raises_elsewhere(site: tuple[Box, Subscriber]) -> None:
    running, _ = site
    (expected,) = transcribed(STOP)
    found = said_by(running, "tests.openai_by_itself", f"{running.url}/v1", running.token, str(STOP))
    assert {found["json"], found["verbose"]["text"], found["text"].rstrip("\n")} == {expected["text"]}
    assert [word["word"] for word in found["verbose"]["words"]] == expected["text"].split()
    assert [segment["text"] for segment in found["verbose"]["segments"]] == [expected["text"]]
    assert all(expected["text"] in found[kind] for kind in ("srt", "vtt"))
    assert found["stream"] == [
        {"type": "transcript.text.delta", "delta": expected["text"]},
        {"type": "transcript.text.done", "text": expected["text"]},
    ]
    assert [model["id"] for model in found["models"]] == ["edge-asr"]
    raised = {name: found[name]["error"] for name in ("stranger", "garbage", "unknown")}
    assert raised == {"stranger": "AuthenticationError", "garbage": "BadRequestError", "unknown": "BadRequestError"}
    assert found["unknown"]["type"] == "invalid_request_error"
    assert "'poem' is not one of json, text" in found["unknown"]["body"]["message"]


def uploaded(running: Box, path: Path, *fields: str) -> str:
    """What curl gets for a file."""
    command = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(running.folder / "state/gateway/ca.crt")]
    command += ["-H", f"Authorization: Bearer {running.token}", "-F", f"file=@{path}", "-F", "model=whisper-1"]
    for field in fields:
        command += ["-F", field]
    command.append(f"{running.url}/v1/audio/transcriptions")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_an_upload_comes_back_in_every_format_with_the_times_at_which_it_was_said(
    site: tuple[Box, Subscriber], two: Path
) -> None:
    running, _ = site
    texts = [row["text"] for row in transcribed(two)]
    assert len(texts) == 2
    grains = ("timestamp_granularities[]=word", "timestamp_granularities[]=segment")
    verbose = json.loads(uploaded(running, two, "response_format=verbose_json", *grains))
    assert [segment["text"] for segment in verbose["segments"]] == texts
    starts = [segment["start"] for segment in verbose["segments"]]
    assert 0 <= starts[0] < 1
    assert 5 <= starts[1] < 6
    assert [word["word"] for word in verbose["words"]] == " ".join(texts).split()
    assert all(one["start"] < one["end"] for one in verbose["words"])
    assert "segments" not in json.loads(uploaded(running, two, "response_format=verbose_json", grains[0]))
    assert uploaded(running, two, "response_format=text") == " ".join(texts) + "\n"
    for kind, demuxer in (("srt", "srt"), ("vtt", "webvtt")):
        cues = cues_of(uploaded(running, two, f"response_format={kind}"), demuxer)
        assert [text for text, _, _ in cues] == texts
        assert [round(start_s, 3) for _, start_s, _ in cues] == starts


def cues_of(text: str, demuxer: str) -> list[tuple[str, float, float]]:
    """Subtitles as FFmpeg reads them: text, start and end in seconds."""
    found = []
    with av.open(io.BytesIO(text.encode()), "r", format=demuxer) as container:
        for packet in container.demux():
            if packet.size and packet.pts is not None and packet.duration is not None and packet.time_base:
                start = packet.pts * packet.time_base
                found.append((bytes(packet).decode(), float(start), float(start + packet.duration * packet.time_base)))
    return found


WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
EVENTS = st.lists(
    st.builds(
        lambda words, offset_s, duration_s, confidence: {
            "text": " ".join(words),
            "language": "en",
            "confidence": confidence,
            "offset_s": offset_s,
            "duration_s": duration_s,
            "tokens": [{"text": f" {word}", "start_s": at * 0.1} for at, word in enumerate(words)],
        },
        st.lists(WORDS, min_size=1, max_size=4),
        st.integers(0, 500_000_000).map(lambda ms: ms / 1000),
        st.floats(0.2, 30),
        st.floats(0, 1),
    ),
    max_size=4,
    unique_by=lambda event: event["offset_s"],
)


@given(EVENTS)
def test_whatever_was_said_ffmpeg_reads_the_same_cues_from_either_kind_of_subtitles(
    events: list[dict[str, Json]],
) -> None:
    events.sort(key=lambda event: float(str(event["offset_s"])))
    read = {}
    for kind, demuxer in (("srt", "srt"), ("vtt", "webvtt")):
        text, _ = formats.written(kind, events, 1.0, frozenset())
        read[kind] = cues_of(text, demuxer) if events else []
    assert read["srt"] == read["vtt"]
    assert [text for text, _, _ in read["srt"]] == [event["text"] for event in events]
    for (_, start_s, _), event in zip(read["srt"], events, strict=True):
        assert start_s == pytest.approx(event["offset_s"], abs=0.001)


def test_a_client_of_vosk_sees_partials_and_after_a_reset_what_was_left_and_is_heard_from_the_beginning(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site
    grain = bytes(4)
    """So little that it says nothing; every message is answered, by whatever is known then."""

    async def talk() -> tuple[str, dict[str, Any], dict[str, Any]]:
        async with (
            running.http() as http,
            http.ws_connect(f"{running.url}/vosk", headers={"Authorization": f"Bearer {running.token}"}) as socket,
        ):

            async def ask(message: bytes | str) -> dict[str, Any]:
                send: Any = socket.send_bytes if isinstance(message, bytes) else socket.send_str
                await send(message)
                answer: dict[str, Any] = json.loads(await socket.receive_str(timeout=PATIENCE_S))
                return answer

            pcm, deadline = read_file(STOP), asyncio.get_running_loop().time() + PATIENCE_S
            answer = await ask(pcm[: len(pcm) // 2])
            while not answer["partial"] and asyncio.get_running_loop().time() < deadline:
                answer = await ask(grain)
            await ask(pcm[len(pcm) // 2 :])
            left = await ask('{"reset" : 1}')
            await ask(read_file(SPEED))
            return answer["partial"], left, await ask('{"eof" : 1}')

    partial, left, last = run(talk)
    assert partial
    assert [left["text"], last["text"]] == [row["text"] for row in transcribed(STOP, SPEED)]
    assert 0 <= last["result"][0]["start"] < len(read_file(SPEED)) / 32_000


def test_what_holds_no_words_has_no_key_for_them_as_vosks_own_client_expects_it(
    site: tuple[Box, Subscriber],
) -> None:
    running, _ = site

    async def say_nothing() -> list[dict[str, Any]]:
        async with (
            running.http() as http,
            http.ws_connect(f"{running.url}/vosk", headers={"Authorization": f"Bearer {running.token}"}) as socket,
        ):
            await socket.send_str('{ "config" : { "sample_rate" : 16000.000000 } }')
            await socket.send_bytes(bytes(4000))
            answers = [json.loads(await socket.receive_str())]
            await socket.send_str('{"eof" : 1}')
            return [*answers, json.loads(await socket.receive_str())]

    assert run(say_nothing) == [{"partial": ""}, {"text": ""}]


def test_a_station_is_told_when_the_broker_goes_away_and_when_it_is_back(
    site: tuple[Box, Subscriber], mosquitto: Broker
) -> None:
    running, _ = site

    async def watch() -> list[str]:
        async with running.client() as client:
            await client.until("status")
            await asyncio.to_thread(mosquitto.kill)
            await client.until("status")
            await asyncio.to_thread(mosquitto.start)
            await client.until("status")
            return [event["broker"] for event in client.of("status")]

    assert run(watch) == ["connected", "offline", "connected"]


def test_a_sentence_that_its_client_has_not_ended_is_no_command(site: tuple[Box, Subscriber]) -> None:
    running, subscriber = site
    token = running.tokens.add("hasty", "talk")

    async def talk() -> None:
        async with running.client(token=token) as client:
            await client.until("ready")
            await client.say(read_file(STOP)[: 48 * 1024])  # the word is out, no pause yet

    run(talk)
    subscriber.wait_for(lambda _: any(each.data["source"] == "hasty" for each in subscriber.on("evt/rejected")), "no")
    (said,) = [each for each in subscriber.on("evt/rejected") if each.data["source"] == "hasty"]
    assert said.data["reason"] == "cut-off"

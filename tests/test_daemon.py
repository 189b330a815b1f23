"""The daemon as administrators and subscribers know it: a process, its settings file, a real broker, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import soundfile
import yaml

from edge_asr import daemon, model_store, prepared
from edge_asr.audio import from_float, quiet, read_file, to_float
from edge_asr.daemon import Daemon
from edge_asr.events import SAMPLE_RATE, Draft
from edge_asr.outbox import Outbox, read_statistics
from edge_asr.settings import Settings, StdinSource
from edge_asr.sources import Stdin
from tests.broker import HOST, PATIENCE_S, Broker, Received, Subscriber, free_port, wait_until
from tests.soundcard import sound_card
from tests.test_sparkplug import Host

RECORDINGS = model_store.bundled("recordings")
COMMAND = RECORDINGS / "20-emergency-stop.flac"
SILENCE = quiet(SAMPLE_RATE)

OPTIMIZING_PATIENCE_S = 240.0
"""Ten seconds of CPU time that everybody else goes before."""


def labels() -> list[dict[str, Any]]:
    """The manifest of the bundled recordings."""
    lines = (RECORDINGS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_settings(folder: Path, port: int, **more: Any) -> Path:
    tree: dict[str, Any] = {
        "device": "press-07",
        "site": {"enterprise": "acme"},
        "state_dir": str(folder / "state"),
        "mqtt": {"host": HOST, "port": port, "max_retry_s": 1},
        "sources": [{"type": "stdin"}],
        "commands": {"grammars": ["factory.en"]},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**tree, **more}), encoding="utf-8")
    return path


class Box:
    """A running `edge-asr run`, spoken to through standard input."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def say(self, recording: Path) -> None:
        """Speak a recording and fall silent, so that the gate closes."""
        self.feed(read_file(recording) + SILENCE)

    def feed(self, pcm: bytes) -> None:
        """Let it hear this."""
        assert self.process.stdin
        self.process.stdin.write(pcm)
        self.process.stdin.flush()

    def hang_up(self) -> int:
        """End the input; the daemon ends with it."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(PATIENCE_S)

    def wait_for_log(self, words: str) -> None:
        wait_until(lambda: words in self.log or self.process.poll() is not None, f"{words!r} in the log")
        assert words in self.log


@contextlib.contextmanager
def running(
    settings: Path, *, program: Sequence[str] = ("-m", "edge_asr.cli"), prefix: Sequence[str] = (), **environment: str
) -> Iterator[Box]:
    """``prefix``: what starts it by exec, elsewhere."""
    log = settings.parent / f"log-{time.monotonic_ns()}"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*prefix, sys.executable, *program, "run", "--settings", str(settings)],
            stdin=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **environment},
        )
    try:
        yield Box(process, log)
    finally:
        process.kill()
        process.wait()
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


SOON_OVER = ("-c", "from edge_asr import alarms, cli; alarms.QUIET_S = 1.0; cli.main()")
"""A daemon whose alarms are over a second after their trouble, instead of ten."""


def sequence(messages: list[Received]) -> list[int]:
    """Sequence numbers in the order of their first arrival."""
    return list(dict.fromkeys(m.data["seq"] for m in messages if "seq" in m.data))


def test_a_provider_that_is_not_there_is_an_alarm_and_the_one_in_use_is_told(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        with running(write_settings(tmp_path, broker.port, model={"provider": "cuda"})) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command from the CPU")
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/alarm") for x in m), "an alarm")
            subscriber.wait_for(lambda m: any(x.topic.endswith("/health") for x in m), "its health")
        (alarm,) = subscriber.on("evt/alarm")
        meta, health = subscriber.on("meta")[-1].data, subscriber.on("health")[-1].data
    told = (alarm.data["kind"], alarm.data["state"], alarm.data["detail"])
    assert told == ("provider-fallback", "raised", "the model runs on cpu instead of cuda")
    assert (meta["provider"], meta["provider_wanted"], health["provider"]) == ("cpu", "cuda", "cpu")


def test_spoken_commands_arrive_at_a_subscriber_as_the_labels_say(tmp_path: Path) -> None:
    spoken = labels()
    files = [str(RECORDINGS / label["audio"]) for label in spoken]
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        source = {"type": "files", "paths": files, "realtime": False}
        with running(write_settings(tmp_path, broker.port, sources=[source])) as box:
            assert box.process.wait(60) == 0, box.log
        subscriber.wait_for(lambda m: m[-1].topic.endswith("status") and m[-1].data["state"] == "offline", "farewell")
        commands = [(m.data["intent"], m.data["slots"]) for m in subscriber.on("evt/command")]
        pending = [(m.data["intent"], m.data["slots"]) for m in subscriber.on("evt/pending")]
    expected = []
    held: tuple[str, dict[str, Any]] | None = None
    for label in spoken:
        command = (label["intent"], label["slots"])
        if command[0] in {"StartMachine", "SetPoint"}:
            held = command
        elif command[0] == "Confirm" and held:
            expected.append(held)
            held = None
        elif label["text"]:  # a cancel, another command or talk: the held one is cancelled
            expected += [command] if command[0] and not (held and command[0] == "Cancel") else []
            held = None
    assert [c[0] for c in pending] == ["StartMachine", "SetPoint", "StartMachine"]
    assert commands == expected


def test_everything_committed_before_a_sigkill_arrives_later_and_in_order(tmp_path: Path) -> None:
    port_file = write_settings(tmp_path, free_port())  # nobody listens there
    outbox = tmp_path / "state" / "outbox.db"
    with running(port_file) as box:
        for _ in range(2):
            box.say(COMMAND)
        wait_until(lambda: outbox.exists() and read_statistics(outbox).last_seq >= 4, "two utterances are committed")
        box.process.kill()
        box.process.wait()
    committed = read_statistics(outbox).last_seq
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        with running(write_settings(tmp_path, broker.port)):
            subscriber.wait_for(lambda m: committed in sequence(m), "the last one")
        assert sequence(subscriber.messages) == list(range(1, committed + 1))
        assert all(m.data["replayed"] for m in subscriber.messages if "seq" in m.data)


def test_a_broker_restarted_under_load_costs_neither_message_nor_order(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        with running(write_settings(tmp_path, broker.port)) as box:
            for restart in (True, True, False):
                before = len(sequence(subscriber.messages))
                box.say(COMMAND)
                subscriber.wait_for(lambda m, n=before: len(sequence(m)) > n, "the next message")  # type: ignore[misc]
                if restart:
                    broker.restart()
            assert box.hang_up() == 0
        committed = read_statistics(tmp_path / "state" / "outbox.db").last_seq
        subscriber.wait_for(lambda m: committed in sequence(m), "the last one")
        assert sequence(subscriber.messages) == list(range(1, committed + 1))
        ids = {(m.data["seq"], m.data["id"]) for m in subscriber.messages if "seq" in m.data}
        assert len(ids) == committed


def captures(box: Box, times: int) -> bool:
    return box.log.count("capturing from") >= times


def test_a_microphone_pulled_out_and_put_back_is_heard_again(tmp_path: Path) -> None:
    wav = tmp_path / "command.wav"
    samples, rate = soundfile.read(COMMAND)
    soundfile.write(wav, samples, rate)
    with sound_card() as card, Broker(tmp_path) as broker, Subscriber(broker, "#") as subscriber:
        settings = write_settings(tmp_path, broker.port, sources=[{"type": "microphone"}])
        with running(settings, **card.environment) as box:
            for time_spoken in (1, 2):
                wait_until(functools.partial(captures, box, time_spoken), "the microphone is open")
                card.play(wav)
                subscriber.wait_for(
                    lambda m, n=time_spoken: sum(x.topic.endswith("evt/transcript") for x in m) >= n,  # type: ignore[misc]
                    f"transcript {time_spoken}; {box.log}",
                )
                card.unplug()
                wait_until(lambda: not card.recording(), "the microphone is let go")
                card.plug()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def zygote_of(box: Box) -> int:
    """Process id of what forks the others."""
    (found,) = children(box.process.pid)
    return found


def recognizer_of(box: Box) -> int:
    """Process id of the worker."""
    named = {Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip(): pid for pid in children(zygote_of(box))}
    return named["recognizer"]


def capture_of(box: Box) -> int:
    """Process id of what listens to the microphone."""
    (found,) = (
        each for each in children(zygote_of(box)) if Path(f"/proc/{each}/comm").read_text().startswith("capture-")
    )
    return found


def test_a_sound_driver_that_crashes_in_mid_sentence_costs_a_moment_of_it_and_nothing_else(tmp_path: Path) -> None:
    wav, command = tmp_path / "talk.wav", tmp_path / "command.wav"
    samples, rate = soundfile.read(RECORDINGS / "05-set-oven-temperature.flac")
    soundfile.write(wav, np.tile(samples, 2), rate)
    soundfile.write(command, *soundfile.read(COMMAND))
    with sound_card() as card, Broker(tmp_path) as broker, Subscriber(broker, "#") as subscriber:
        settings = write_settings(tmp_path, broker.port, sources=[{"type": "microphone"}])
        with running(settings, **card.environment) as box:
            wait_until(functools.partial(captures, box, 1), "the microphone is open")
            player = threading.Thread(target=card.play, args=[wav])
            player.start()
            subscriber.wait_for(lambda m: any(x.topic.endswith("live/partial") for x in m), "somebody speaks")
            os.kill(capture_of(box), signal.SIGSEGV)
            crashed = time.monotonic()
            wait_until(functools.partial(captures, box, 2), "the microphone is open again")
            assert time.monotonic() - crashed < 2
            both = "what was said before the crash, and what was said after it"
            subscriber.wait_for(lambda m: sum(x.topic.endswith("evt/transcript") for x in m) >= 2, both)
            player.join()
            card.play(command)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command after it")
            assert box.process.poll() is None
    assert "microphone: capture ended by SIGSEGV; a new process takes its place" in box.log
    assert "listening to" in box.log.partition("SIGSEGV")[0]
    assert "listening to" not in box.log.partition("SIGSEGV")[2]


def test_a_microphone_pulled_out_is_an_alarm_with_its_remedy(tmp_path: Path) -> None:
    with sound_card() as card, Broker(tmp_path) as broker, Subscriber(broker, "#") as subscriber:
        settings = write_settings(tmp_path, broker.port, sources=[{"type": "microphone"}])
        with running(settings, **card.environment) as box:
            wait_until(functools.partial(captures, box, 1), "the microphone is open")
            card.unplug()
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/alarm") for x in m), "an alarm")
            subscriber.wait_for(lambda m: any(x.data.get("state") == "degraded" for x in m), "a degraded device")
    (alarm,) = subscriber.on("evt/alarm")
    assert (alarm.data["kind"], alarm.data["source"], alarm.data["state"]) == (
        "microphone-gone",
        "microphone",
        "raised",
    )
    assert "plug it in" in alarm.data["remedy"]


def test_a_broker_that_refuses_everything_is_an_alarm_until_it_takes_messages_again(tmp_path: Path) -> None:
    rules, outbox = tmp_path / "rules", tmp_path / "state" / "outbox.db"
    rules.write_text("topic read #\n", encoding="ascii")
    rules.chmod(0o600)

    def alarms(messages: list[Received]) -> list[tuple[str, str]]:
        return [(m.data["kind"], m.data["state"]) for m in messages if m.topic.endswith("evt/alarm")]

    with (
        Broker(tmp_path, extra=f"acl_file {rules}") as broker,
        Subscriber(broker) as subscriber,
        running(write_settings(tmp_path, broker.port), program=SOON_OVER) as box,
    ):
        box.say(COMMAND)
        wait_until(lambda: outbox.exists() and read_statistics(outbox).refusal, "the outbox knows")
        box.wait_for_log("alarm broker-refused raised")
        rules.write_text("topic readwrite #\n", encoding="ascii")
        broker.reload()
        subscriber.wait_for(lambda m: ("broker-refused", "over") in alarms(m), "the end of it", 2 * PATIENCE_S)
        assert ("broker-refused", "raised") in alarms(subscriber.messages)
        wait_until(lambda: not read_statistics(outbox).refusal, "the outbox knows")
        assert read_statistics(outbox).dead_letters == 0


def test_what_the_outbox_gave_up_is_told_in_the_log_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with contextlib.closing(Outbox(tmp_path / "state" / "outbox.db", 2**20)) as outbox:
        asyncio.run(outbox.append(Draft("evt/transcript", "transcript", {})))
    limits = {"limits": {"transcript": {"days": 1e-9}}}
    with running(write_settings(tmp_path, free_port(), outbox=limits)) as box:
        box.wait_for_log("alarm outbox-outdated raised: waiting longer than the settings allow")
        assert "deleted were 1 transcript; restore the broker or raise outbox.limits" in box.log


def test_a_damaged_outbox_is_an_alarm_with_its_remedy(tmp_path: Path) -> None:
    outbox = tmp_path / "state" / "outbox.db"
    outbox.parent.mkdir()
    with contextlib.closing(Outbox(outbox, 2**20)) as opened:
        asyncio.run(opened.append(Draft("evt/transcript", "transcript", {})))
    with outbox.open("r+b") as file:
        file.write(bytes(4096))
    with running(write_settings(tmp_path, free_port())) as box:
        box.wait_for_log(
            f"alarm outbox-damaged raised: {outbox} was damaged; what was readable is kept; check the disk"
        )


def test_a_broker_that_forbids_the_devices_own_meta_is_told_in_the_log_the_metrics_and_the_status_line(
    tmp_path: Path,
) -> None:
    """Nothing gets out there: mosquitto 2.0.11 hangs up over the refused state, though it has taken the status."""
    rules, own, port = tmp_path / "rules", "acme/voice/press-07", free_port()
    rules.write_text(f"topic write {own}/evt/#\ntopic write {own}/status\n", encoding="ascii")
    rules.chmod(0o600)
    with (
        Broker(tmp_path, extra=f"acl_file {rules}") as broker,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(tmp_path / "notify"))

        def told_by_status() -> bool:
            with contextlib.suppress(BlockingIOError):
                while "hangs up over the device's own state" not in manager.recv(4096, socket.MSG_DONTWAIT).decode():
                    pass
                return True
            return False

        def told_by_metrics() -> bool:
            with contextlib.suppress(OSError), urlopen(f"http://{HOST}:{port}/metrics", timeout=PATIENCE_S) as page:
                return b"edge_asr_broker_refuses 1.0" in page.read()
            return False

        settings = write_settings(tmp_path, broker.port, monitoring={"port": port})
        with running(settings, NOTIFY_SOCKET=str(tmp_path / "notify")) as box:
            wait_until(told_by_status, "the status line says so", 3 * PATIENCE_S)
            box.wait_for_log("alarm broker-refused raised")
            wait_until(told_by_metrics, "the metrics say so")


def test_where_it_is_too_noisy_no_command_passes_until_it_is_quieter(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    hum = from_float(rng.normal(0, 10 ** (-45 / 20), 12 * SAMPLE_RATE))

    def in_noise(recording: Path) -> bytes:
        spoken = to_float(read_file(recording))
        return from_float(spoken + to_float(hum)[: spoken.size]) + hum[: 2 * SAMPLE_RATE]

    with (
        Broker(tmp_path) as broker,
        Subscriber(broker) as subscriber,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        commands = {"grammars": ["factory.en"], "max_noise_dbfs": -50}
        settings = write_settings(tmp_path, broker.port, commands=commands)
        with running(settings, program=SOON_OVER, NOTIFY_SOCKET=str(tmp_path / "notify")) as box:
            box.feed(hum)
            subscriber.wait_for(lambda m: any(x.data.get("kind") == "too-noisy" for x in m), "the alarm")
            while b"commands are blocked" not in manager.recv(4096):
                pass
            box.feed(in_noise(COMMAND))
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/rejected") for x in m), "a rejection")
            (rejected,) = subscriber.on("evt/rejected")
            assert rejected.data["reason"] == "too-noisy"
            assert "commands are blocked; use a close-talking microphone" in rejected.data["detail"]
            box.feed(in_noise(RECORDINGS / "05b-cancel.flac"))  # what takes back is never blocked
            subscriber.wait_for(lambda m: any(x.data.get("intent") == "Cancel" for x in m), "the way back")
            box.feed(quiet(12 * SAMPLE_RATE))
            subscriber.wait_for(
                lambda m: any(x.data.get("kind") == "too-noisy" and x.data["state"] == "over" for x in m), "over"
            )
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.data.get("intent") == "EmergencyStop" for x in m), "a command")


def test_a_card_that_clips_and_one_whose_middle_is_off_are_alarms_with_remedies_until_they_are_mended(
    tmp_path: Path,
) -> None:
    whole = np.concatenate([to_float(read_file(file)) for file in sorted(RECORDINGS.glob("*.flac"))])
    voices = whole[: 12 * SAMPLE_RATE]
    loudest = np.abs(voices).max()
    harms = {
        "microphone-clipping": (np.clip(voices * 20 / loudest, -1, 1), "lower its gain"),
        "microphone-offset": (voices / loudest / 2 + 0.25, "try another"),
    }
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:

        def shown() -> list[str]:
            healths = [m.data["microphones"]["stdin"] for m in subscriber.on("health")]
            return list(healths[-1].get("troubles", [])) if healths else []

        def told(kind: str, state: str) -> list[Received]:
            return [m for m in subscriber.on("evt/alarm") if (m.data["kind"], m.data["state"]) == (kind, state)]

        with running(write_settings(tmp_path, broker.port), program=SOON_OVER) as box:
            for kind, (harmed, remedy) in harms.items():
                box.feed(from_float(harmed))
                subscriber.wait_for(lambda _, k=kind: bool(told(k, "raised")), kind)  # type: ignore[misc]
                (alarm,) = told(kind, "raised")
                assert (alarm.data["source"], alarm.data["severity"]) == ("stdin", "warning")
                assert remedy in alarm.data["remedy"]
                subscriber.wait_for(lambda _, k=kind: k in shown(), f"{kind} in health")  # type: ignore[misc]
            box.feed(from_float(voices))
            subscriber.wait_for(lambda _: all(told(kind, "over") for kind in harms), "the end of both", 2 * PATIENCE_S)
            subscriber.wait_for(lambda _: shown() == [], "health without them")


def stopped_once(is_reached: Callable[[Daemon], bool], options: Settings, look_s: float) -> Daemon:
    """A box that listened, and made itself a graph, until that was so; it is looked at every ``look_s``."""

    async def scenario() -> Daemon:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as silence, os.fdopen(writing, "wb"):
            box = Daemon(options)
            running = asyncio.create_task(box.run([Stdin(StdinSource(type="stdin"), silence)]))
            deadline = time.monotonic() + OPTIMIZING_PATIENCE_S
            while not is_reached(box):
                assert not running.done()
                assert time.monotonic() < deadline
                await asyncio.sleep(look_s)
            await box.stop()
            await running
            return box

    return asyncio.run(scenario())


def test_a_fresh_box_makes_a_faster_graph_while_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "OPTIMIZE_AFTER_S", 0.0)
    options = Settings.model_validate({"state_dir": str(tmp_path), "commands": {"grammars": []}})

    def is_done(box: Daemon) -> bool:
        found = prepared.record_of(box.model, options.models_directory)
        return found is not None and (found.variant == "own" or box.worker.facts.graph == found)  # own: none is faster

    stopped_once(is_done, options, look_s=0.1)


def test_a_box_that_is_stopped_while_a_graph_is_made_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "OPTIMIZE_AFTER_S", 0.0)
    options = Settings.model_validate({"state_dir": str(tmp_path), "commands": {"grammars": []}})
    making = options.models_directory / prepared.FOLDER
    box = stopped_once(lambda _: making.exists(), options, look_s=0.01)
    assert prepared.record_of(box.model, options.models_directory) is None


def test_sigterm_commits_what_is_being_said_and_says_goodbye(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        with running(write_settings(tmp_path, broker.port)) as box:
            assert box.process.stdin
            box.process.stdin.write(read_file(COMMAND)[: -SAMPLE_RATE // 2 * 2])  # no silence: the gate stays open
            box.process.stdin.flush()
            subscriber.wait_for(
                lambda m: any(x.topic.endswith("live/partial") for x in m), "somebody is heard speaking"
            )
            box.process.send_signal(signal.SIGTERM)
            assert box.process.wait(PATIENCE_S) == 0
        subscriber.wait_for(lambda m: m[-1].data.get("state") == "offline", "farewell")
    assert read_statistics(tmp_path / "state" / "outbox.db").last_seq >= 1


def test_input_that_ends_while_a_question_is_open_ends_the_daemon(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        with running(write_settings(tmp_path, broker.port)) as box:
            box.say(RECORDINGS / "01-start-line-three.flac")
            assert box.process.stdin
            box.process.stdin.write(read_file(RECORDINGS / "01b-confirm.flac"))  # its end is the input's end
            assert box.hang_up() == 0
        subscriber.wait_for(lambda m: any(x.data.get("confirmed") for x in m), "the confirmed command")


def test_sighup_takes_over_new_grammars_and_refuses_broken_ones(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        settings = write_settings(tmp_path, broker.port, commands={"grammars": ["coffee.en"]})
        with running(settings) as box:
            box.wait_for_log("listening to")
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/rejected") for x in m), "no coffee")
            settings.write_text("commands: [", encoding="utf-8")
            box.process.send_signal(signal.SIGHUP)
            box.wait_for_log("reload refused, nothing has changed")
            write_settings(tmp_path, broker.port, device="another-name")
            box.process.send_signal(signal.SIGHUP)
            box.wait_for_log("a restart is needed for: device")
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "now a command")
            assert box.hang_up() == 0


def test_words_and_grammars_that_are_edited_broken_or_deleted_change_nothing_until_a_reload_that_is_sound(
    tmp_path: Path,
) -> None:
    words, commanded, port = tmp_path / "words.txt", tmp_path / "site.yaml", free_port()
    words.write_text("RCCB\n", encoding="utf-8")
    commanded.write_bytes((model_store.bundled("grammars") / "factory.en.yaml").read_bytes())
    vocabulary = {"commands": {"grammars": [str(commanded)]}, "hotwords": {"file": str(words)}}
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        settings = write_settings(tmp_path, broker.port, monitoring={"port": port}, **vocabulary)

        def metas() -> list[Any]:
            return [
                (m.data["hotwords_sha256"], m.data["grammars"]) for m in subscriber.on("meta") if m.data.get("broker")
            ]

        with running(settings) as box:
            subscriber.wait_for(lambda _: len(metas()) > 0, "what it is made of")
            words.write_text("RCCB : many\n", encoding="utf-8")
            commanded.unlink()
            with urlopen(f"http://{HOST}:{port}/metrics") as answer:
                assert answer.status == 200
            box.process.send_signal(signal.SIGHUP)
            box.wait_for_log("reload refused, nothing has changed")
            os.kill(recognizer_of(box), signal.SIGKILL)
            broker.restart()
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "the command")
            assert metas()[-1] == metas()[0]
            assert box.hang_up() == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mqtt": {"port": 99_999}}, "mqtt.port: 99999 is not 1..65535"),
        ({"model": {"name": "no-such-model"}}, "no-such-model"),
        ({"commands": {"grammars": ["no-such-grammar"]}}, "commands.grammars: 'no-such-grammar'"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_78(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    path = write_settings(tmp_path, free_port(), **settings)
    with running(path) as box:
        assert box.process.wait(PATIENCE_S) == 78
        assert words in box.log
        assert len(box.log.splitlines()) == 1


def test_two_daemons_on_one_outbox_are_told_apart(tmp_path: Path) -> None:
    path = write_settings(tmp_path, free_port())
    with running(path) as first:
        first.wait_for_log("listening to")
        with running(path) as second:
            assert second.process.wait(PATIENCE_S) == 74
            assert "outbox.db" in second.log


def test_the_mirrors_speak_when_they_are_switched_on_and_the_broker_in_use_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    folder.mkdir()
    with Broker(folder) as broker, Host(broker) as host, Subscriber(broker, "acme/#") as subscriber:
        brokers = [{"host": HOST, "port": free_port()}, {"host": HOST, "port": broker.port}]
        mirrors = {"sparkplug": {"enabled": True}, "home_assistant": {"enabled": True}}
        settings = write_settings(tmp_path, 0, mqtt={"brokers": brokers, "max_retry_s": 1}, **mirrors)
        with running(settings) as box:
            birth = asyncio.run(host.next("NBIRTH"))
            assert birth.topic == "spBv1.0/acme-voice/NBIRTH/press-07"
            assert "micro-en" in birth.value("Properties/Model")
            box.say(COMMAND)
            subscriber.wait_for(lambda got: any(m.topic.endswith("evt/command") for m in got), "the command")
            data = asyncio.run(host.next("DDATA"))
            while data.payload.metrics[0].name != "Command/intent":
                data = asyncio.run(host.next("DDATA"))
            assert data.value("Command/intent") == "EmergencyStop"
            in_use = f"{HOST}:{broker.port}"
            assert subscriber.on("/meta")[-1].data["broker"] == in_use
            subscriber.wait_for(lambda _: [m for m in subscriber.on("/health") if m.data["broker"] == in_use], "health")
            health = subscriber.on("/health")[-1].data
            assert min(health["memory_bytes"], health["recognizer_memory_bytes"]) > 20_000_000  # both have Python
            assert health["recognizer_cpu_load"] >= 0
            assert read_statistics(tmp_path / "state" / "outbox.db").broker == in_use
            with Subscriber(broker, "homeassistant/#", client_id="assistant") as assistant:
                assistant.wait_for(lambda got: len(got) == 1, "the discovery")
                (config,) = assistant.messages
            assert config.topic == "homeassistant/device/acme-voice-press-07/config"
            assert config.retained
            assert box.hang_up() == 0

"""Doubtful utterances are kept sealed, few and not for long, and come back to whoever has the key: openssl's keys."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from playwright.sync_api import sync_playwright

from edge_asr import clock, evaluation, file_retention, recorder
from edge_asr.audio import read_file
from edge_asr.daemon import kept_files, open_recorder
from edge_asr.events import Command, Rejection, RejectionReason, Transcript, Utterance
from edge_asr.labelling import LabelServer
from edge_asr.pipeline import Understanding
from edge_asr.recorder import Recorder, RecorderError, is_doubtful, opened
from edge_asr.settings import Recorder as Options
from edge_asr.settings import SettingsError
from edge_asr.settings import load as read_settings
from tests.broker import PATIENCE_S, Broker, Subscriber, free_port
from tests.gateway import CHROMIUM
from tests.sysbox import CHECKOUT
from tests.test_cli import typed
from tests.test_daemon import COMMAND, RECORDINGS, running, write_settings

TALK = RECORDINGS / "04-talk-about-the-game.flac"
TRANSCRIPT = Transcript("stop it", "en", "EMO_UNKNOWN", "Speech", 0.9, ())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(private, public) as docs/privacy.md says."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "recorder.pem", folder / "recorder.pub"
    for command in (f"genpkey -algorithm X25519 -out {private}", f"pkey -in {private} -pubout -out {public}"):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return private, public


NUMBERS = itertools.count()


def heard(decision: Command | Rejection | None, pcm: bytes = bytes(3200)) -> Understanding:
    return Understanding(Utterance(f"utterance-{next(NUMBERS):06d}", "m", 0, pcm, 0), TRANSCRIPT, decision)


def command(confidence: float) -> Command:
    return Command("Stop", {"machine": "press"}, confidence, "normal", 10.0)


@pytest.mark.parametrize(
    ("decision", "doubtful"),
    [
        (command(0.79), True),
        (command(0.81), False),
        (Rejection("not-understood", ""), True),
        (Rejection("too-noisy", ""), True),
        (Rejection("not-confirmed", ""), False),
        (Rejection("cut-off", ""), False),
        (Rejection("recognizer-failed", ""), False),
    ],
)
def test_what_a_person_should_hear_is_kept(decision: Command | Rejection | None, *, doubtful: bool) -> None:
    assert is_doubtful(heard(decision), 0.8) is doubtful


@pytest.mark.parametrize(
    ("transcript", "doubtful"),
    [
        (replace(TRANSCRIPT, confidence=0.79), True),
        (replace(TRANSCRIPT, confidence=0.81), False),
        (replace(TRANSCRIPT, confidence=0.0), False),  # sherpa-onnx tells none
        (None, False),
    ],
)
def test_without_a_grammar_what_was_heard_is_judged(transcript: Transcript | None, *, doubtful: bool) -> None:
    assert is_doubtful(replace(heard(None), transcript=transcript), 0.8) is doubtful


def kept(folder: Path, public: Path, *understandings: Understanding, **options: float) -> Recorder:
    made = Recorder(Options(public_key=public, **options), folder)  # type: ignore[arg-type]
    for understanding in understandings:
        made.offer(understanding)
    made.close()
    return made


def test_what_was_kept_opens_with_the_private_key_and_is_what_was_said(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    pcm = read_file(TALK)
    kept(tmp_path / "r", public, heard(Rejection("not-understood", "", 0.2, ("Stop",)), pcm), heard(command(0.3)))
    first, second = opened(tmp_path / "r", private)
    samples, rate = soundfile.read(io.BytesIO(first.wav), dtype="int16")
    assert (samples.tobytes(), rate) == (pcm, 16_000)
    assert (first.about["reason"], first.about["candidates"], first.about["text"]) == (
        "not-understood",
        ["Stop"],
        "stop it",
    )
    assert (second.about["intent"], second.about["slots"]) == ("Stop", {"machine": "press"})


def test_nothing_on_the_disk_tells_what_was_said(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    pcm = read_file(TALK)
    kept(tmp_path / "r", keys[1], heard(Rejection("not-understood", ""), pcm))
    (file,) = (tmp_path / "r").iterdir()
    content = file.read_bytes()
    assert all(secret not in content for secret in (b"stop it", b"RIFF", b"not-understood", pcm[8000:8032]))
    assert (tmp_path / "r").stat().st_mode & 0o077 == 0


def test_another_key_or_a_damaged_file_opens_nothing(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    kept(tmp_path / "r", public, heard(command(0.1)))
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", *f"genpkey -algorithm X25519 -out {other}".split()], check=True)
    with pytest.raises(RecorderError, match="does not open with"):
        list(opened(tmp_path / "r", other))
    (file,) = (tmp_path / "r").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecorderError, match="does not open with"):
        list(opened(tmp_path / "r", private))
    with pytest.raises(RecorderError, match="cannot be used"):
        list(opened(tmp_path / "r", public))


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_key_that_is_none_stops_the_start_with_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match=r"recorder\.public_key: .* cannot be used"):
        Recorder(Options(public_key=tmp_path / "key"), tmp_path)


def test_the_oldest_go_when_the_quota_is_reached(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    utterances = [heard(command(0.1), bytes(300_000)) for _ in range(6)]
    kept(tmp_path / "r", keys[1], *utterances, max_bytes=1_000_000)
    assert sorted(path.stem for path in (tmp_path / "r").iterdir()) == [u.utterance.id for u in utterances[-3:]]


def test_what_is_too_old_goes_where_nothing_is_recorded_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = read_settings(write_settings(tmp_path, free_port()))
    assert open_recorder(options) is None
    recording = options.recordings_directory / f"a{file_retention.SEALED}"
    recording.parent.mkdir(parents=True)
    recording.write_bytes(b"x")
    now_ns = clock.boottime_ns()
    for days, there in ((0, True), (29, True), (31, False)):
        monkeypatch.setattr(clock, "boottime_ns", lambda days=days: now_ns + days * 86_400 * clock.NS_PER_S)
        for kept in kept_files(options):
            kept.drop_outdated()
        assert recording.exists() is there


def test_a_disk_that_takes_nothing_is_counted_and_said_once(
    tmp_path: Path, keys: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r").write_text("a file where the folder should be", encoding="ascii")
    made = kept(tmp_path / "r", keys[1], *(heard(command(0.1)) for _ in range(3)))
    assert (made.kept, made.failed) == (0, 3)
    assert caplog.text.count("recordings cannot be kept") == 1


REASONS: list[RejectionReason] = ["not-understood", "ambiguous"]


def exported(folder: Path, keys: tuple[Path, Path]) -> Path:
    pcm = [read_file(TALK), read_file(COMMAND)]
    kept(
        folder / "r",
        keys[1],
        *(heard(Rejection(reason, ""), audio) for reason, audio in zip(REASONS, pcm, strict=True)),
    )
    assert recorder.export(folder / "r", keys[0], folder / "labels") == 2
    return folder / "labels"


def test_an_exported_folder_is_a_manifest_for_eval(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    items = evaluation.read_manifest(exported(tmp_path, keys) / "manifest.jsonl")
    assert [read_file(item.audio) for item in items] == [read_file(TALK), read_file(COMMAND)]


def test_a_person_labels_in_a_browser_and_the_manifest_has_it(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    labels = exported(tmp_path, keys)
    with LabelServer(labels) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(server.address)
        row = page.locator("li").nth(1)
        row.get_by_label("text").fill("emergency stop")
        row.get_by_label("intent").fill("EmergencyStop")
        row.get_by_label("slots").fill("{oops")
        row.get_by_role("button").click()
        page.get_by_text("the slots are no JSON").wait_for()
        row.get_by_label("slots").fill("{}")
        row.get_by_role("button").click()
        page.get_by_text("saved").wait_for()
        assert page.locator("li.labelled").count() == 1
        duration = page.evaluate(
            "() => new Promise(done => {const a = document.querySelector('audio'); "
            "a.onloadedmetadata = () => done(a.duration); a.preload = 'metadata'; a.load()})"
        )
        browser.close()
        server.shutdown()
    assert duration == pytest.approx(len(read_file(TALK)) / 32_000, abs=0.05)
    first, second = evaluation.read_manifest(labels / "manifest.jsonl")
    assert (first.intent, second.text, second.intent) == (None, "emergency stop", "EmergencyStop")


def label(server: LabelServer, audio: str, text: str) -> None:
    body = json.dumps({"audio": audio, "text": text, "intent": "", "slots": {}}).encode()
    url = f"http://127.0.0.1:{server.server_port}/{server.secret}/label"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
        assert answer.status == 200


def test_what_was_labelled_can_be_learned_from_and_the_rest_is_passed_over(
    tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "tools")
    monkeypatch.setitem(sys.modules, "wordfreq", SimpleNamespace(top_n_list=None))  # the training environment has it
    people = importlib.import_module("training.people")
    labels = exported(tmp_path, keys)
    with LabelServer(labels) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        noise, spoken = server.entries
        label(server, noise, "")
        assert people.utterances(labels / "manifest.jsonl") == []
        label(server, spoken, "Emergency stop!")
        server.shutdown()
    (said,) = people.utterances(labels / "manifest.jsonl")
    assert (said.text, len(said.audio)) == ("emergency stop", len(read_file(COMMAND)) // 2)


@pytest.mark.parametrize(
    ("path", "host", "method", "body", "kind", "status"),
    [
        ("/manifest", None, "GET", None, "", 404),
        ("/SECRET/manifest", None, "GET", None, "", 200),
        ("/SECRET/manifest", "evil.example", "GET", None, "", 404),
        ("/SECRET/audio/../manifest.jsonl", None, "GET", None, "", 404),
        ("/SECRET/audio//etc/passwd", None, "GET", None, "", 404),
        ("/SECRET/label", None, "POST", b"{}", "text/plain", 404),
        ("/SECRET/label", None, "POST", b"{}", "application/json", 400),
        ("/SECRET/label", None, "POST", b"x" * 70_000, "application/json", 413),
    ],
)
def test_the_page_serves_nothing_else_and_nobody_else(
    tmp_path: Path,
    keys: tuple[Path, Path],
    path: str,
    host: str | None,
    method: str,
    body: bytes | None,
    kind: str,
    status: int,
) -> None:
    with LabelServer(exported(tmp_path, keys)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}{path.replace('SECRET', server.secret)}"
        headers = {"Content-Type": kind} | ({"Host": host} if host else {})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, body, headers, method=method), timeout=10) as answer:
                found = answer.status
        except urllib.error.HTTPError as error:
            found = error.code
            error.close()
        server.shutdown()
    assert found == status


def test_a_daemon_keeps_what_it_rejects_and_the_verbs_show_and_delete_it(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port, recorder={"public_key": str(public), "below": 0.0})
        with running(path) as box:
            box.say(COMMAND)
            box.say(TALK)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/rejected") for x in m), "a rejection")
            assert box.hang_up() == 0
    (rejected,) = subscriber.on("evt/rejected")
    settings = ("--settings", str(path))
    assert ": 1 recordings, " in typed("recordings", "status", *settings).stdout
    done = typed("recordings", "export", str(tmp_path / "out"), "--key", str(private), *settings)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["heard"]["utterance_id"] == rejected.data["utterance_id"]
    assert typed("recordings", "clear", *settings).stdout == "1 recordings deleted\n"
    assert typed("recordings", "export", str(tmp_path / "o"), "--key", str(public), *settings).returncode == 66


def test_by_default_no_audio_reaches_the_disk(tmp_path: Path) -> None:
    with running(write_settings(tmp_path, free_port())) as box:
        box.say(TALK)
        box.wait_for_log("rejected: not-understood")
        assert box.hang_up() == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file()}
    assert not [name for name in sizes if re.search("wav|flac|sealed|pcm", name)], sizes

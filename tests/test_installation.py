"""Models on a box: imported, tried, activated, rolled back, removed; real archives, keys, processes and a daemon."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_asr import installation, model_store, settings, trial, worker
from edge_asr.engine import Vocabulary, prepare_engine
from edge_asr.installation import TRIALS, Store
from edge_asr.model_store import EMBEDDED, ModelError, bundled, bundled_manifests, sha256_of
from edge_asr.settings import Settings
from edge_asr.worker import Worker
from tests.broker import PATIENCE_S, Broker, Subscriber, free_port, wait_until
from tests.mirror import mirror
from tests.test_cli import typed
from tests.test_daemon import COMMAND, running, write_settings
from tests.test_monitoring import get

EMBEDDED_FOLDER = bundled("models") / EMBEDDED
MODEL, VERSION = next((m.model_file, m.version) for m in bundled_manifests() if m.name == EMBEDDED)


def copy(folder: Path, name: str, **more: Any) -> Path:
    """The embedded model under another name, with its manifest changed."""
    target = Path(shutil.copytree(EMBEDDED_FOLDER, folder / name))
    tree = json.loads((target / "manifest.json").read_bytes())
    (target / "manifest.json").write_text(json.dumps({**tree, "name": name, **more}), encoding="utf-8")
    return target


def golden_text(folder: Path, text: str) -> dict[str, Any]:
    """Manifest entries of a model that brings its own golden recording."""
    audio = bundled("recordings") / "golden.flac"
    files = json.loads((EMBEDDED_FOLDER / "manifest.json").read_bytes())["files"]
    shutil.copy(audio, folder / "golden.flac")
    files["golden.flac"] = {"sha256": sha256_of(audio), "size": audio.stat().st_size}
    return {"files": files, "golden": {"audio": "golden.flac", "text": text}}


def model(folder: Path, name: str, text: str = "start conveyor three") -> Path:
    """A model of its own name that should hear ``text`` in its golden recording."""
    made = copy(folder, name)
    tree = {**json.loads((made / "manifest.json").read_bytes()), **golden_text(made, text)}
    (made / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state" / "models")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_imported_whole_and_without_what_its_manifest_does_not_list(store: Store, tmp_path: Path) -> None:
    given = copy(tmp_path, "stick")
    (given / "notes.txt").write_text("mine", encoding="utf-8")
    assert store.add(given).name == "stick"
    assert [manifest.name for manifest in store.manifests()] == ["stick"]
    files = model_store.locate("stick", store.folder)
    assert files.model == store.folder / "stick" / MODEL
    assert not (store.folder / "stick/notes.txt").exists()
    assert (store.folder / "stick/LICENSE").exists()


@pytest.mark.parametrize("ending", ["tar.bz2", "zip"])
def test_a_download_without_a_manifest_gets_one_that_pins_it(store: Store, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"my voice.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name in (MODEL, "tokens.txt"):
                packed.write(EMBEDDED_FOLDER / name, f"inner/{name}")
    else:
        with tarfile.open(path, "w:bz2", compresslevel=1) as tar:
            for name in (MODEL, "tokens.txt"):
                tar.add(EMBEDDED_FOLDER / name, f"inner/{name}")
            wav = tarfile.TarInfo("inner/test_wavs/en.wav")
            tar.addfile(wav, io.BytesIO())
    assert store.add(path).name == "my-voice"
    tokens = store.folder / "my-voice/tokens.txt"
    tokens.write_bytes(tokens.read_bytes().replace(b"a", b"b", 1))
    assert "SHA-256 is" in refusal(lambda: model_store.locate("my-voice", store.folder))


def test_what_is_not_sound_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    given = copy(tmp_path, "spoilt")
    (given / MODEL).write_bytes((given / MODEL).read_bytes()[:-1])
    message = refusal(lambda: store.add(given))
    assert message.startswith(f"{given / MODEL}: truncated")
    garbage = tmp_path / "garbage.zip"
    garbage.write_bytes(b"PK\x03\x04garbage")
    assert str(garbage) in refusal(lambda: store.add(garbage))
    assert [entry.name for entry in store.folder.iterdir()] == [".import.lock"]


@pytest.mark.parametrize("name", ["../../evil", "/evil", ".hidden", ""])
def test_a_manifest_cannot_choose_a_place_outside_of_the_store(store: Store, tmp_path: Path, name: str) -> None:
    given = copy(tmp_path, "given")
    tree = json.loads((given / "manifest.json").read_bytes())
    (given / "manifest.json").write_text(json.dumps({**tree, "name": name}), encoding="utf-8")
    assert "manifest.json: name: " in refusal(lambda: store.add(given))


def test_no_import_takes_the_name_of_a_model_that_is_there(store: Store, tmp_path: Path) -> None:
    store.add(copy(tmp_path, "twice"))
    assert "`edge-asr models remove twice` first" in refusal(lambda: store.add(tmp_path / "twice"))
    assert "is installed already" in refusal(lambda: store.add(EMBEDDED_FOLDER))


def test_an_import_that_was_killed_is_cleared_away_by_the_next(store: Store, tmp_path: Path) -> None:
    (store.folder / ".staging-killed").mkdir(parents=True)
    (store.folder / ".staging-killed" / MODEL).write_bytes(b"half")
    store.add(copy(tmp_path, "next"))
    assert {entry.name for entry in store.folder.iterdir()} == {".lock", ".import.lock", "next"}


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """An Ed25519 key pair made by openssl, as docs/models.md says."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    for command in (
        f"genpkey -algorithm ed25519 -out {private}",
        f"pkey -in {private} -pubout -out {public}",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return private, public


def sign(folder: Path, private: Path) -> None:
    command = f"pkeyutl -sign -rawin -inkey {private} -in {folder}/manifest.json -out {folder}/manifest.json.sig"
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True)


def test_a_site_with_a_key_takes_only_what_openssl_signed_with_it(store: Store, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "site")
    other, _ = keys(tmp_path, "other")
    given = copy(tmp_path, "signed")
    assert "has no manifest.json.sig" in refusal(lambda: store.add(given, public))
    sign(given, other)
    assert f"is not by {public}" in refusal(lambda: store.add(given, public))
    sign(given, private)
    store.add(given, public)
    installation.check_signature(store.folder / "signed", public)
    with (store.folder / "signed/manifest.json").open("a", encoding="utf-8") as manifest:
        manifest.write(" ")
    assert "is not by" in refusal(lambda: installation.check_signature(store.folder / "signed", public))
    assert "is not an Ed25519 key" in refusal(lambda: store.add(given, rsa(tmp_path)))
    assert "no public key in PEM" in refusal(lambda: store.add(given, private.with_name("site.pem")))


def test_a_model_whose_signature_no_longer_holds_is_not_heard_with(tmp_path: Path) -> None:
    private, public = keys(tmp_path, "site")
    options = settings.load(None, {"state_dir": str(tmp_path / "state"), "model.signed_by": str(public)})
    store = Store(options.models_directory)
    given = copy(tmp_path, "signed")
    sign(given, private)
    store.add(given, public)
    store.activate("signed")
    words = Vocabulary.read(options)
    assert prepare_engine(options, words).name == "signed"
    (store.folder / "signed/manifest.json.sig").unlink()
    assert "has no manifest.json.sig" in refusal(lambda: prepare_engine(options, words))
    store.activate(EMBEDDED)  # ships with the program, whose package vouches for it
    assert prepare_engine(options, words).name == EMBEDDED


def test_a_link_in_a_folder_is_not_followed(store: Store, tmp_path: Path) -> None:
    given = copy(tmp_path, "stick")
    (tmp_path / "secret").write_text("of root", encoding="ascii")
    (given / "README").symlink_to(tmp_path / "secret")
    assert "README: is a link or a device" in refusal(lambda: store.add(given))
    assert not list(store.folder.glob("[!.]*/"))


def rsa(folder: Path) -> Path:
    subprocess.run(["openssl", *f"genrsa -out {folder}/rsa.pem 2048".split()], check=True, capture_output=True)
    command = f"rsa -in {folder}/rsa.pem -pubout -out {folder}/rsa.pub"
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    return folder / "rsa.pub"


def test_activation_is_remembered_and_rolled_back_both_ways(store: Store, tmp_path: Path) -> None:
    assert (store.active, store.proven) == (EMBEDDED, True)
    assert "no other model was active" in refusal(store.roll_back)
    for name in ("one", "two"):
        store.add(copy(tmp_path, name))
        store.activate(name)
    assert (Store(store.folder).active, store.proven) == ("two", False)
    assert store.roll_back() == store.active == "one"
    assert store.roll_back() == store.active == "two"
    assert "is in use" in refusal(lambda: store.remove("two"))
    store.remove("one")
    assert store.roll_back() == EMBEDDED
    assert "is not an imported model" in refusal(lambda: store.remove("one"))


def test_a_damaged_choice_is_one_line_with_the_remedy(store: Store) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "active.json").write_text('{"active": 7', encoding="utf-8")
    assert "is damaged; delete it" in refusal(lambda: store.active)


def options_for(store: Store, **more: Any) -> Settings:
    return Settings(state_dir=store.folder.parent, commands=settings.Commands(grammars=()), **more)


def begun(store: Store) -> tuple[str, str]:
    """Name of the model that a recognizer comes to work with, and which one had to make way for it."""
    with contextlib.closing(Worker(options_for(store))) as works:
        return works.name, works.trouble


def test_a_model_that_cannot_be_loaded_makes_way_for_the_one_before_it(store: Store, tmp_path: Path) -> None:
    store.add(copy(tmp_path, "good"))
    store.activate("good")
    assert (*begun(store), store.proven) == ("good", "", True)
    store.add(copy(tmp_path, "bad"))
    store.activate("bad")
    (store.folder / "bad/tokens.txt").write_bytes(b"")
    name, trouble = begun(store)
    assert name == store.active == "good"
    assert trouble.startswith("bad is not used, good is again: ")


def test_a_model_with_which_the_daemon_dies_makes_way_after_three_starts(store: Store, tmp_path: Path) -> None:
    store.add(copy(tmp_path, "deadly"))
    store.activate("deadly")
    for _ in range(TRIALS):
        assert store.begin() is None  # and the process ended before it could say that all is well
    name, trouble = begun(store)
    assert name == store.active == EMBEDDED
    assert "the daemon ended 3 times with it" in trouble


def test_a_disk_that_takes_its_time_over_the_books_is_no_hang_of_the_new_model(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 1.0)
    store.add(copy(tmp_path, "good"))
    store.activate("good")
    # As somebody whose own writing is slow. A process of its own: what we fork holds every lock that we have.
    hold = ["flock", "--no-fork", str(store.folder / ".lock"), "sh", "-c", "echo held; exec sleep 600"]
    with ThreadPoolExecutor() as others, subprocess.Popen(hold, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        begins = others.submit(begun, store)
        began_s = time.monotonic()
        wait_until(lambda: time.monotonic() > began_s + 2.5, "longer than a recognizer may sleep")
        other.kill()
    assert begins.result() == ("good", "")
    assert store.proven
    assert "the recognizer" not in caplog.text


def test_a_start_does_not_wait_for_an_import_that_unpacks_and_nothing_is_taken_from_under_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon waited for the lock, was called hung, and gave up after four starts."""
    for name in ("old", "fresh"):
        store.add(copy(tmp_path, name))
    store.activate("fresh")
    unpacks, go_on = threading.Event(), threading.Event()
    check = installation.check_signature

    def wait(folder: Path, signed_by: Path | None) -> None:
        unpacks.set()
        assert go_on.wait(PATIENCE_S)
        check(folder, signed_by)

    monkeypatch.setattr(installation, "check_signature", wait)
    large = copy(tmp_path, "large")
    with ThreadPoolExecutor() as others:
        imported = others.submit(store.add, large)
        assert unpacks.wait(PATIENCE_S)
        try:
            assert others.submit(store.begin).result(PATIENCE_S) is None
            others.submit(store.remove, "old").result(PATIENCE_S)
        finally:
            go_on.set()
        assert imported.result().name == "large"
    assert {manifest.name for manifest in store.manifests()} == {"fresh", "large"}
    assert {entry.name for entry in store.folder.iterdir() if entry.is_dir()} == {"fresh", "large"}


def test_a_model_that_hears_something_else_is_not_activated(tmp_path: Path) -> None:
    state = tmp_path / "state"
    Store(state / "models").add(model(tmp_path, "deaf", "good night"))
    done = typed("models", "activate", "deaf", "--set", f"state_dir={state}")
    assert done.returncode == 78
    assert "hears 'start conveyor three' where 'good night' is said" in done.stderr
    assert Store(state / "models").active == EMBEDDED


def test_a_model_whose_language_model_is_of_another_vocabulary_is_not_activated(tmp_path: Path) -> None:
    given, state = copy(tmp_path, "mixed"), tmp_path / "state"
    with np.load(given / "language_model.npz") as arrays:
        np.savez_compressed(given / "language_model.npz", **{**arrays, "vocabulary": np.array(25_055)})
    tree = json.loads((given / "manifest.json").read_bytes())
    changed = given / "language_model.npz"
    tree["files"][changed.name] = {"sha256": sha256_of(changed), "size": changed.stat().st_size}
    (given / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    Store(state / "models").add(given)
    done = typed("models", "activate", "mixed", "--set", f"state_dir={state}")
    assert done.returncode == 78
    assert "language_model.npz: is damaged, or made for another model: 25055 tokens, expected 526" in done.stderr
    assert Store(state / "models").active == EMBEDDED


def killing(folder: Path) -> Path:
    """A model over which sherpa-onnx ends the process: Python reads an Arabic 6 as 6, C reads it as 0 and divides."""
    given = copy(folder, "killing")
    loaded = onnx.load(given / MODEL)
    (entry,) = (entry for entry in loaded.metadata_props if entry.key == "lfr_window_shift")
    entry.value = "\u0666"
    onnx.save(loaded, given / MODEL)
    tree = json.loads((given / "manifest.json").read_bytes())
    tree["files"][MODEL] = {"sha256": sha256_of(given / MODEL), "size": (given / MODEL).stat().st_size}
    (given / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    return given


def test_a_model_that_ends_the_process_ends_only_its_trial(store: Store, tmp_path: Path) -> None:
    store.add(killing(tmp_path))
    options = settings.Model(engine="sherpa-onnx")
    message = refusal(lambda: trial.run("killing", store.folder, options))
    assert message.startswith("killing: ends the process that loads it (")


def test_one_word_may_be_misheard_in_the_bundled_recording_and_none_in_a_models_own() -> None:
    assert trial.hears_right("Start conveyor tree.", "start conveyor three", exactly=False)
    assert not trial.hears_right("start a conveyor tree", "start conveyor three", exactly=False)
    assert not trial.hears_right("", "start conveyor three", exactly=False)
    assert trial.hears_right("Start, conveyor three!", "start conveyor three", exactly=True)
    assert not trial.hears_right("start conveyor tree", "start conveyor three", exactly=True)


@contextlib.contextmanager
def on_a_terminal(*arguments: str) -> Iterator[Callable[[str], None]]:
    """Type something on a pseudo-terminal; yields what waits until a pattern has been shown there. It must succeed."""
    leader, follower = os.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "no_proxy": "*"}
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_asr.cli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=variables,
    )
    os.close(follower)
    shown = ""

    def wait_for(pattern: str) -> None:
        nonlocal shown
        while not re.search(pattern, shown):
            assert select.select([leader], [], [], 30)[0], f"{pattern} is not shown: {shown!r}"
            shown += os.read(leader, 65_536).decode(errors="replace")

    try:
        yield wait_for
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_pull_shows_how_far_it_is_and_imports_what_it_has_checked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    given = copy(tmp_path, "remote")
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        tar.add(given, "remote")
    content = buffer.getvalue()
    state = ("--set", f"state_dir={tmp_path}/state")
    with mirror(**{"remote_tar.gz": content}) as served:
        served.half_is_seen = threading.Event()
        total_mb, half_mb = f"{len(content) / 1e6:.1f}", f"{len(content) / 2e6:.1f}"
        pull = ("pull", "remote.tar.gz", "--mirror", served.url, "--sha256", hashlib.sha256(content).hexdigest())
        with on_a_terminal("models", *pull, *state) as wait_for:
            wait_for(rf"remote\.tar\.gz .*━+.*{half_mb}/{total_mb} MB")
            served.half_is_seen.set()
            wait_for(rf"━{{40}}.*{total_mb}/{total_mb} MB")
            wait_for(rf"remote {re.escape(VERSION)}: imported")
        served.half_is_seen = None
        wrong = typed("models", *pull[:-1], "0" * 64, *state, no_proxy="*")
        assert (wrong.returncode, len(wrong.stderr.strip().splitlines()[-1:])) == (69, 1)
    listed = {
        row["name"]: row for row in map(json.loads, typed("models", "list", "--json", *state).stdout.splitlines())
    }
    assert (listed["remote"]["place"], listed[EMBEDDED]["in_use"]) == ("imported", True)
    assert sum(row["place"] == "to pull" for row in listed.values()) == 2
    assert not list((tmp_path / "state/models/.downloads").iterdir())


def test_what_is_imported_by_hand_is_listed_and_removed_by_hand(tmp_path: Path) -> None:
    state = ("--set", f"state_dir={tmp_path}/state")
    given = copy(tmp_path, "stick")
    assert typed("models", "import", str(given), *state).stdout.startswith(f"stick {VERSION}: imported; ")
    assert "imported" in typed("models", "list", *state).stdout
    assert typed("models", "remove", "stick", *state).stdout == "stick: removed\n"
    assert typed("models", "remove", "stick", *state).returncode == 78


def test_a_release_that_nobody_knows_is_wrong_usage() -> None:
    done = typed("models", "pull", "2031-01-01")
    assert done.returncode == 2
    assert "none of the public releases (2024-07-17, 2025-09-09)" in done.stderr


def test_verify_without_a_name_looks_at_every_model_and_names_the_spoilt_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store = Store(state / "models")
    store.add(copy(tmp_path, "spoilt"))
    tokens = store.folder / "spoilt/tokens.txt"
    tokens.write_bytes(tokens.read_bytes() + b"x")
    done = typed("models", "verify", "--set", f"state_dir={state}")
    assert done.returncode == 78
    assert {line.partition(":")[0].split()[0] for line in done.stdout.splitlines()} == {
        manifest.name for manifest in bundled_manifests()
    }
    assert len(done.stderr.splitlines()) == 1
    assert str(tokens) in done.stderr


def test_a_running_daemon_changes_models_without_losing_an_utterance(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port)
        store = Store(tmp_path / "state" / "models")
        with running(path) as box:
            box.wait_for_log("listening to")
            for name, spoken in ((EMBEDDED, 1), ("newer", 3), (EMBEDDED, 5)):
                if name != EMBEDDED:
                    store.add(model(tmp_path, name))
                    done = typed("models", "activate", name, "--settings", str(path))
                    assert "it hears 'start conveyor three'" in done.stdout, done.stderr
                elif spoken > 1:
                    assert typed("models", "rollback", "--settings", str(path)).returncode == 0
                if spoken > 1:
                    box.say(COMMAND)  # is heard while the models change
                    box.process.send_signal(signal.SIGHUP)
                    box.wait_for_log(f"reloaded, listening with {name}")
                box.say(COMMAND)
                subscriber.wait_for(
                    lambda m, n=spoken: sum(x.topic.endswith("evt/command") for x in m) >= n,  # type: ignore[misc]
                    f"command {spoken}: {box.log}",
                )
                assert subscriber.on("evt/transcript")[-1].data["model"] == name
        assert store.active == EMBEDDED
        assert subscriber.on("meta")[-1].data["model"].startswith(EMBEDDED)


def test_a_model_over_which_every_recognizer_dies_makes_way_and_the_box_goes_on(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        path = write_settings(tmp_path, broker.port, model={"engine": "sherpa-onnx"})
        store = Store(tmp_path / "state" / "models")
        store.add(killing(tmp_path))
        store.activate("killing")  # as if its trial had gone well
        with running(path) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
        (alarm,) = subscriber.on("evt/alarm")
    assert alarm.data["kind"] == "model-rolled-back"
    assert alarm.data["detail"].startswith(f"killing is not used, {EMBEDDED} is again: ")
    assert store.active == EMBEDDED


def test_a_model_spoilt_after_its_activation_raises_an_alarm_and_the_daemon_goes_on(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker, Subscriber(broker) as subscriber:
        port = free_port()
        path = write_settings(tmp_path, broker.port, monitoring={"port": port})
        store = Store(tmp_path / "state" / "models")
        store.add(copy(tmp_path, "fragile"))
        store.activate("fragile")
        (store.folder / "fragile" / MODEL).unlink()
        with running(path) as box:
            box.say(COMMAND)
            subscriber.wait_for(lambda m: any(x.topic.endswith("evt/command") for x in m), "a command")
            assert "\nedge_asr_model_rollbacks_total 1.0\n" in get(port, "/metrics")[1]
        (alarm,) = subscriber.on("evt/alarm")
    assert alarm.data["kind"] == "model-rolled-back"
    assert alarm.data["detail"].startswith(f"fragile is not used, {EMBEDDED} is again: ")
    assert alarm.data["remedy"].startswith("import another release")
    assert "alarm model-rolled-back raised: {detail}; {remedy}\n".format_map(alarm.data) in box.log


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_what_root_imports_belongs_to_the_services_user(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, 12345)
    store = Store(state / "models")
    store.add(copy(tmp_path, "mine"))
    store.activate("mine")
    owners = {entry.stat().st_uid for entry in (store.folder, *store.folder.rglob("*"))}
    assert owners == {12345}

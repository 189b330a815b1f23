"""The command line as people type it: help, output, one-line errors, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
import soxr
from click.testing import CliRunner

from edge_asr import bench, cli, command_line, doctor, model_store, settings
from tests.broker import HOST, Broker, free_port, wait_until
from tests.soundcard import sound_card

RECORDINGS = model_store.bundled("recordings")


def edge_asr(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_asr.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )


def typed(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which spares the imports."""
    done = CliRunner(env=variables).invoke(cli.main, arguments, prog_name="edge-asr")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def verbs(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from verbs(command, *path, name)
        else:
            yield (*path, name), command


ALL_VERBS = list(verbs(cli.main))


@pytest.mark.parametrize("path", [path for path, _ in ALL_VERBS], ids=" ".join)
def test_every_verb_explains_itself_with_an_example(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli.main, [*path, "--help"], prog_name="edge-asr")
    assert done.exit_code == 0
    assert f"edge-asr {' '.join(path)}" in done.output.partition("Example:")[2]


def test_the_house_plan_has_all_its_verbs() -> None:
    wanted = ["run", "demo", "transcribe", "listen", "devices", "check", "grammar", "models", "outbox", "eval", "bench"]
    assert set(wanted) <= set(cli.main.list_commands(click.Context(cli.main)))


def test_the_service_does_not_carry_the_memory_of_other_verbs() -> None:
    program = "import sys, edge_asr.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert {"rich", "cryptography", "sounddevice", "aiohttp", "numpy.ma"}.isdisjoint(loaded)
    assert "edge_asr.daemon" in loaded


@pytest.mark.parametrize("name", command_line.CODES)
def test_every_exit_code_is_of_an_error_that_there_is(name: str) -> None:
    room, _, error = name.rpartition(".")
    assert issubclass(getattr(importlib.import_module(room), error), Exception)


def test_bench_shows_what_each_stage_costs_hotwords_and_grammar_included() -> None:
    changed = settings.Settings.model_validate({"hotwords": {"phrases": ["RCCB"]}})
    stages = {stage["name"]: stage["cpu_ms_per_audio_s"] for stage in bench.run(changed, rounds=1)["stages"]}
    whole = stages.pop("everything, as the daemon")
    assert set(stages) >= {"speech detector", "recognizer, onnxruntime", "language model, hotwords", "command grammar"}
    assert all(0 < cost < whole for cost in stages.values())


def test_transcribe_prints_one_json_object_per_utterance() -> None:
    labels = [json.loads(x) for x in (RECORDINGS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    done = edge_asr("transcribe", *(str(RECORDINGS / label["audio"]) for label in labels), "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    said = {"text", "language", "emotion", "event", "confidence", "tokens"}
    assert all(set(row) == said | {"file", "start", "end", "command", "rejected"} for row in rows)
    heard = {Path(row["file"]).name: row["command"]["intent"] for row in rows if row["command"]}
    assert heard == {label["audio"]: label["intent"] for label in labels if label["intent"]}


def test_transcribe_names_each_bad_file_and_goes_on_with_the_good(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no audio", encoding="ascii")
    rng = np.random.default_rng(1)
    soundfile.write(tmp_path / "cut.flac", rng.normal(0, 0.1, 48_000), 48_000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    bad = [str(tmp_path / name) for name in ("empty.wav", "text.wav", "cut.flac", "missing.wav")]
    done = edge_asr("transcribe", *bad, str(RECORDINGS / "golden.flac"), "--json")
    assert done.returncode == 66
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad)
    assert all(name in line for name, line in zip(bad, lines, strict=True))
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("subtype", "rate", "channels"), [("PCM_U8", 16_000, 1), ("PCM_24", 96_000, 2), ("FLOAT", 44_100, 6)]
)
def test_transcribe_hears_the_same_in_any_format(tmp_path: Path, subtype: str, rate: int, channels: int) -> None:

    samples, own_rate = soundfile.read(RECORDINGS / "golden.flac", dtype="float32")
    other = soxr.resample(samples, own_rate, rate)
    soundfile.write(tmp_path / "other.wav", np.repeat(other[:, None], channels, axis=1), rate, subtype=subtype)
    texts = [
        json.loads(edge_asr("transcribe", str(file), "--json").stdout.splitlines()[0])["text"]
        for file in (RECORDINGS / "golden.flac", tmp_path / "other.wav")
    ]
    assert texts[0] == texts[1]


def test_both_engines_hear_the_same() -> None:
    plain = ("--set", "model.language_model=false")  # sherpa-onnx keeps the posteriors that it weighs to itself
    texts = [
        [json.loads(line)["text"] for line in done.stdout.splitlines()]
        for engine in ("onnxruntime", "sherpa-onnx")
        if (
            done := edge_asr("transcribe", str(RECORDINGS), "--json", *plain, "--set", f"model.engine={engine}")
        ).returncode
        == 0
    ]
    assert len(texts) == 2
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("device: [a\nb: c", "line 2"),
        ("mqtt: {hots: x}", "mqtt.hots: unknown key; did you mean `host`?"),
        ("vad: {threshold: much}", "vad.threshold: 'much'"),
        ("- a", "expected `key: value` lines"),
    ],
)
def test_bad_settings_are_one_line_with_the_place_and_exit_code_78(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "s.yaml").write_text(content, encoding="utf-8")
    done = edge_asr("check", "--settings", str(tmp_path / "s.yaml"))
    assert done.returncode == 78
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("device", "--set device: expected KEY=VALUE"),
        ("device=2026-99-99", "--set device: '2026-99-99' is not a YAML value"),
        ("mqtt.port=99999", "--set: mqtt.port: 99999 is not 1..65535"),
    ],
)
def test_a_bad_change_of_a_setting_is_one_line_and_exit_code_78(change: str, complaint: str) -> None:
    done = edge_asr("check", "--set", change)
    assert (done.returncode, done.stderr) == (78, f"edge-asr: {complaint}\n")


@pytest.mark.parametrize("failing", ["settings.yaml", "model/tokens.txt"])
def test_a_disk_that_fails_under_a_file_is_one_line_and_exit_code_74_which_systemd_tries_again(
    tmp_path: Path, failing: str
) -> None:
    folder = tmp_path.resolve()
    shutil.copytree(model_store.bundled("models") / model_store.EMBEDDED, folder / "model")
    path = folder / "settings.yaml"
    path.write_text(f"state_dir: {folder}\nmodel: {{name: {folder}/model}}\nlog: {{level: error}}\n", encoding="utf-8")
    broken = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(folder / failing), "-e", "inject=read:error=EIO"]
    run = [sys.executable, "-m", "edge_asr.cli", "run", "--settings", str(path)]
    done = subprocess.run([*broken, *run], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    (line,) = done.stderr.splitlines()
    assert str((folder / failing).parent) in line
    assert "Input/output error" in line
    assert done.returncode == 74


def test_listen_to_a_broker_that_is_not_there_is_one_line_and_exit_code_69() -> None:
    done = edge_asr("listen", "--set", f"mqtt.host={HOST}", "--set", f"mqtt.port={free_port()}")
    assert done.returncode == 69
    assert done.stderr.startswith("edge-asr: 127.0.0.1:")
    assert len(done.stderr.splitlines()) == 1


def test_no_microphone_is_one_line_and_exit_code_69(tmp_path: Path) -> None:
    done = edge_asr("devices", PULSE_SERVER=f"unix:{tmp_path}/nothing")
    assert done.returncode == 69
    assert "no microphone found" in done.stderr


def test_the_doctor_examines_everything_and_says_what_to_do(tmp_path: Path) -> None:
    with Broker(tmp_path) as broker:
        settings = tmp_path / "s.yaml"
        settings.write_text(
            f"mqtt: {{host: {HOST}, port: {broker.port}}}\nsources: [{{type: stdin}}]\nstate_dir: {tmp_path}/state",
            encoding="utf-8",
        )
        done = edge_asr("check", "--settings", str(settings), "--json")
    findings = {row["subject"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0
    assert {"model", "grammars", "broker", "clock", "state directory"} <= set(findings)
    assert findings["model"]["state"] == findings["broker"]["state"] == "ok"
    failed = edge_asr("check", "--set", "model.name=nowhere", "--set", "sources=[{type: stdin}]")
    assert failed.returncode == 1
    assert "FAILED   model: nowhere" in failed.stdout


def test_the_doctor_names_a_command_that_can_never_be_sure_enough() -> None:
    site = ("--set", "sources=[{type: stdin}]", "--set", "commands.grammars=[factory.en]")
    for wanted, said in ((0.5, "ok       grammars: factory.en"), (0.7, "warning  grammars: too short")):
        [line] = [
            line
            for line in edge_asr("check", *site, "--set", f"commands.min_confidence={wanted}").stdout.splitlines()
            if "grammars" in line
        ]
        assert line.startswith(said)
        assert ("'confirm'" in line) == (wanted == 0.7)


def test_the_doctor_records_a_spoken_sentence_and_says_what_was_understood(tmp_path: Path) -> None:
    samples, rate = soundfile.read(RECORDINGS / "20-emergency-stop.flac")
    soundfile.write(tmp_path / "stop.wav", np.concatenate([samples, np.zeros(rate)]), rate)
    with sound_card() as card:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_asr.cli", "check", "--say", "--json", "--set", f"state_dir={tmp_path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **card.environment},
        )
        with process:
            assert process.stdout
            assert process.stderr
            assert "Please say a command now" in process.stderr.readline()
            wait_until(card.recording, "the doctor listens")
            card.play(tmp_path / "stop.wav")
            findings = {row["subject"]: row for row in map(json.loads, process.stdout)}
    assert findings["spoken test of microphone"]["state"] == "ok", findings
    assert "understood EmergencyStop" in findings["spoken test of microphone"]["found"]
    assert findings["source microphone"]["remedy"].startswith("unmute it")  # it had heard digital silence before


def test_the_meter_of_a_device_shows_its_level() -> None:
    with sound_card() as card:
        shown = edge_asr("devices", "--meter", "pulse", "--seconds", "0.3", **card.environment)
        listed = edge_asr("devices", "--levels", "--json", **card.environment)
    assert "-120.0 dBFS" in shown.stdout, shown.stderr
    assert any(row["level"]["level_dbfs"] == -120.0 for row in map(json.loads, listed.stdout.splitlines()))


def test_the_doctor_sees_secrets_that_others_can_read_and_files_that_are_not_there(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    for mode, state in ((0o644, "warning"), (0o600, "ok"), (None, "failed")):
        secret.unlink(missing_ok=True)
        if mode is not None:
            secret.write_text("x", encoding="ascii")
            secret.chmod(mode)
        options = settings.Settings(sources=(), mqtt=settings.Mqtt(password_file=secret))
        found = {finding.subject: finding for finding in doctor.examine(options)}
        assert found["files"].state == state
        assert str(secret) in found["files"].found or state == "ok"


def test_the_shell_completes_verbs_and_options() -> None:
    script = edge_asr(_EDGE_ASR_COMPLETE="bash_source").stdout
    assert "complete -o" in script
    done = subprocess.run(
        [sys.executable, "-c", "from edge_asr.cli import main; main(prog_name='edge-asr')"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "_EDGE_ASR_COMPLETE": "bash_complete", "COMP_WORDS": "edge-asr tr", "COMP_CWORD": "1"},
    )
    assert "transcribe" in done.stdout


def test_grammars_can_be_listed_tested_sampled_and_asked() -> None:
    assert "factory.en" in edge_asr("grammar", "list").stdout
    assert edge_asr("grammar", "test", "factory.en", "factory.zh", "coffee.en").returncode == 0
    samples = edge_asr("grammar", "say", "factory.en", "--count", "5").stdout.splitlines()
    assert len(samples) == 5
    assert typed("grammar", "say", "factory.en", "--count", "0").returncode == 2
    sentence = samples[0].partition("->")[0].strip()
    assert edge_asr("grammar", "parse", "factory.en", sentence).stdout.strip() == samples[0].partition("-> ")[2]
    assert edge_asr("grammar", "parse", "factory.en", "hello world").returncode == 1

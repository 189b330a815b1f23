"""Verbs beside the service: what people listen with, look with and measure with."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from edge_asr import bench, commands, demo, doctor, evaluation, inference, logs, model_store, report, service, settings
from edge_asr import grammar as grammars
from edge_asr.audio import AudioFileError, measure, read_file, to_float
from edge_asr.child import ChildError, ask
from edge_asr.command_line import (
    EXIT_FOUND,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_NO_INPUT,
    ExamplesLast,
    example,
    one_line_errors,
    with_settings,
)
from edge_asr.devices import DeviceError, levels, list_devices, record
from edge_asr.engine import Engine, grammar_paths
from edge_asr.events import SAMPLE_RATE, Command, Rejection
from edge_asr.link import destinations
from edge_asr.pipeline import Understanding
from edge_asr.settings import Settings
from edge_asr.sources import audio_files
from edge_asr.subscriber import Screen, Subscriber
from edge_asr.text_matching import TextMatcher

LIST_LIMIT_S = 10.0
METER_WIDTH, METER_RANGE_DB = 60, 90.0

_DEMO_EXITS = {True: 0, False: EXIT_FOUND, None: EXIT_INTERRUPTED}


def _decibels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """``6,9.5`` as numbers."""
    if value is None:
        return None
    try:
        ratios_db = tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers with commas between them", ctx, param) from None
    if not all(math.isfinite(ratio_db) for ratio_db in ratios_db):
        raise click.BadParameter(f"{value!r} is not finite", ctx, param)
    return ratios_db


@click.command("demo", epilog=example("edge-asr demo"))
@with_settings
def play(options: Settings, **_: object) -> None:
    """Play the bundled recordings through the whole product in real time; exit code 0 only if everything arrived."""
    _quiet_logs(options)
    raise SystemExit(_DEMO_EXITS[asyncio.run(demo.play(options, _console()))])


@click.command(epilog=example("edge-asr transcribe examples/recordings --json"))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_settings
@click.option("--hotwords", type=click.Path(path_type=Path), help="Words to prefer, one per line: see hotwords.file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per utterance.")
def transcribe(
    options: Settings, files: tuple[Path, ...], hotwords: Path | None, *, as_json: bool, **_: object
) -> None:
    """Recognize recordings as the daemon would hear them: text and command of every utterance."""
    if hotwords is not None:
        options = options.model_copy(update={"hotwords": options.hotwords.model_copy(update={"file": hotwords})})
    engine = Engine.build(options)
    failed = False
    for path in files:
        try:
            for file in audio_files(path):
                for heard in engine.hear(read_file(file), options.vad):
                    row = _row(file, heard)
                    click.echo(json.dumps(row, ensure_ascii=False) if as_json else _sentence(row))
        except AudioFileError as error:
            failed = True
            click.echo(f"edge-asr: {error}", err=True)
    raise SystemExit(EXIT_NO_INPUT if failed else 0)


@click.command(epilog=example("edge-asr listen --set mqtt.host=broker.plant", "edge-asr listen --topic '#' --json"))
@with_settings
@click.option("--topic", help="MQTT topic filter; the device's own topics by default.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per message: topic and data.")
def listen(options: Settings, topic: str | None, *, as_json: bool, **_: object) -> None:
    """Show what a subscriber sees."""
    brokers = destinations(options.mqtt) or destinations(options.mqtt.model_copy(update={"host": "127.0.0.1"}))
    screen = Screen(_console())

    async def show() -> None:
        dropped = 0
        async with Subscriber(brokers, topic or f"{options.topic_root}/#") as subscriber:
            async for delivery in subscriber:
                if subscriber.dropped > dropped:
                    click.echo(
                        f"edge-asr: {subscriber.dropped - dropped} dropped: they came faster than read", err=True
                    )
                    dropped = subscriber.dropped
                if as_json:
                    click.echo(json.dumps({"topic": delivery.topic, "data": delivery.data}, ensure_ascii=False))
                else:
                    screen.show(delivery)

    asyncio.run(show())


@click.command(epilog=example("edge-asr devices --levels", "edge-asr devices --meter hw:CARD=Array,DEV=0"))
@click.option("--levels", "with_levels", is_flag=True, help="Listen to each for a second and show its level.")
@click.option("--meter", metavar="DEVICE", help="Show the level of one until Ctrl-C; `default` or a name of the list.")
@click.option("--seconds", type=click.FloatRange(min=0.1), help="End --meter after so long.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per device.")
def devices(*, with_levels: bool, meter: str | None, seconds: float | None, as_json: bool) -> None:
    """List the microphones under the names for settings; one with CARD= stays the same over plugging and reboots."""
    with one_line_errors():
        if meter is not None:
            _show_meter(meter, seconds)
            return
        found = list_devices()
        if not found:
            raise DeviceError("no microphone found; plug one in, or use a source of type files, stdin or the demo")
        for device in found:
            level = measure(record(device.index)) if with_levels else None
            if as_json:
                click.echo(json.dumps({**asdict(device), "level": level and asdict(level)}))
                continue
            star = "*" if device.is_default else " "
            shown = f"  {level.level_dbfs:6.1f} dBFS" if level else ""
            click.echo(f"{star} {device.alsa_id or device.name:40s} {device.channels} ch  {device.rate:6d} Hz{shown}")
            if device.alsa_id:
                click.echo(f"    {device.name}")


def _show_meter(device: str, seconds: float | None) -> None:
    """A bar that moves; full scale is at its right end, speech lies in its middle third."""
    with Live(console=_console(), refresh_per_second=10) as live:
        for count, level in enumerate(levels(device), 1):
            filled = max(0, min(METER_WIDTH, round((1 + level.level_dbfs / METER_RANGE_DB) * METER_WIDTH)))
            bar = "█" * filled + "·" * (METER_WIDTH - filled)
            live.update(f"{bar} {level.level_dbfs:6.1f} dBFS{'  CLIPPING' if level.clipped else ''}")
            if seconds is not None and count >= seconds * 10:
                return


@click.command(epilog=example("edge-asr check --settings /etc/edge-asr/settings.yaml", "edge-asr check --say"))
@with_settings
@click.option("--say", is_flag=True, help="Ask for a spoken sentence, record it and show what is understood.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per finding.")
def check(options: Settings, path: Path | None, *, say: bool, as_json: bool, **_: object) -> None:
    """Look over settings, files, model, grammars, microphone, broker, clock, disk; exit code 1 if something fails.

    Root, without STATE_DIRECTORY, looks at the service's state.
    """
    options = service.seen_by_administrator(options)
    marks = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}
    failed = False
    ask = (lambda sentence: click.echo(sentence, err=True)) if say else None
    for finding in doctor.examine(options, path, ask):
        failed |= finding.state == "failed"
        if as_json:
            click.echo(json.dumps(asdict(finding), ensure_ascii=False))
        else:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            click.echo(f"{marks[finding.state]}  {finding.subject}: {finding.found}{remedy}")
    raise SystemExit(EXIT_FOUND if failed else 0)


@click.command("bench", epilog=example("edge-asr bench"))
@with_settings
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def measure_costs(options: Settings, *, as_json: bool, **_: object) -> None:
    """Measure what hearing costs on this machine, stage by stage."""
    result = bench.run(options)
    if as_json:
        click.echo(json.dumps(result))
        return
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    click.echo(f"{machine}; model {result['model']}, ready in {result['ready_s']} s, {result['resident_mb']} MB")
    click.echo(f"Thread CPU time, milliseconds per second of audio ({result['audio_s']} s, median of {bench.ROUNDS}):")
    for stage in result["stages"]:
        click.echo(f"  {stage['name']:28s} {stage['cpu_ms_per_audio_s']:8.3f}")


@click.command(
    "eval",
    epilog=example(
        "edge-asr eval site.jsonl --html report.html",
        "edge-asr eval site.jsonl --grammar site.yaml --noise hall.flac --snr 6,12,18 --json figures.json",
    ),
)
@click.argument("manifest", type=click.Path(path_type=Path))
@with_settings
@click.option(
    "--grammar", "names", multiple=True, help="Grammar in place of the settings', a name or a file; repeatable."
)
@click.option("--noise", type=click.Path(path_type=Path), help="Recording of noise to mix in, at each of --snr.")
@click.option("--snr", "snrs_db", callback=_decibels, help="Signal-to-noise ratios in dB, e.g. 6,12,18; needs --noise.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other stretches of the noise.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page with plots to this file.")
def evaluate(
    options: Settings,
    manifest: Path,
    names: tuple[str, ...],
    noise: Path | None,
    snrs_db: tuple[float, ...] | None,
    seed: int,
    json_path: Path | None,
    html_path: Path | None,
    **_: object,
) -> None:
    """Measure on labelled recordings: commands accepted rightly and wrongly, text, cost; clean and in noise.

    MANIFEST has one JSON object a line: audio (a path beside it) and, where known, text, intent, slots.
    """
    if (noise is None) != (snrs_db is None):
        raise click.UsageError("--noise and --snr belong together")
    _quiet_logs(options)
    if names:
        options = options.model_copy(update={"commands": options.commands.model_copy(update={"grammars": names})})
    files = grammar_paths(options.commands).values()
    items = evaluation.read_manifest(manifest, {intent for file in files for intent in grammars.load(file).intents})
    engine = Engine.build(options)
    stretch = to_float(read_file(noise)) if noise is not None else None
    table = Table(*(Column(head, justify="right") for head in report.COLUMNS.values()))
    conditions = []
    with Live(table, console=_console()):
        for snr_db in (None, *(snrs_db or ())):
            condition = evaluation.measure(engine, items, options.vad, noise=stretch, snr_db=snr_db, seed=seed)
            conditions.append(condition)
            table.add_row(*report.row_of(evaluation.summarize(condition)))
    result = {
        "model": f"{engine.files.manifest.name} {engine.files.manifest.version}",
        "grammar": ", ".join(options.commands.grammars),
        "conditions": [evaluation.summarize(condition) for condition in conditions],
    }
    if json_path is not None:
        _write(json_path, json.dumps(result, indent=1) + "\n")
    if html_path is not None:
        _write(html_path, report.page(result, conditions, html_path.resolve().parent))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        click.echo(f"edge-asr: {path}: cannot be written ({error.strerror})", err=True)
        raise SystemExit(EXIT_IO) from None


@click.group(cls=ExamplesLast)
def grammar() -> None:
    """What may be commanded: try, test and look through grammar files."""


@grammar.command("list", epilog=example("edge-asr grammar list"))
def grammar_list() -> None:
    """List the bundled grammars: names for the setting commands.grammars."""
    with one_line_errors():
        for file in sorted(model_store.bundled("grammars").glob("*.yaml")):
            loaded = grammars.load(file)
            click.echo(f"{file.stem:14s} {loaded.language:4s} {', '.join(loaded.intents)}")


@grammar.command("test", epilog=example("edge-asr grammar test factory.en", "edge-asr grammar test site.yaml"))
@click.argument("names", nargs=-1, required=True)
def grammar_test(names: tuple[str, ...]) -> None:
    """Run the `tests:` of grammars, each by itself: what each sentence must mean."""
    with one_line_errors():
        wrong = 0
        for name, file in grammar_paths(settings.Commands(grammars=names)).items():
            tests = grammars.load(file).tests
            failed = commands.failed_expectations(commands.load_graph([file]), tests)
            for sentence, reading in failed.items():
                click.echo(f"{name}: {sentence!r} is read as {reading}")
            verdict = f"{len(tests) - len(failed)} of {len(tests)} sentences mean what they must"
            click.echo(f"{name}: {verdict if tests else 'has no `tests:` section; see docs/grammar.md'}")
            wrong += len(failed)
    raise SystemExit(EXIT_FOUND if wrong else 0)


@grammar.command("lint", epilog=example("edge-asr grammar lint factory.en", "edge-asr grammar lint site.yaml"))
@click.argument("names", nargs=-1, required=True)
@click.option("--model", default=model_store.EMBEDDED, show_default=True, help="The model that will hear it.")
def grammar_lint(names: tuple[str, ...], model: str) -> None:
    """Find words and sentences never heard, phrases that sound alike, double meanings; exit code 1 on an error."""
    with one_line_errors():
        from edge_asr import linter  # noqa: PLC0415 - its dictionary takes 57 MB and 0.3 s, and the service needs none

        table = inference.load_tokens(model_store.locate(model).tokens)
        wrong = 0
        for name, file in grammar_paths(settings.Commands(grammars=names)).items():
            remarks = list(linter.lint(file, table))
            for remark in remarks:
                click.echo(f"{name}: {remark.severity}: {remark.text}")
            errors = sum(remark.severity == "error" for remark in remarks)
            click.echo(f"{name}: {errors} errors, {len(remarks) - errors} warnings")
            wrong += errors
    raise SystemExit(EXIT_FOUND if wrong else 0)


@grammar.command("say", epilog=example("edge-asr grammar say factory.en --count 20"))
@click.argument("name")
@click.option("--count", default=10, type=click.IntRange(min=1), show_default=True, help="How many sentences.")
@click.option("--seed", default=0, show_default=True, help="Another seed, other sentences.")
def grammar_say(name: str, count: int, seed: int) -> None:
    """Show random sentences of a grammar with their meaning."""
    with one_line_errors():
        graph = commands.load_graph(list(grammar_paths(settings.Commands(grammars=(name,))).values()))
        random = Random(seed)  # noqa: S311 - samples, no secrets
        for _ in range(count):
            steps, ending = graph.words.walk(random)
            click.echo(f"{grammars.sentence(steps):60s} -> {grammars.read(steps, ending)}")


@grammar.command("parse", epilog=example("edge-asr grammar parse factory.en 'set mixer speed to 1200 rpm'"))
@click.argument("name")
@click.argument("text")
def grammar_parse(name: str, text: str) -> None:
    """Show what a text means, word for word or by the sound of its names; exit code 1 if nothing or not one thing."""
    with one_line_errors():
        graph = commands.load_graph(list(grammar_paths(settings.Commands(grammars=(name,))).values()))
        understood = TextMatcher(graph).understood(text)
        for reading, confidence in understood:
            click.echo(f"{reading}{'' if confidence == 1 else f', by sound, confidence {confidence:.2f}'}")
        if len(understood) != 1:
            click.echo("ambiguous" if understood else "no command", err=True)
            raise SystemExit(EXIT_FOUND)


def watch(options: Settings) -> None:
    """Run with a subscriber's view of what leaves; where there is no microphone at all, play the demo."""
    _quiet_logs(options)
    if _has_no_microphone(options):
        _console().print("No microphone found: playing the bundled recordings instead.\n")
        raise SystemExit(_DEMO_EXITS[asyncio.run(demo.play(options, _console()))])
    asyncio.run(demo.watch(options, _console()))


def _has_no_microphone(options: Settings) -> bool:
    """Whether the settings want a microphone and the machine has none at all; asked beside (law of ``devices``)."""
    if not any(isinstance(source, settings.MicrophoneSource) for source in options.sources):
        return False
    try:
        return not ask("edge_asr.devices", limit_s=LIST_LIMIT_S)["devices"]
    except ChildError:
        return True
    except TimeoutError:
        return False


def _console() -> Console:
    return Console(highlight=False)


def _quiet_logs(options: Settings) -> None:
    """Beside a subscriber's view only trouble is worth a line."""
    logs.configure(options.log.model_copy(update={"level": "warning", "format": "text"}))


def _row(file: Path, heard: Understanding) -> dict[str, Any]:
    """The JSON object of one utterance."""
    utterance, transcript, decision = heard.utterance, heard.transcript, heard.decision
    start_s = utterance.start / SAMPLE_RATE
    said = asdict(transcript) if transcript is not None else {"text": "", "language": "nospeech", "tokens": []}
    return {
        "file": str(file),
        "start": round(start_s, 3),
        "end": round(start_s + utterance.duration_s, 3),
        **{key: said.get(key) for key in ("text", "language", "emotion", "event", "confidence", "tokens")},
        "command": asdict(decision) if isinstance(decision, Command) else None,
        "rejected": asdict(decision) if isinstance(decision, Rejection) else None,
    }


def _sentence(row: dict[str, Any]) -> str:
    """The same for people."""
    command, rejected = row["command"], row["rejected"]
    outcome = ""
    if command is not None:
        outcome = f"  -> {command['intent']} {json.dumps(command['slots'], ensure_ascii=False)}"
    elif rejected is not None:
        outcome = f"  -> rejected: {rejected['reason']}"
    return f"{row['file']} {row['start']:.2f}-{row['end']:.2f} s: {row['text']}{outcome}"

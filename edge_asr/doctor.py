"""Looks the box over before a person must: settings, model, hotwords, grammars, microphone, broker, clock, disk.

Every finding says what was looked at, what was found, and what to do if it is not well.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from edge_asr import clock, inference, installation, model_store, prepared, service, trial
from edge_asr.audio import measure
from edge_asr.devices import DeviceError, record
from edge_asr.engine import Engine, build_hotwords, build_interpreter
from edge_asr.events import Command, Rejection
from edge_asr.grammar import GrammarError
from edge_asr.hearing import DEAD_BELOW_DBFS, MAX_OFFSET
from edge_asr.hotwords import HotwordError
from edge_asr.inference import OnnxRecognizer, SherpaRecognizer
from edge_asr.link import Destination, destinations
from edge_asr.model_store import ModelError
from edge_asr.outbox import OutboxError, read_statistics
from edge_asr.settings import MicrophoneSource, Settings, SettingsError
from edge_asr.standing import StandingOrders
from edge_asr.subscriber import Subscriber, SubscriberError

State = Literal["ok", "warning", "failed"]

LITTLE_SPACE_BYTES = 100 * 1024 * 1024
SPOKEN_TEST_S = 6.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    found: str
    remedy: str = ""


def examine(options: Settings, path: Path | None = None, ask: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Look at everything the settings of ``path`` name, one by one; with ``ask`` a person is asked to speak."""
    yield Finding("settings", "ok", str(path or "none given: the defaults"))
    yield _permissions(options)
    options, standing = _under_orders(options)
    yield standing
    recognizer: list[OnnxRecognizer | SherpaRecognizer] = []
    yield _model(options, recognizer.append)
    if recognizer:
        yield _hotwords(options, recognizer[0])
        yield _grammars(options, recognizer[0])
    for source in options.sources:
        if isinstance(source, MicrophoneSource):
            yield _microphone(source, options.commands.max_noise_dbfs)
            if ask is not None and recognizer:
                yield _spoken_test(source, options, ask)
    yield from _brokers(options)
    yield _clock()
    yield _state_directory(options.outbox_path.parent)
    if options.outbox_path.exists():
        yield _outbox(options.outbox_path)


def _under_orders(options: Settings) -> tuple[Settings, Finding]:
    """What requests have set counts, not the settings; and a closed ear is easily forgotten."""
    orders = StandingOrders(options.state_directory)
    try:
        effective = orders.over(options)
    except (SettingsError, OSError) as error:
        return options, Finding("requests", "failed", str(error), "run this as the service's user, or delete the file")
    names = orders.names(options)
    if orders.muted:
        return effective, Finding("requests", "warning", f"the ear is closed ({', '.join(names)})", "send req/unmute")
    return effective, Finding("requests", "ok", f"set by request: {', '.join(names) or 'nothing'}")


def _permissions(options: Settings) -> Finding:
    """Whether every file that the settings name can be read, and secrets by nobody else."""
    gateway = options.gateway
    secrets = _there(gateway and gateway.key_file, gateway and gateway.ice_password_file)
    named = _there(options.model.signed_by, options.hotwords.file, options.recorder.public_key)
    named += _there(gateway and gateway.cert_file)
    for broker in (options.mqtt, *options.mqtt.brokers):
        tls = broker.tls
        secrets += _there(broker.password_file, tls and tls.key_file)
        named += _there(tls and tls.ca_file, tls and tls.cert_file)
    named = secrets + named
    for file in named:
        if not os.access(file, os.R_OK):
            what = "cannot be read" if file.exists() else "is not there"
            remedy = "check the path; under systemd hand it over with LoadCredential=, and start the service first"
            return Finding("files", "failed", f"{file} {what}", remedy)
    for file in secrets:
        if file.stat().st_mode & 0o077:
            return Finding(
                "files",
                "warning",
                f"{file} can be read by others",
                f"chmod 600 {file}, and hand it to a service by LoadCredential=",
            )
    return Finding("files", "ok", f"{len(named)} files can be read")


def _there(*named: Path | BaseModel | None) -> list[Path]:
    return [file for file in named if isinstance(file, Path)]


def _model(options: Settings, loaded: Callable[[OnnxRecognizer | SherpaRecognizer], None]) -> Finding:
    try:
        files = model_store.locate(
            installation.chosen(options), options.models_directory, inference.reachable(options.model)
        )
        graph = prepared.find(files, options.models_directory, options.model)
        recognizer = inference.open_recognizer(files, options.model, graph)
    except ModelError as error:
        return Finding("model", "failed", str(error), "choose another with model.name; see `edge-asr models list`")
    loaded(recognizer)
    try:
        heard = trial.hear_golden(recognizer, files).heard
    except ModelError as error:
        return Finding("model", "failed", str(error), "or this CPU's arithmetic is not what it was")
    if heard is None:
        return Finding("model", "ok", f"{files.name} loads; it has no golden recording in a language of this site")
    return Finding("model", "ok", f"{files.name} on {recognizer.provider} hears {heard!r} in its golden recording")


def _hotwords(options: Settings, recognizer: OnnxRecognizer | SherpaRecognizer) -> Finding:
    try:
        hotwords = build_hotwords(options.hotwords, recognizer)
    except HotwordError as error:
        return Finding("hotwords", "failed", str(error).splitlines()[0], "mend it")
    if hotwords is None:
        return Finding("hotwords", "ok", "none")
    if hotwords.unspellable:
        words = ", ".join(hotwords.unspellable[:8])
        return Finding("hotwords", "warning", f"the model cannot write: {words}", "give them `spoken`")
    return Finding("hotwords", "ok", f"{len(hotwords)}")


def _grammars(options: Settings, recognizer: OnnxRecognizer | SherpaRecognizer) -> Finding:
    try:
        interpreter = build_interpreter(options.commands, recognizer)
    except GrammarError as error:
        return Finding("grammars", "failed", str(error).splitlines()[0], "mend it; `edge-asr grammar test` shows more")
    if interpreter is None:
        return Finding("grammars", "ok", "none: transcripts only")
    if interpreter.unspellable:
        words = ", ".join(interpreter.unspellable[:8])
        return Finding("grammars", "warning", f"the model cannot write: {words}", "say it in other words")
    return Finding("grammars", "ok", ", ".join(options.commands.grammars))


def _microphone(source: MicrophoneSource, max_noise_dbfs: float) -> Finding:
    subject = f"source {source.name}"
    try:
        level = measure(record(source.device, 1.0, source.channel))
    except DeviceError as error:
        return Finding(subject, "failed", str(error), "is the user in the group audio?")
    found = f"{level.level_dbfs:.0f} dBFS"
    if level.level_dbfs <= DEAD_BELOW_DBFS:
        return Finding(
            subject, "failed", f"digital silence ({found})", "unmute it (`alsamixer`), check cable and channel"
        )
    if level.clipped:
        return Finding(subject, "warning", f"overdriven ({found})", "lower its gain (`alsamixer`)")
    if abs(level.offset) > MAX_OFFSET:
        return Finding(subject, "warning", f"off its middle by {100 * level.offset:.0f} %", "try another sound card")
    if level.level_dbfs > max_noise_dbfs:
        return Finding(subject, "warning", f"too noisy to be trusted ({found})", "use a close-talking microphone")
    return Finding(subject, "ok", found)


def _spoken_test(source: MicrophoneSource, options: Settings, ask: Callable[[str], None]) -> Finding:
    """Record a sentence and hear it as the daemon would."""
    subject = f"spoken test of {source.name}"
    ask(f"Please say a command now; {source.name} listens for {SPOKEN_TEST_S:g} seconds.")
    try:
        engine = Engine.build(options)
        heard = list(engine.hear(record(source.device, SPOKEN_TEST_S, source.channel), options.vad))
    except (DeviceError, ModelError, HotwordError, GrammarError) as error:
        return Finding(subject, "failed", str(error).splitlines()[0], "mend what is said above")
    if not heard:
        return Finding(subject, "failed", "nobody was heard speaking", "speak louder or nearer; see --meter of devices")
    texts = [each.transcript.text for each in heard if each.transcript is not None]
    commands = [each.decision for each in heard if isinstance(each.decision, Command)]
    if commands:
        return Finding(subject, "ok", f"heard {' / '.join(texts)!r}, understood {commands[0].intent}")
    reasons = [each.decision.detail for each in heard if isinstance(each.decision, Rejection)]
    state: State = "warning" if reasons else "ok"
    remedy = "say a sentence of the grammar; `edge-asr grammar say` shows some" if reasons else ""
    return Finding(subject, state, reasons[0] if reasons else f"heard {' / '.join(texts)!r}", remedy)


def _brokers(options: Settings) -> Iterator[Finding]:
    brokers = destinations(options.mqtt)
    if not brokers:
        yield Finding("broker", "warning", "none is set: the outbox keeps everything", "set mqtt.host")
    for to in brokers:
        yield asyncio.run(_broker(to, f"{options.topic_root}/#"))


async def _broker(to: Destination, topic_filter: str) -> Finding:
    try:
        async with Subscriber([to], topic_filter):
            return Finding("broker", "ok", f"{to.address} accepts us")
    except SubscriberError as error:
        return Finding("broker", "failed", str(error), "until one accepts us the outbox keeps everything")


def _clock() -> Finding:
    if clock.time_quality() == "synchronized":
        return Finding("clock", "ok", clock.iso(clock.wall_ns()))
    found = f"{clock.iso(clock.wall_ns())}, set by no time service"
    return Finding("clock", "warning", found, "enable systemd-timesyncd or chrony; ages stay right, dates may not")


def _state_directory(folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding("state directory", "failed", f"{existing} is not writable", "chown it, or set state_dir")
    free = shutil.disk_usage(existing).free
    elsewhere = ", not the service's: see `sudo edge-asr check`" if service.is_elsewhere(folder) else ""
    found = f"{folder}{elsewhere}, {free // 2**20} MiB free"
    if free < LITTLE_SPACE_BYTES:
        return Finding("state directory", "warning", found, "free space; when full, the oldest transcripts go first")
    return Finding("state directory", "ok", found)


def _outbox(path: Path) -> Finding:
    try:
        statistics = read_statistics(path)
    except OutboxError as error:
        return Finding("outbox", "failed", str(error), "the daemon rescues what is readable when it starts")
    waiting, dropped = sum(statistics.waiting.values()), sum(statistics.dropped.values())
    state: State = "warning" if dropped or statistics.dead_letters or statistics.refusal else "ok"
    found = f"{waiting} waiting, {dropped} dropped, {statistics.dead_letters} refused by the broker"
    if statistics.refusal:
        return Finding("outbox", "warning", found, statistics.refusal)
    return Finding("outbox", state, found, "see `edge-asr outbox status`" if state == "warning" else "")

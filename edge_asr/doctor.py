"""Looks the box over before a person must: settings, model, hotwords, grammars, microphone, broker, clock, disk.

Every finding says what was looked at, what was found, and what to do if it is not well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from edge_asr import clock, inference, installation, model_store, prepared, service, trial
from edge_asr.audio import measure
from edge_asr.brevity import too_short
from edge_asr.devices import DeviceError, record
from edge_asr.engine import Engine, build_hotwords, build_interpreter, read_grammars
from edge_asr.events import Command, Rejection
from edge_asr.grammar import GrammarError, parse
from edge_asr.hearing import DEAD_BELOW_DBFS, MAX_OFFSET
from edge_asr.hotwords import HotwordError
from edge_asr.hotwords import load as load_hotwords
from edge_asr.inference import OnnxRecognizer, SherpaRecognizer
from edge_asr.link import Destination, destinations
from edge_asr.model_store import ModelError
from edge_asr.outbox import OutboxError, read_statistics
from edge_asr.service import ServiceUser
from edge_asr.settings import FilesSource, MicrophoneSource, Settings, SettingsError
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
    user = service.user_of(options)
    yield Finding("settings", "ok", str(path or "none given: the defaults"))
    yield _permissions(options, path, user)
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
    yield _state_directory(options.outbox_path.parent, user)
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


def _permissions(options: Settings, path: Path | None, user: ServiceUser | None) -> Finding:
    """Whether every file that the settings name can be read by whoever will run them, and secrets by nobody else."""
    secrets, others = _named(options)
    files = [*_there(path), *secrets, *others]
    for file in files:
        trouble = _unreadable(file, user, secret=file in secrets)
        if trouble:
            return Finding("files", "failed", *trouble)
    for file in secrets:
        source = file if user is None else user.source(file)
        if source is not None and source.stat().st_mode & 0o077:
            remedy = f"chmod 600 {source}, and hand it to a service by LoadCredential="
            return Finding("files", "warning", f"{source} can be read by others", remedy)
    whose = "" if user is None else " by the service"
    return Finding("files", "ok", f"{len(files)} files can be read{whose}")


def _named(options: Settings) -> tuple[list[Path], list[Path]]:
    """The files that settings name: secrets, and others."""
    gateway = options.gateway
    secrets = _there(gateway and gateway.key_file, gateway and gateway.ice_password_file)
    others = _there(options.model.signed_by, options.hotwords.file, options.recorder.public_key)
    others += _there(gateway and gateway.cert_file)
    for broker in (options.mqtt, *options.mqtt.brokers):
        tls = broker.tls
        secrets += _there(broker.password_file, tls and tls.key_file)
        others += _there(tls and tls.ca_file, tls and tls.cert_file)
    named = (options.model.name or "", *options.commands.grammars)
    others += [Path(name) for name in named if Path(name).is_absolute()]
    others += [path for source in options.sources if isinstance(source, FilesSource) for path in source.paths]
    return secrets, others


def _unreadable(file: Path, user: ServiceUser | None, *, secret: bool) -> tuple[str, str] | None:
    """What keeps whoever will run these settings from reading a file, and the remedy; None: nothing."""
    source = file if user is None else user.source(file)
    if source is None:
        return f"{file} is handed over by nobody", f"add LoadCredential={file.name}:/etc/edge-asr/{file.name}"
    if not source.exists():
        remedy = "check the path; credentials are there while the service runs, for it and for root"
        return f"{source} is not there", remedy
    if os.access(source, os.R_OK) if user is None or source is not file else user.may("-r", file):
        return None
    if user is None:
        return f"{file} cannot be read", "run this as root or as whoever will run the daemon"
    if secret:
        remedy = f"hand it over by LoadCredential={file.name}:{file} and name {service.CREDENTIALS / file.name} instead"
    else:
        remedy = f"chmod a+r {file}, chmod a+x the folders above it, and keep it out of /home, /root and /tmp"
    return f"{file} cannot be read by the service's user", remedy


def _there(*named: Path | BaseModel | None) -> list[Path]:
    return [file for file in named if isinstance(file, Path)]


def _model(options: Settings, loaded: Callable[[OnnxRecognizer | SherpaRecognizer], None]) -> Finding:
    try:
        files = model_store.locate(
            installation.chosen(options), options.models_directory, inference.reachable(options.model)
        )
        graph = prepared.find(files, options.models_directory, options.model)
        recognizer = inference.open_recognizer(files, options.model, graph, options.models_directory)
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
        hotwords = build_hotwords(load_hotwords(options.hotwords), recognizer)
    except HotwordError as error:
        return Finding("hotwords", "failed", str(error).splitlines()[0], "mend it")
    if not hotwords:
        return Finding("hotwords", "ok", "none")
    if hotwords.unspellable:
        words = ", ".join(hotwords.unspellable[:8])
        return Finding("hotwords", "warning", f"the model cannot write: {words}", "give them `spoken`")
    return Finding("hotwords", "ok", f"{len(hotwords)}")


def _grammars(options: Settings, recognizer: OnnxRecognizer | SherpaRecognizer) -> Finding:
    try:
        grammars = read_grammars(options.commands)
        interpreter = build_interpreter(options.commands, grammars, recognizer)
    except GrammarError as error:
        return Finding("grammars", "failed", str(error).splitlines()[0], "mend it; `edge-asr grammar test` shows more")
    if interpreter is None:
        return Finding("grammars", "ok", "none: transcripts only")
    if interpreter.unspellable:
        words = ", ".join(interpreter.unspellable[:8])
        return Finding("grammars", "warning", f"the model cannot write: {words}", "say it in other words")
    short = _too_short(options, grammars, recognizer)
    if short:
        found = f"too short to be as sure as is wanted: {', '.join(map(repr, short[:8]))}"
        return Finding("grammars", "warning", found, "lower commands.min_confidence, or let more be said")
    return Finding("grammars", "ok", ", ".join(options.commands.grammars))


def _too_short(
    options: Settings, grammars: Mapping[str, bytes], recognizer: OnnxRecognizer | SherpaRecognizer
) -> list[str]:
    """A sentence of each intent that can be too short; an engine without posteriors is always sure."""
    if isinstance(recognizer, SherpaRecognizer):
        return []
    loaded, wanted = [parse(content, name) for name, content in grammars.items()], options.commands.min_confidence
    return [short.said for each in loaded for short in too_short(each, recognizer.table, wanted)]


def _microphone(source: MicrophoneSource, max_noise_dbfs: float) -> Finding:
    subject = f"source {source.name}"
    try:
        level = measure(record(source.device, 1.0, source.channel))
    except DeviceError as error:
        if error.taken_by is not None and service.runs(error.taken_by):
            return Finding(subject, "ok", "in use by the service, whose health and alarms tell how it hears")
        remedy = "is the user in the group audio?" if error.taken_by is None else "one program at a time can have it"
        return Finding(subject, "failed", str(error), remedy)
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
        pcm = record(source.device, SPOKEN_TEST_S, source.channel)
        heard = list(engine.hear(pcm, options.vad, source.name))
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


def _state_directory(folder: Path, user: ServiceUser | None) -> Finding:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if user is not None and not user.may("-w", existing):
        remedy = f"the service writes below {service.STATE_DIRECTORY} only: leave state_dir and outbox.path unset"
        return Finding("state directory", "failed", f"{existing} is not writable by the service's user", remedy)
    if not os.access(existing, os.W_OK):
        return Finding("state directory", "failed", f"{existing} is not writable", "chown it, or set state_dir")
    free = shutil.disk_usage(existing).free
    elsewhere = ", not the service's: see `sudo edge-asr check`" if service.is_elsewhere(folder) else ""
    found = f"{folder}{elsewhere}, {free // 2**20} MiB free"
    if free < LITTLE_SPACE_BYTES:
        return Finding("state directory", "warning", found, "free space; when full, the oldest transcripts go first")
    stranger = None if user is None else _stranger(existing, user.uid)
    if stranger is not None:
        remedy = f"chown --recursive --reference={existing} {existing}/"
        return Finding("state directory", "warning", f"{stranger} does not belong to the service's user", remedy)
    return Finding("state directory", "ok", found)


def _stranger(folder: Path, uid: int) -> Path | None:
    """A file that somebody else has left in the state."""
    for entry in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # the daemon goes on meanwhile
            if entry.lstat().st_uid != uid:
                return entry
    return None


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

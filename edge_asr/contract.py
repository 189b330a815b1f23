"""What leaves the box: the topics, the payload of each and its JSON Schema; everything a consumer may rely on.

Law:

- Every payload's data is flat, carries ``id``, ``device``, ``boot_id``, ``time`` and ``time_quality``, and validates
  against ``schemas/<name>.json``; fields are only ever added, so consumers must ignore what they do not know.
- ``evt/command`` carries only a command whose life is not over, ``evt/pending`` only a question that can still be
  answered; afterwards the same message leaves as ``evt/expired``.
- No topic is another's parent, and no field name holds a character that tag-based SCADA cannot take.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from edge_asr import clock
from edge_asr.confirmation import Pending
from edge_asr.events import Command, Confirmer, Draft, Json, Message, Rejection, Transcript, Utterance, new_id

TRANSCRIPT = "evt/transcript"
COMMAND = "evt/command"
REJECTED = "evt/rejected"
EXPIRED = "evt/expired"
PENDING = "evt/pending"
ALARM = "evt/alarm"
STATUS = "status"
META = "meta"
HEALTH = "health"
PARTIAL = "live/partial"
AGAIN = "live/again"

REQUESTS = "req/"
"""Followed by the verb; what comes here is read by ``requests``, and what is answered goes where the sender said."""
RECEIPT = "req/receipt"

TOPICS: Mapping[str, str] = {
    TRANSCRIPT: "transcript",
    COMMAND: "command",
    REJECTED: "rejected",
    EXPIRED: "expired",
    PENDING: "pending",
    ALARM: "alarm",
    STATUS: "status",
    META: "meta",
    HEALTH: "health",
    PARTIAL: "partial",
    AGAIN: "again",
}
"""Topic below the device's root -> name of its schema."""

MIN_LIFE_S = 2.0
"""A command with less left is expired: brokers count message expiry in whole seconds.

Given N seconds, mosquitto hands a message on for up to N + 1 (it compares clock readings without their fractions), and
0 means for ever to it. So the interval is a second less than what is left, and at least 1.
"""

PayloadMode = Literal["cloudevents", "plain"]
State = Literal["online", "degraded", "offline"]
Severity = Literal["warning", "critical"]
AlarmState = Literal["raised", "over"]
Data = dict[str, Json]

_UNSAFE = str.maketrans(dict.fromkeys(".&%=", "_"))

_ENDED = "ended_ns"
"""Kept with the stored data only: CLOCK_BOOTTIME of the end of speech, which becomes ``latency_ms``."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One MQTT message, ready to send."""

    topic: str
    body: bytes
    content_type: str
    user_properties: tuple[tuple[str, str], ...] = ()
    expires_s: int | None = None
    """MQTT message expiry interval: the broker drops it for subscribers that come later; see :data:`MIN_LIFE_S`."""
    is_text: bool = True
    """UTF-8, and MQTT says so."""
    correlation: bytes | None = None
    """MQTT correlation data of the request that this answers."""


@dataclass(frozen=True, slots=True)
class Meta:
    """What the device is made of."""

    version: str
    model: str
    model_sha256: str
    languages: Sequence[str]
    engine: str
    provider: str
    """The execution provider really in use: an engine without CUDA falls back to the CPU in silence."""
    provider_wanted: str
    grammars: Mapping[str, str]
    """SHA-256 of each grammar by name."""
    sources: Sequence[str]
    hotwords: int
    """How many words the site's list has."""
    hotwords_sha256: str
    """Of the list; see ``standing``."""
    standing: Sequence[str]
    """What requests have set and stands until they change it, e.g. ``grammar factory.en``."""
    broker: str | None = None
    """Host and port of the broker in use."""


@dataclass(frozen=True, slots=True)
class MicrophoneHealth:
    """How one source does; None: not measured yet."""

    alive: bool
    """Audio arrives and is not digital silence."""
    level_dbfs: float | None
    noise_dbfs: float | None
    snr_db: float | None
    clipped: float
    """Share of 32 ms frames with samples at full scale."""
    lost_s: float
    """Seconds of audio lost since the start."""
    offset: float | None = None
    """Constant part of the signal, -1..1 of full scale."""
    rate_error: float | None = None
    """Measured sample rate over the nominal one, less one."""
    troubles: Sequence[str] = ()
    """Kinds of the alarms about it that are not over."""
    captures_replaced: int | None = None
    """Processes that listened to it and died, hung or grew, since the start; None: it needs none."""


@dataclass(frozen=True, slots=True)
class OutboxHealth:
    """What waits for the broker."""

    waiting: int
    dropped: int
    """Given up because there was no room."""
    outdated: int
    """Given up because of their age."""
    dead_letters: int
    oldest_age_s: float | None
    refusal: str
    """Why the broker takes nothing although it is there; empty: nothing is known against it."""
    unanswered_s: float = 0.0
    """For how long it has answered nobody; beyond a moment everything else here is from before."""


@dataclass(frozen=True, slots=True)
class RequestsHealth:
    """What was asked of the device since it started."""

    ok: int
    refused: int
    dropped: int
    """More came at QoS 0 than could wait."""


@dataclass(frozen=True, slots=True)
class Health:
    """How the device does; None: not measurable here."""

    uptime_s: float
    muted: bool
    """The ear was closed by request."""
    microphones: Mapping[str, MicrophoneHealth]
    outbox: OutboxHealth
    receipts: Mapping[str, int]
    """Commands the MES accepted and rejected, and receipts missing, since the outbox was made."""
    requests: RequestsHealth
    real_time_factor: float | None
    cpu_load: float
    """Cores in use by the daemon."""
    memory_bytes: int
    temperature_c: float | None
    broker: str | None = None
    """Host and port of the broker in use."""
    provider: str | None = None
    """The execution provider that the model really runs on."""
    recognizer_cpu_load: float | None = None
    """Cores in use by the recognizer, a process of its own."""
    recognizer_memory_bytes: int | None = None
    recognizers_replaced: int = 0
    """Recognizers that died, hung, grew or heard wrongly, since the start."""
    audit_newest: str | None = None
    """``number:hash`` of the newest record of the audit log: whoever keeps it can prove what came before."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """Turns messages and states into payloads for one device."""

    root: str
    """Topic root, e.g. ``acme/hall-2/voice/edge01``."""
    device: str
    mode: PayloadMode = "cloudevents"

    def message(self, message: Message, *, replayed: bool, life_left_s: float | None) -> Payload:
        """Render a committed message; ``life_left_s`` (see ``outbox``) decides whether a command is still one."""
        topic, data = self.flat(message, replayed=replayed, life_left_s=life_left_s)
        properties = (
            ("seq", str(message.seq)),
            ("replayed", str(replayed).lower()),
            ("time_quality", message.time_quality),
        )
        expires_s = int(life_left_s) - 1 if life_left_s is not None and topic != EXPIRED else None
        content_type, body = self._envelope(TOPICS[topic], data)
        return Payload(f"{self.root}/{topic}", body, content_type, properties, expires_s)

    def flat(self, message: Message, *, replayed: bool, life_left_s: float | None) -> tuple[str, Data]:
        """The topic below the root and the flat data of a committed message."""
        expired = life_left_s is not None and life_left_s < MIN_LIFE_S
        data: Data = {
            **self._common(message.id, message.boot_id, message.created_wall_ns, message.time_quality),
            "seq": message.seq,
            "replayed": replayed,
            **message.data,
        }
        if expired and message.topic == PENDING:  # a question is no question any more
            data |= {"confirmed": False, "expires_at": data["confirm_until"]}
            for of_a_question in ("read_back", "confirmations_left", "confirm_until", "roles"):
                del data[of_a_question]
        ended_ns = data.pop(_ENDED, None)
        if isinstance(ended_ns, int):
            data["latency_ms"] = round((message.created_ns - ended_ns) / 1e6, 1)
        return EXPIRED if expired else message.topic, data

    def state(self, topic: str, data: Mapping[str, Json]) -> Payload:
        """Render what is not a message: a status, meta, health or partial of this moment."""
        content_type, body = self._envelope(TOPICS[topic], self._now(data))
        return Payload(f"{self.root}/{topic}", body, content_type)

    def answer(self, name: str, data: Mapping[str, Json], topic: str, correlation: bytes | None) -> Payload:
        """Render what came of a request, for the topic (in full) that its sender chose; ``name`` is the schema's."""
        content_type, body = self._envelope(name, self._now(data))
        return Payload(topic, body, content_type, correlation=correlation)

    def _now(self, data: Mapping[str, Json]) -> Data:
        return {**self._common(new_id(), clock.boot_id(), clock.wall_ns(), clock.time_quality()), **data}

    def _common(self, payload_id: str, boot_id: str, wall_ns: int, time_quality: str) -> Data:
        return {
            "id": payload_id,
            "device": self.device,
            "boot_id": boot_id,
            "time": clock.iso(wall_ns),
            "time_quality": time_quality,
        }

    def _envelope(self, name: str, data: Mapping[str, Json]) -> tuple[str, bytes]:
        """Content type and body."""
        content_type, content = "application/json", _tag_safe(dict(data))
        if self.mode == "cloudevents":
            content_type = "application/cloudevents+json"
            content = {
                "specversion": "1.0",
                "id": data["id"],
                "source": self.root,
                "type": f"edge-asr.{name}",
                "time": data["time"],
                "datacontenttype": "application/json",
                "dataschema": schema_id(name),
                "data": dict(data),
            }
        return content_type, json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _tag_safe(value: Json) -> Json:
    """The same with no name that breaks a SCADA tag: names of grammars, sources and slots are the site's own."""
    if isinstance(value, dict):
        return {name.translate(_UNSAFE): _tag_safe(inner) for name, inner in value.items()}
    return [_tag_safe(inner) for inner in value] if isinstance(value, list) else value


def transcript_draft(utterance: Utterance, transcript: Transcript, *, model: str) -> Draft:
    """What was said."""
    return Draft(TRANSCRIPT, "transcript", {**_heard(utterance), **_said(transcript, model)})


def command_draft(
    utterance: Utterance,
    transcript: Transcript,
    command: Command,
    *,
    model: str,
    confirmed_ns: int | None = None,
    confirmed_by: Confirmer = "voice",
) -> Draft:
    """What is to be done, until its life is over; it begins at the end of speech or at the confirmation."""
    begins_ns = utterance.ended_ns if confirmed_ns is None else confirmed_ns
    expires_ns = begins_ns + round(command.ttl_s * clock.NS_PER_S)
    data: Data = {
        **_heard(utterance),
        **_said(transcript, model),
        **_wanted(command),
        "confirmed": confirmed_ns is not None,
        "expires_at": _wall_time(expires_ns),
    }
    if confirmed_ns is not None:
        data |= {"confirmed_by": confirmed_by, _ENDED: confirmed_ns}
    return Draft(COMMAND, "command", data, expires_ns)


def pending_draft(pending: Pending, *, model: str) -> Draft:
    """A risky command that waits for a yes: nothing to act upon yet, something to read back to the speaker."""
    data: Data = {
        **_heard(pending.utterance),
        **_said(pending.transcript, model),
        **_wanted(pending.command),
        **question_data(pending),
    }
    return Draft(PENDING, "command", data, pending.until_ns)


def question_data(pending: Pending) -> Data:
    """What an open question asks, of whom and until when."""
    return {
        "pending_id": pending.id,
        "source": pending.utterance.source,
        "read_back": _read_back(pending),
        "confirmations_left": pending.steps_left,
        "confirm_until": _wall_time(pending.until_ns),
        "roles": list(pending.command.roles),
    }


def rejection_draft(
    utterance: Utterance, rejection: Rejection, transcript: Transcript | None = None, *, model: str
) -> Draft:
    """What was heard and not acted upon, and why."""
    data: Data = {
        **_heard(utterance),
        **(_said(transcript, model) if transcript is not None else {"model": model}),
        "reason": rejection.reason,
        "detail": rejection.detail,
        "confidence": _share(rejection.confidence),
        "candidates": list(rejection.candidates),
    }
    return Draft(REJECTED, "rejection", data)


def alarm_draft(
    kind: str,
    detail: str,
    *,
    severity: Severity,
    remedy: str = "",
    source: str | None = None,
    state: AlarmState = "raised",
) -> Draft:
    """Device trouble worth a human; ``kind`` is a stable name like ``outbox-dropped``, ``detail`` one sentence."""
    about: Data = {} if source is None else {"source": source}
    data: Data = {"kind": kind, "severity": severity, "state": state, "detail": detail, "remedy": remedy, **about}
    return Draft(ALARM, "alarm", data)


def discreet(draft: Draft) -> Draft | None:
    """What is left of a message where only commands may be known: no free text; None: nothing."""
    if draft.category == "transcript":
        return None
    withheld: Data = {"text": "", "tokens": [], "candidates": [], "detail": "the site keeps texts to itself"}
    if draft.topic == ALARM:
        return draft
    return replace(draft, data={key: withheld.get(key, value) for key, value in draft.data.items()})


def partial_data(utterance: Utterance, transcript: Transcript) -> Data:
    """Text while someone still speaks; ``utterance`` is what has been heard of it so far."""
    data = {**_heard(utterance), "text": transcript.text, "language": transcript.language}
    del data[_ENDED]
    return data


def again_data(said: Pending | Message) -> Data:
    """An open question, or what was heard last, to be said again: a sentence and nothing to act upon."""
    if isinstance(said, Pending):
        source, utterance_id, ended_ns = said.utterance.source, said.utterance.id, said.utterance.ended_ns
        kind, said_id, text = TOPICS[PENDING], said.id, _read_back(said)
    else:
        kind, said_id, data = TOPICS[said.topic], said.id, said.data
        source, utterance_id, ended_ns = str(data["source"]), str(data["utterance_id"]), said.created_ns
        text = str(data.get("words") or data.get("detail") or data.get("text", ""))
    age_s = (clock.boottime_ns() - ended_ns) / clock.NS_PER_S
    return {
        "said": kind,
        "said_id": said_id,
        "utterance_id": utterance_id,
        "source": source,
        "text": text,
        "age_s": round(age_s, 1),
    }


def status_data(state: State, reason: str = "", *, muted: bool = False) -> Data:
    """Whether the device works; ``reason`` is one sentence unless everything is well."""
    return {"state": state, "reason": reason, "muted": muted}


def meta_data(meta: Meta) -> Data:
    """What the device is made of."""
    return dataclasses.asdict(meta)


def health_data(health: Health) -> Data:
    """How the device does."""
    return dataclasses.asdict(health)


def kind_of(topic: str) -> str:
    """The part of a topic below its device's root, e.g. ``evt/command`` or ``req/receipt``; empty: none of ours."""
    _, request, verb = topic.rpartition(f"/{REQUESTS}")
    if request:
        return f"{REQUESTS}{verb}"
    return next((kind for kind in TOPICS if topic.endswith(f"/{kind}")), "")


def schema_id(name: str) -> str:
    """The identifier by which payloads and other schemas refer to a schema."""
    return f"urn:edge-asr:schema:{name}:1"


@functools.cache
def schemas() -> Mapping[str, Mapping[str, Any]]:
    """Every shipped JSON Schema (2020-12) by its identifier, those that others build on included."""
    folder = importlib.resources.files("edge_asr").joinpath("schemas")
    files = (file for file in folder.iterdir() if file.name.endswith(".json"))
    found = (json.loads(file.read_text("utf-8")) for file in files)
    return {schema["$id"]: schema for schema in found}


def _heard(utterance: Utterance) -> Data:
    return {
        "utterance_id": utterance.id,
        "source": utterance.source,
        "start": _wall_time(utterance.ended_ns - round(utterance.duration_s * clock.NS_PER_S)),
        "end": _wall_time(utterance.ended_ns),
        "duration_s": round(utterance.duration_s, 3),
        _ENDED: utterance.ended_ns,
    }


def _said(transcript: Transcript, model: str) -> Data:
    return {
        "text": transcript.text,
        "language": transcript.language,
        "emotion": transcript.emotion,
        "event": transcript.event,
        "confidence": _share(transcript.confidence),
        "tokens": [{"text": token.text, "start_s": round(token.start_s, 3)} for token in transcript.tokens],
        "model": model,
    }


def _wanted(command: Command) -> Data:
    return {
        "intent": command.intent,
        "slots": dict(command.slots),
        "units": dict(command.units),
        "words": command.words,
        "confidence": _share(command.confidence),
        "risk": command.risk,
    }


def _read_back(pending: Pending) -> str:
    return f"{pending.command.words}?"


def _share(value: float) -> float:
    return round(value, 4)


def _wall_time(boottime_ns: int) -> str:
    """ISO 8601 of a CLOCK_BOOTTIME reading of this boot, by what the wall clock shows now."""
    return clock.iso(clock.wall_ns() - (clock.boottime_ns() - boottime_ns))

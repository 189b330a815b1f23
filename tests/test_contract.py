"""What leaves the box is what the schemas promise."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from edge_asr import clock, contract, settings
from edge_asr.confirmation import Pending
from edge_asr.contract import Data, Health, Meta, MicrophoneHealth, OutboxHealth, Payload, Renderer, RequestsHealth
from edge_asr.events import Command, Draft, Message, Rejection, Token, Transcript, Utterance, new_id
from tests.payloads import check, validator

ROOT = "acme/hall-2/voice/edge01"
RENDERER = Renderer(ROOT, "edge01")
MODEL = "micro-en"

texts = st.text(st.characters(exclude_categories=["Cs"]))
shares = st.floats(0, 1)
names = st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True)
transcripts = st.builds(
    Transcript,
    text=texts,
    language=st.sampled_from(["zh", "en", "yue", "ja", "ko", "nospeech"]),
    emotion=texts,
    event=texts,
    confidence=shares,
    tokens=st.lists(st.builds(Token, texts, st.floats(0, 30)), max_size=4).map(tuple),
)
commands = st.builds(
    Command,
    intent=st.text("abc_", min_size=1),
    slots=st.dictionaries(
        names, st.one_of(texts, st.integers(-(2**63), 2**63), st.floats(allow_nan=False, allow_infinity=False))
    ),
    confidence=shares,
    risk=st.sampled_from(["normal", "confirm", "two-step"]),
    ttl_s=st.floats(3, 86_400),
    units=st.dictionaries(names, texts, max_size=2),
    words=texts,
)
rejections = st.builds(
    Rejection,
    reason=st.sampled_from(["not-understood", "ambiguous", "language", "too-noisy"]),
    detail=texts,
    confidence=shares,
    candidates=st.lists(texts, max_size=3).map(tuple),
)


def utterance(ended_s_ago: float = 0.5, duration_s: float = 1.5) -> Utterance:
    ended_ns = clock.boottime_ns() - round(ended_s_ago * clock.NS_PER_S)
    return Utterance(new_id(), "microphone", 0, bytes(round(duration_s * 16_000) * 2), ended_ns)


TRANSCRIPT = Transcript("stop line three", "en", "NEUTRAL", "Speech", 0.9, (Token("stop", 0.4),))
COMMAND = Command("stop", {"line": 3}, 0.93, "normal", 10.0, {"line": "m/min"}, "stop line <line>")


def committed(draft: Draft, seq: int = 1) -> Message:
    """As the outbox does."""
    data = json.loads(json.dumps(draft.data))
    now_ns = clock.boottime_ns()
    return Message(
        *(seq, new_id(), clock.boot_id(), draft.topic, draft.category, data),
        *(clock.wall_ns(), now_ns, draft.expires_ns, clock.time_quality()),
    )


def rendered(draft: Draft, life_left_s: float | None = None, renderer: Renderer = RENDERER) -> Payload:
    return renderer.message(committed(draft), replayed=False, life_left_s=life_left_s)


def data_of(payload: Payload) -> Data:
    """The validated data."""
    return dict(check(payload.topic, json.loads(payload.body)))


@given(
    transcript=transcripts,
    command=commands,
    rejection=rejections,
    mode=st.sampled_from(["cloudevents", "plain"]),
    heard=st.booleans(),
)
def test_every_message_validates_against_its_schema(
    *, transcript: Transcript, command: Command, rejection: Rejection, mode: contract.PayloadMode, heard: bool
) -> None:
    renderer = Renderer(ROOT, "edge01", mode)
    drafts = {
        contract.TRANSCRIPT: contract.transcript_draft(utterance(), transcript, model=MODEL),
        contract.COMMAND: contract.command_draft(
            utterance(), transcript, command, model=MODEL, confirmed_ns=clock.boottime_ns() if heard else None
        ),
        contract.PENDING: contract.pending_draft(
            Pending(new_id(), utterance(), transcript, command, 1, clock.boottime_ns()), model=MODEL
        ),
        contract.REJECTED: contract.rejection_draft(utterance(), rejection, transcript if heard else None, model=MODEL),
        contract.ALARM: contract.alarm_draft("disk-full", "The disk is full; free some space.", severity="critical"),
    }
    for topic, draft in drafts.items():
        payload = rendered(draft, command.ttl_s if draft.expires_ns is not None else None, renderer)
        assert payload.topic == f"{ROOT}/{topic}"
        assert data_of(payload).keys() >= {"id", "seq", "boot_id", "device", "time", "time_quality", "replayed"}


@pytest.mark.parametrize("mode", ["cloudevents", "plain"])
def test_every_state_validates_against_its_schema(mode: contract.PayloadMode) -> None:
    microphone = MicrophoneHealth(alive=True, level_dbfs=-30, noise_dbfs=-60, snr_db=30, clipped=0.0, lost_s=0.5)
    unmeasured = MicrophoneHealth(alive=False, level_dbfs=None, noise_dbfs=None, snr_db=None, clipped=0.0, lost_s=0.0)
    states = {
        contract.STATUS: contract.status_data("degraded", "microphone: no audio for 5 s; check its cable"),
        contract.META: contract.meta_data(
            Meta(
                *("0.1.0", MODEL, "0" * 64, ("en",), "onnxruntime", "cpu", "cuda", {"factory.en": "f" * 64}, ("mic",)),
                hotwords=2,
                hotwords_sha256="a" * 64,
                standing=("grammar factory.en", "hotwords"),
            )
        ),
        contract.HEALTH: contract.health_data(
            Health(
                uptime_s=12.5,
                muted=True,
                microphones={"a": microphone, "b": unmeasured},
                outbox=OutboxHealth(3, 1, 2, 0, 2.5, ""),
                receipts={"accepted": 2, "rejected": 1, "missing": 0},
                requests=RequestsHealth(5, 1, 0),
                real_time_factor=None,
                cpu_load=0.2,
                memory_bytes=80_000_000,
                temperature_c=None,
            )
        ),
        contract.PARTIAL: contract.partial_data(utterance(), TRANSCRIPT),
    }
    renderer = Renderer(ROOT, "edge01", mode)
    for topic, state in states.items():
        payload = renderer.state(topic, state)
        assert payload.topic == f"{ROOT}/{topic}"
        assert data_of(payload)["device"] == "edge01"


def test_the_schemas_are_valid_and_closed_under_reference() -> None:
    assert contract.schemas().keys() >= {contract.schema_id(name) for name in contract.TOPICS.values()}
    for schema in contract.schemas().values():
        Draft202012Validator.check_schema(schema)
        references = re.findall(r'"\$ref": "([^"#]+)"', json.dumps(schema))
        assert set(references) <= contract.schemas().keys()


def test_a_payload_that_lacks_a_required_field_or_has_an_undescribed_one_does_not_validate() -> None:
    data = data_of(rendered(contract.transcript_draft(utterance(), TRANSCRIPT, model=MODEL)))
    for name in ("seq", "id", "text", "start", "model", "latency_ms", "time_quality"):
        with pytest.raises(ValidationError):
            validator("transcript").validate({key: value for key, value in data.items() if key != name})
    with pytest.raises(ValidationError):
        validator("transcript").validate({**data, "ended_ns": 5})


def names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from names_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from names_in(inner)


def test_with_the_ignition_example_every_name_at_every_depth_is_a_tag() -> None:
    shipped = Path(__file__).parent.parent / "examples" / "ignition" / "settings.yaml"
    options = settings.load(shipped)
    renderer = Renderer(options.topic_root, options.device, options.mqtt.payload)
    grammars = {"factory.en": "f" * 64, "a & b = 5 %": "0" * 64}
    about = contract.meta_data(
        Meta("0.1.0", MODEL, "0" * 64, ("en",), "onnxruntime", "cpu", "cpu", grammars, (), 0, "0" * 64, ())
    )
    payloads = [renderer.state(contract.META, about)]
    odd = replace(COMMAND, slots={"speed=max": 3, "a.b": "c"}, units={"a.b": "rpm"})
    payloads.append(rendered(contract.command_draft(utterance(), TRANSCRIPT, odd, model=MODEL), 10.0, renderer))
    for payload in payloads:
        found = list(names_in(json.loads(payload.body)))
        assert not [name for name in found if set(".&%=") & set(name)]
        assert payload.topic.startswith("acme/hall-2/voice/press-07/")
    assert "factory_en" in json.loads(payloads[0].body)["grammars"]


def test_no_topic_is_the_parent_of_another_and_no_field_name_breaks_a_scada_tag() -> None:
    for topic in contract.TOPICS:
        assert not any(other.startswith(f"{topic}/") for other in contract.TOPICS)
    for schema in contract.schemas().values():
        assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in schema.get("properties", {}))


@given(texts, st.integers(1, 2**40))
def test_the_cloudevents_sdk_reads_the_envelope(text: str, seq: int) -> None:
    draft = contract.transcript_draft(utterance(), replace(TRANSCRIPT, text=text), model=MODEL)
    message = committed(draft, seq)
    payload = RENDERER.message(message, replayed=True, life_left_s=None)
    assert payload.content_type == JSONFormat().get_content_type()
    event = JSONFormat().read(CloudEvent, payload.body)
    assert (event.get_specversion(), event.get_id(), event.get_source()) == ("1.0", message.id, ROOT)
    assert event.get_type() == "edge-asr.transcript"
    data = event.get_data()
    assert isinstance(data, dict)
    assert (data["text"], data["seq"], data["replayed"]) == (text, seq, True)


def test_plain_mode_sends_the_flat_data_alone() -> None:
    draft = contract.transcript_draft(utterance(), TRANSCRIPT, model=MODEL)
    payload = rendered(draft, renderer=Renderer(ROOT, "edge01", "plain"))
    assert payload.content_type == "application/json"
    assert json.loads(payload.body)["text"] == "stop line three"


def test_start_and_end_are_the_times_of_speech_however_late_it_is_described() -> None:
    before = datetime.now(timezone.utc)
    data = contract.transcript_draft(utterance(ended_s_ago=60, duration_s=2), TRANSCRIPT, model=MODEL).data
    start, end = (datetime.fromisoformat(str(data[key])) for key in ("start", "end"))
    assert end - start == timedelta(seconds=2)
    assert abs((before - end).total_seconds() - 60) < 1


def test_a_step_of_the_wall_clock_moves_times_for_people_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken = utterance()
    year_ns = 365 * 86_400 * clock.NS_PER_S
    right = contract.command_draft(spoken, TRANSCRIPT, COMMAND, model=MODEL)
    wall_ns = clock.wall_ns
    monkeypatch.setattr(clock, "wall_ns", lambda: wall_ns() - year_ns)
    wrong = contract.command_draft(spoken, TRANSCRIPT, COMMAND, model=MODEL)
    assert right.expires_ns == wrong.expires_ns == spoken.ended_ns + 10 * clock.NS_PER_S
    assert str(right.data["end"])[:4] != str(wrong.data["end"])[:4]


def test_latency_runs_from_the_end_of_speech_to_the_commit() -> None:
    message = committed(contract.transcript_draft(utterance(ended_s_ago=3), TRANSCRIPT, model=MODEL))
    message = replace(message, created_ns=message.created_ns + 2 * clock.NS_PER_S)
    data = data_of(RENDERER.message(message, replayed=False, life_left_s=None))
    assert data["latency_ms"] == pytest.approx(5000, abs=500)


@given(st.floats(0, 100))
def test_a_command_leaves_as_one_only_while_a_brokers_whole_seconds_fit_into_its_life(life_s: float) -> None:
    payload = rendered(contract.command_draft(utterance(), TRANSCRIPT, COMMAND, model=MODEL), life_s)
    data_of(payload)
    if life_s >= 2:
        assert payload.topic.endswith("evt/command")
        assert payload.expires_s is not None
        assert 1 <= payload.expires_s <= life_s - 1
    else:
        assert payload.topic.endswith("evt/expired")
        assert payload.expires_s is None


def test_a_command_says_until_when_it_holds_and_how_sure_it_is_of_itself() -> None:
    data = contract.command_draft(utterance(ended_s_ago=0), TRANSCRIPT, COMMAND, model=MODEL).data
    end, expires = (datetime.fromisoformat(str(data[key])) for key in ("end", "expires_at"))
    assert (expires - end).total_seconds() == pytest.approx(10, abs=0.01)
    assert data["confidence"] == 0.93
    assert data["slots"] == {"line": 3}


def test_user_properties_let_a_consumer_sort_without_parsing() -> None:
    message = committed(contract.transcript_draft(utterance(), TRANSCRIPT, model=MODEL), seq=7)
    payload = RENDERER.message(message, replayed=True, life_left_s=None)
    assert dict(payload.user_properties) == {"seq": "7", "replayed": "true", "time_quality": message.time_quality}


def test_a_confirmed_commands_life_begins_with_the_confirmation() -> None:
    now_ns = clock.boottime_ns()
    draft = contract.command_draft(utterance(ended_s_ago=60), TRANSCRIPT, COMMAND, model=MODEL, confirmed_ns=now_ns)
    assert draft.expires_ns == now_ns + 10 * clock.NS_PER_S
    data = data_of(rendered(draft, 9.0))
    assert data["confirmed"] is True
    assert data["latency_ms"] == pytest.approx(0, abs=500)

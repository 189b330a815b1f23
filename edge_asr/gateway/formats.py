"""Writes what was understood of a recording as clients of OpenAI's interface want it, with times since its beginning.

Pure. A segment is an utterance; a word's time is where the model emitted its tokens, a frame of the model long each.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

from edge_asr.events import Json
from edge_asr.posteriors import FRAME_S

KINDS: Final = ("json", "text", "verbose_json", "srt", "vtt")

_LEAST_PROBABILITY: Final = 1e-5

Event = Mapping[str, Json]
"""A transcript as a session is told of it."""


def words_of(event: Event) -> list[Json]:
    """Words with their times, put together from the tokens of a transcript."""
    found: list[dict[str, Json]] = []
    tokens = event["tokens"]
    for token in tokens if isinstance(tokens, list) else []:
        if not isinstance(token, dict):
            continue
        text, start_s = str(token["text"]), round(_seconds(event, "offset_s") + _seconds(token, "start_s"), 3)
        if text.startswith(" ") or not found:
            found.append({"word": text.strip(), "start": start_s, "conf": event["confidence"]})
        else:
            found[-1]["word"] = f"{found[-1]['word']}{text}"
        found[-1]["end"] = round(start_s + FRAME_S, 3)
    return [*found]


def written(kind: str, events: Sequence[Event], whole_s: float, grains: frozenset[str]) -> tuple[str, str]:
    """Text and content type in one of :data:`KINDS`; ``grains``: of what the verbose form shall give the times."""
    text = " ".join(str(event["text"]) for event in events)
    if kind == "json":
        return _json({"text": text}), "application/json"
    if kind == "text":
        return f"{text}\n", "text/plain"
    segments = [_segment(number, event) for number, event in enumerate(events)]
    if kind == "srt":
        cues = [f"{number + 1}\n{_span(segment, ',')}\n{segment['text']}\n" for number, segment in enumerate(segments)]
        return "\n".join(cues), "application/x-subrip"
    if kind == "vtt":
        cues = [f"{_span(segment, '.')}\n{_escaped(str(segment['text']))}\n" for segment in segments]
        return "\n".join(["WEBVTT\n", *cues]), "text/vtt"
    languages = [str(event["language"]) for event in events]
    verbose: dict[str, Json] = {
        "task": "transcribe",
        "language": max(languages, key=languages.count, default="nospeech"),
        "duration": round(whole_s, 3),
        "text": text,
    }
    if "segment" in grains:
        verbose["segments"] = [*segments]
    if "word" in grains:
        verbose["words"] = [
            {key: word[key] for key in ("word", "start", "end")}
            for event in events
            for word in words_of(event)
            if isinstance(word, dict)
        ]
    return _json(verbose), "application/json"


def streamed(events: Sequence[Event]) -> str:
    """What clients get that ask for server-sent events: every utterance, then all of them."""
    texts = [str(event["text"]) for event in events]
    told: list[dict[str, Json]] = [
        {"type": "transcript.text.delta", "delta": f" {text}" if number else text} for number, text in enumerate(texts)
    ]
    told.append({"type": "transcript.text.done", "text": " ".join(texts)})
    return "".join(f"data: {_json(each)}\n\n" for each in told)


def _segment(number: int, event: Event) -> dict[str, Json]:
    """An utterance; what only Whisper's way of decoding has is filled in with what it would be for a plain one."""
    start_s, text = _seconds(event, "offset_s"), str(event["text"])
    encoded = text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": round(start_s, 3),
        "end": round(start_s + _seconds(event, "duration_s"), 3),
        "text": text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": round(math.log(max(_seconds(event, "confidence"), _LEAST_PROBABILITY)), 4),
        "compression_ratio": round(len(encoded) / len(zlib.compress(encoded)), 3),
        "no_speech_prob": 0.0,
    }


def _seconds(event: Event, key: str) -> float:
    value = event.get(key)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _span(segment: Event, point: str) -> str:
    return f"{_time(_seconds(segment, 'start'), point)} --> {_time(_seconds(segment, 'end'), point)}"


def _time(seconds: float, point: str) -> str:
    whole, ms = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{ms:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json(data: Mapping[str, Json]) -> str:
    return json.dumps(data, ensure_ascii=False)

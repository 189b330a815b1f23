"""Recordings of people that may be trained on: a manifest of audio and text, named on the command line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from edge_asr.audio import read_file, to_float
from training.texts import normal, without_digits
from training.voices import Said


def utterances(manifest: Path, without: Collection[str] = ()) -> list[Said]:
    """Of JSON lines ``{audio, text, speaker?}``; speakers ``without`` are left out, to be measured on.

    What `edge-asr recordings export` wrote and nobody has labelled is passed over, and what holds no words: an example
    is somebody who speaks, and noise is learned from the folders of noise. Raises ValueError naming the line that has
    no audio or no text, or a number that nobody says.
    """
    found = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        entry = json.loads(line)
        if entry.get("labelled") is False:
            continue
        if "audio" not in entry or entry.get("text") is None:
            raise ValueError(f"{manifest}: line {number}: expected `audio` and `text`")
        speaker = entry.get("speaker", "somebody")
        try:
            text = normal(without_digits(entry["text"]))
        except ValueError as error:
            raise ValueError(f"{manifest}: line {number}: {error}") from None
        if speaker in without or not text:
            continue
        audio = to_float(read_file(manifest.parent / entry["audio"]))
        peak = float(np.abs(audio).max(initial=1e-6))
        pcm = np.asarray(audio / peak * 0.9 * 32767, np.int16)
        found.append(Said(f"people:{speaker}", "people", text, pcm))
    return found

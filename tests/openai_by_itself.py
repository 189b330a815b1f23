"""A client of OpenAI's interface that is none of ours: the one of its own package; a program of its own.

    python -m tests.openai_by_itself BASE_URL TOKEN RECORDING

Prints what it gets for the recording in every format, and what it makes of refusals.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from openai import APIStatusError, OpenAI


def refused(request: Callable[[], object]) -> dict[str, object]:
    """How the client tells its caller that a request failed."""
    try:
        request()
    except APIStatusError as error:
        return {"error": type(error).__name__, "type": error.type, "body": error.body}
    raise AssertionError("it was not refused")


def main(url: str, token: str, recording: str) -> None:
    client = OpenAI(base_url=url, api_key=token)
    said, create = Path(recording), client.audio.transcriptions.create
    found: dict[str, object] = {
        "json": create(file=said, model="whisper-1").text,
        "verbose": create(
            file=said.open("rb"),
            model="whisper-1",
            language="en",
            prompt="stop",
            temperature=0,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
        ).to_dict(),
        "text": create(file=("said.flac", said.read_bytes()), model="whisper-1", response_format="text"),
        "srt": create(file=said, model="whisper-1", response_format="srt"),
        "vtt": create(file=said, model="whisper-1", response_format="vtt"),
        "stream": [event.to_dict() for event in create(file=said, model="gpt-4o-transcribe", stream=True)],
        "models": [model.to_dict() for model in client.models.list()],
        "stranger": refused(client.with_options(api_key="wrong").models.list),
        "garbage": refused(lambda: create(file=b"no audio", model="whisper-1")),
        "unknown": refused(lambda: create(file=said, model="whisper-1", extra_body={"response_format": "poem"})),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

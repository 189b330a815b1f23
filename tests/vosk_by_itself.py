"""A client of vosk-server that is none of ours: the one of vosk's own package; a program of its own.

    python -m tests.vosk_by_itself URL RECORDING

Prints the utterances that it has collected.
"""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from edge_asr.audio import read_file

sys.modules["srt"] = ModuleType("srt")  # it writes subtitles, and has no wheel

from vosk.transcriber.transcriber import Transcriber  # noqa: E402


async def main(url: str, recording: str) -> None:
    client = Transcriber.__new__(Transcriber)  # its constructor loads a model, which it does not use with a server
    client.args = Namespace(server=url)
    audio = asyncio.StreamReader()  # otherwise FFmpeg's output
    audio.feed_data(read_file(Path(recording)))
    audio.feed_eof()
    result, _ = await client.recognize_stream_server(Namespace(stdout=audio))
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

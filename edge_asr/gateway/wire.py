"""What goes over a session's WebSocket: a few JSON messages and numbered audio; see docs/gateway.md. Pure.

Law: everything a client sends passes :func:`read` or :func:`audio`; what does not fit is one sentence to the client and
the end of the connection, never an exception of another kind.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edge_asr.events import Answer as Kind
from edge_asr.settings import problems

MAX_MESSAGE_BYTES = 64 * 1024
"""Of audio in one message: a third of a second of 96 kHz PCM, or several seconds of Opus."""

MAX_AGE_MS = 7 * 86_400_000
"""The longest that a session may last. Less would make what was said before it younger than it is."""

POSITION = struct.Struct("<I")
"""Before the audio of every binary message: index of its first sample (PCM) or byte (webm, ogg) within the talk."""

Rate = Annotated[int, Field(ge=8000, le=192_000)]
"""Hz."""

Format = Literal["pcm16", "webm", "ogg", "rtp"]
"""rtp: the audio comes by the WebRTC connection of this session, if it does not come here after all."""


class WireError(Exception):
    """What a client sent is not understood; the message is for its programmer."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Hello(_Message):
    """The first message: who speaks."""

    type: Literal["hello"]
    token: Annotated[str, Field(max_length=200)] | None = None
    """Where the HTTP request had no Authorization header: browsers cannot set one."""
    session: Annotated[str, Field(max_length=64)] | None = None
    """To resume: what `ready` said."""
    have: Annotated[int, Field(ge=0)] = 0
    """To resume: number of the last event that arrived."""
    rate: Rate | None = None
    """Of pcm16 whose start does not say its own."""


class Start(_Message):
    """A talk begins, or goes on after a reconnect."""

    type: Literal["start"]
    talk: Annotated[int, Field(ge=1, le=2**31)]
    """Counted by the client; a number that is not higher than the last goes on with that talk."""
    format: Format = "pcm16"
    rate: Rate | None = None
    """Of pcm16; otherwise the hello's, or 16 kHz."""
    age_ms: Annotated[float, Field(ge=0, le=MAX_AGE_MS, allow_inf_nan=False)] = 0.0
    """How long ago its first sample was captured."""


class End(_Message):
    """The talk is over."""

    type: Literal["end"]


class Answer(_Message):
    """A button instead of a spoken yes or no."""

    type: Literal["answer"]
    answer: Kind
    pending_id: Annotated[str, Field(max_length=64)]
    confirmations_left: Annotated[int, Field(ge=0, le=10)] = 1
    """As the question said it: a late or doubled yes confirms nothing that was not asked."""


class Ping(_Message):
    """Answered by `pong`: whether the connection lives."""

    type: Literal["ping"]


Message = Annotated[Hello | Start | End | Answer | Ping, Field(discriminator="type")]
_ADAPTER: TypeAdapter[Hello | Start | End | Answer | Ping] = TypeAdapter(Message)


def read(text: str) -> Hello | Start | End | Answer | Ping:
    """One JSON message. Raises WireError."""
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = problems(error)[0]
        place = ".".join(str(part) for part in first["loc"]) or "message"
        raise WireError(f"{place}: {first['msg'][:200]}") from None


def audio(data: bytes) -> tuple[int, memoryview]:
    """(position, audio) of a binary message. Raises WireError."""
    if len(data) <= POSITION.size:
        raise WireError(f"{len(data)} bytes: expected {POSITION.size} bytes of position, then audio")
    return POSITION.unpack_from(data)[0], memoryview(data)[POSITION.size :]

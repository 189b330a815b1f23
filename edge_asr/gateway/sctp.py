"""Says how much a client may leave unfinished on its data channel: aiortc advertises a window and holds nobody to it.

Law: a call has one data channel; what waits for its other fragments, or for what was sent before it, is no longer than
one message and is in no more pieces than a loop can look through for each. Whoever sends more is hung up on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aiortc import RTCSctpTransport
from aiortc.rtcsctptransport import Chunk

from edge_asr.gateway import wire

WINDOW_BYTES: Final = wire.MAX_MESSAGE_BYTES
MAX_PIECES: Final = 512
"""An honest message has 55; after a packet that was lost, small ones wait."""


def limit(transport: RTCSctpTransport, hang_up: Callable[[str], None]) -> None:
    """Hold the peer of a transport that has not begun yet to this."""
    transport._advertised_rwnd = WINDOW_BYTES  # noqa: SLF001 - it is announced, too
    receive = transport._receive_chunk  # noqa: SLF001
    over = False

    async def within_limits(chunk: Chunk) -> None:
        nonlocal over
        if over:
            return  # the rest of what has come with it
        await receive(chunk)
        excess = _excess(transport)
        if excess:
            over = True
            hang_up(excess)

    transport._receive_chunk = within_limits  # type: ignore[method-assign] # noqa: SLF001


def _excess(transport: RTCSctpTransport) -> str:
    """What there is too much of; empty: nothing."""
    streams = transport._inbound_streams  # noqa: SLF001
    if len(streams) > 1:
        return "it opens a second data channel"
    if transport._advertised_rwnd < 0:  # noqa: SLF001
        return f"it leaves more than {WINDOW_BYTES} bytes of messages unfinished"
    waiting = len(transport._sack_misordered) + sum(len(stream.reassembly) for stream in streams.values())  # noqa: SLF001
    return f"it leaves more than {MAX_PIECES} pieces of messages unfinished" if waiting > MAX_PIECES else ""

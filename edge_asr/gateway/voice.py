"""Turns the packets of a call into the audio of its session's talks.

Law: only what belongs to a talk is decoded, so silence costs little more than taking its packets; of the time before a
talk :data:`BEFORE_S` are kept as they came. A gap up to :data:`QUIET_S` is filled with quiet, so that no lost packet
cuts a sentence in two and no later word comes too early; a longer one is lost audio, and visible as that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import av
import numpy as np
from aiortc.rtcrtpreceiver import StreamStatistics
from aiortc.rtp import RtcpReceiverInfo, RtpPacket, clamp_packets_lost
from numpy.typing import NDArray

from edge_asr.gateway import wire
from edge_asr.gateway.container import OPUS_RATE, opus_decoder
from edge_asr.gateway.rtp import InOrder, later
from edge_asr.gateway.session import Session
from edge_asr.gateway.talk import Talk

BEFORE_S: Final = 0.3
"""A first word begins before the thumb has landed."""

MAX_KEPT: Final = 128
"""Packets of it, however short a sender makes them."""

QUIET_S: Final = 0.5
"""A sender that sends nothing while nobody speaks still sends a packet every 0.4 s."""


class Voice:
    """One sender's packets go in; where no message says when a talk begins, all that comes is one talk."""

    def __init__(self, session: Session, spend: Callable[[float], None]) -> None:
        self._spend = spend
        """Told how many seconds were decoded."""
        self.controlled = False
        """Whether messages begin and end the talks."""
        self._session = session
        self._sender: int | None = None
        """The SSRC from which packets come."""
        self._statistics = StreamStatistics(OPUS_RATE)
        self._in_order: InOrder[RtpPacket] = InOrder()
        self._kept: deque[RtpPacket] = deque(maxlen=MAX_KEPT)
        """Packets that nobody listens to yet."""
        self._talk: Talk | None = None
        """The one for which is being decoded."""
        self._begun: Talk | None = None
        """The one for which what is kept was cut to its length."""
        self._took_at = 0.0
        """When packets came last (seconds of the event loop's time)."""
        self._called = False
        """Whether what is kept will be played in the loop's next turn."""
        session.drain = self._play
        self._decoder = opus_decoder(None)
        self._due: int | None = None
        """The timestamp that follows what was decoded last for it."""

    @property
    def kept_ms(self) -> float:
        """How long ago the oldest audio began that the next talk will have."""
        if not self._kept:
            return 0.0
        return max(0.0, 1e3 * later(self._kept[0].timestamp, self._kept[-1].timestamp) / OPUS_RATE)

    def take(self, packet: RtpPacket) -> None:
        """Take a packet as it comes."""
        self._took_at = asyncio.get_running_loop().time()
        if packet.ssrc != self._sender:  # the first, or it has begun again
            self._sender, self._due = packet.ssrc, None
            self._statistics, self._in_order = StreamStatistics(OPUS_RATE), InOrder()
        self._statistics.add(packet)
        if packet.payload and not self._session.over.is_set():
            for each in self._in_order.take(packet.sequence_number, packet):
                self._hand_over(each)

    def begin(self) -> None:
        """A talk may have begun: what came before and was not read yet is a part of :data:`BEFORE_S`, too."""
        talk = self._session.talk
        if self.controlled and self._heard() and talk is not self._begun:
            self._begun = talk
            self._forget(asyncio.get_running_loop().time() - self._took_at)

    def report(self) -> RtcpReceiverInfo | None:
        """What of the sender's packets has come since the last report (RFC 3550); None: it has sent none."""
        seen = self._statistics
        if self._sender is None or seen.max_seq is None:
            return None
        return RtcpReceiverInfo(
            ssrc=self._sender,
            fraction_lost=seen.fraction_lost,
            packets_lost=clamp_packets_lost(seen.packets_lost),
            highest_sequence=seen.cycles + seen.max_seq,
            jitter=seen.jitter,
            lsr=0,
            dlsr=0,
        )

    def _hand_over(self, packet: RtpPacket) -> None:
        self._kept.append(packet)
        if not self._heard():
            if self.controlled:
                self._forget()
                return
            talk = self._session.talk
            self._session.begin(wire.Start(type="start", talk=talk.number + 1 if talk else 1, format="rtp"))
        if not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._play)

    def _heard(self) -> bool:
        return self._session.talking and self._session.format == "rtp"

    def _forget(self, unread_s: float = 0.0) -> None:
        while self.kept_ms > 1e3 * max(0.0, BEFORE_S - unread_s):
            self._kept.popleft()

    def _play(self) -> None:
        """Decode what has come together for the talk, and hand it over in one piece unless there is a gap in it."""
        self._called = False
        if not self._heard():
            return
        if self._talk is not self._session.talk:
            self._talk, self._decoder, self._due = self._session.talk, opus_decoder(None), None
        pieces: list[NDArray[np.float32]] = []
        lost = 0
        while self._kept:
            missing, samples = self._decoded(self._kept.popleft())
            if missing > QUIET_S * OPUS_RATE:
                self._offer(pieces, lost)
                pieces, lost = [], missing
            elif missing:
                pieces.append(np.zeros(missing, np.float32))
            pieces.append(samples)
        self._offer(pieces, lost)

    def _offer(self, pieces: list[NDArray[np.float32]], lost: int) -> None:
        if pieces:
            self._session.offer(np.concatenate(pieces), lost)

    def _decoded(self, packet: RtpPacket) -> tuple[int, NDArray[np.float32]]:
        """(samples missing before it, its own); a packet that is damaged is as good as lost."""
        try:
            (frame,) = self._decoder.decode(av.Packet(packet.payload))
        except (av.FFmpegError, ValueError):
            return 0, np.zeros(0, np.float32)
        self._spend(frame.samples / OPUS_RATE)
        missing = 0 if self._due is None else max(0, later(self._due, packet.timestamp))
        self._due = packet.timestamp + frame.samples
        return missing, np.frombuffer(memoryview(frame.planes[0]), np.float32, frame.samples)

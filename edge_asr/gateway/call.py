"""Carries a session's audio by WebRTC, and its events on a data channel; `whip` is how such a call is set up.

Law: one audio track, Opus, nothing sent back but events on the client's data channel; no STUN or TURN server is asked
unless the settings name one. What was offered wrongly is an OfferError, whatever aiortc makes of it. A peer from which
neither audio nor a message comes for :data:`DEAD_S` is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

import numpy as np
from aiortc import RTCConfiguration, RTCDataChannel, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.sdp import candidate_from_sdp
from av import AudioFrame as Decoded
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from edge_asr.gateway import wire
from edge_asr.gateway.container import OPUS_RATE
from edge_asr.gateway.session import BusyError, Event, Session

log = logging.getLogger(__name__)

MAX_SDP_BYTES: Final = 32 * 1024
MAX_CANDIDATES: Final = 64
ANSWER_S: Final = 10.0
BITS_PER_S: Final = 64_000
DEAD_S: Final = 9.0
"""Looked at once a second, so noticed within 10 s."""
BEFORE_S: Final = 0.3
"""Audio from before a talk's start that belongs to it: a first word begins before the thumb has landed."""

MAX_BUFFERED_BYTES: Final = 1_000_000
"""Events that wait for a client which does not take them; then it is cut off."""


class OfferError(Exception):
    """An offer or candidate that cannot be taken; one line."""


class Call:
    """One WebRTC connection of a session."""

    def __init__(
        self, session: Session, ice_servers: list[RTCIceServer], announce: str | None, *, owns_session: bool
    ) -> None:
        self.session = session
        self._owns_session = owns_session
        """Whether the session ends with this call; otherwise a WebSocket carries it."""
        self._announce = announce
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=ice_servers))
        self._peer.on("track", self._on_track)
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("connectionstatechange", self._on_state)
        self._mono = AudioResampler("s16", "mono", OPUS_RATE)
        self._recent: deque[NDArray[np.int16]] = deque()
        self._heard_at = asyncio.get_running_loop().time()
        self._channel: RTCDataChannel | None = None
        self._controlled = False
        """Whether messages say when a talk begins; otherwise all that comes is one talk."""
        self._candidates = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.etag = ""
        """Of the ICE session."""
        self.ended = asyncio.Event()

    async def answer(self, offer: str, *, controlled: bool) -> str:
        """The answer to an SDP offer. Raises OfferError, BusyError."""
        _check(offer)
        self._controlled = controlled or "m=application" in offer
        try:
            await asyncio.wait_for(self._negotiate(offer), ANSWER_S)
        except Exception as error:  # noqa: BLE001 - aiortc raises what its parser happens to stumble over
            await self.close()
            raise OfferError(f"this offer cannot be answered ({type(error).__name__}: {error})"[:200]) from None
        answer = self._peer.localDescription.sdp
        if "\na=candidate:" not in answer:
            await self.close()
            raise BusyError("no UDP port is free for another call; try again later")
        found = re.search(r"^a=ice-ufrag:(\S+)", answer, re.MULTILINE)
        self.etag = f'"{found[1] if found else ""}"'
        self._start(self._watch(), "watch")
        return _announced(_wide(answer), self._announce)

    async def trickle(self, fragment: str) -> None:
        """Take the candidates of a trickle-ICE fragment. Raises OfferError."""
        mid = "0"
        for line in fragment.splitlines():
            name, _, value = line.partition(":")
            if name == "a=mid":
                mid = value.strip()
            elif name == "a=candidate":
                self._candidates += 1
                if self._candidates > MAX_CANDIDATES:
                    raise OfferError(f"more than {MAX_CANDIDATES} candidates")
                try:
                    candidate = candidate_from_sdp(value)
                    candidate.sdpMid = mid
                    await self._peer.addIceCandidate(candidate)
                except (ValueError, AssertionError, IndexError, KeyError, AttributeError):
                    raise OfferError(f"no candidate: {value[:100]}") from None

    async def close(self) -> None:
        """Hang up."""
        if self.ended.is_set():
            return
        self.ended.set()
        self.session.detach(self)
        if self._owns_session:
            self.session.close()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        await self._peer.close()

    def send(self, event: Event) -> None:
        """Send an event on the data channel."""
        if self._channel is None or self._channel.readyState != "open":
            return
        if self._channel.bufferedAmount > MAX_BUFFERED_BYTES:
            self.cut("the client does not read")
            return
        self._channel.send(json.dumps(event, ensure_ascii=False, separators=(",", ":")))

    def cut(self, reason: str) -> None:
        """Hang up soon."""
        log.info("%s: the call ends: %s", self.session.source, reason)
        self._start(self.close(), "close")

    async def _negotiate(self, offer: str) -> None:
        await self._peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        await self._peer.setLocalDescription(await self._peer.createAnswer())

    def _on_track(self, track: MediaStreamTrack) -> None:
        self._start(self._pump(track), "audio")

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None:
            return
        self._channel = channel
        channel.on("message", self._on_message)
        session = self.session
        self.send({"type": "ready", "session": session.id, "source": session.source, "resumed": False})
        session.attach(self, 0)

    def _on_state(self) -> None:
        if self._peer.connectionState in {"failed", "closed"}:
            self.cut(self._peer.connectionState)

    def _on_message(self, text: str | bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        try:
            order = wire.read(text if isinstance(text, str) else "")
            if isinstance(order, wire.Start):
                age_ms = 1e3 * sum(map(len, self._recent)) / OPUS_RATE
                self.session.begin(order.model_copy(update={"format": "rtp", "age_ms": age_ms}))
            elif isinstance(order, wire.End):
                self.session.finish_soon()
            elif isinstance(order, wire.Ping):
                self.send({"type": "pong"})
        except (wire.WireError, BusyError) as error:
            self.send({"type": "error", "detail": str(error)})

    async def _pump(self, track: MediaStreamTrack) -> None:
        """Hand the track's audio over; what belongs to no talk is forgotten."""
        try:
            while True:
                decoded = await track.recv()
                self._heard_at = asyncio.get_running_loop().time()
                if isinstance(decoded, Decoded):
                    for frame in self._mono.resample(decoded):
                        self._take(frame.to_ndarray().reshape(-1).astype(np.int16, copy=False))
        except MediaStreamError:
            self.session.finish()

    def _take(self, samples: NDArray[np.int16]) -> None:
        talk = self.session.talk
        if talk is not None and not talk.ended and self.session.format == "rtp":
            for each in (*self._recent, samples):
                self.session.offer(each)
            self._recent.clear()
            return
        if not self._controlled:
            self.session.begin(wire.Start(type="start", talk=talk.number + 1 if talk else 1, format="rtp"))
            self.session.offer(samples)
            return
        self._recent.append(samples)
        while sum(map(len, self._recent)) > BEFORE_S * OPUS_RATE:
            self._recent.popleft()

    async def _watch(self) -> None:
        """Hang up on a peer that has gone without a word, and with the session."""
        while not self.session.over.is_set():
            await asyncio.sleep(1.0)
            if asyncio.get_running_loop().time() - self._heard_at > DEAD_S:
                log.info("%s: nothing came for %g s", self.session.source, DEAD_S)
                break
        await self.close()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name}:{self.session.source}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check(offer: str) -> None:
    """What a WHIP offer must look like before aiortc sees it."""
    if not offer.startswith("v=0"):
        raise OfferError("this is no SDP")
    kinds = re.findall(r"^m=(\S+)", offer, re.MULTILINE)
    if kinds.count("audio") != 1 or len(kinds) > 2 or set(kinds) - {"audio", "application"}:
        offered = " ".join(kinds)[:80] or "nothing"
        raise OfferError(f"expected one audio track and perhaps a data channel, not {offered}")
    if re.search(r"^a=(recvonly|inactive)\s*$", offer, re.MULTILINE):
        raise OfferError("the audio must be sent to us: a=sendonly")


def _wide(answer: str) -> str:
    """The answer that asks for twice the bits which browsers spend on speech: it is a machine that listens."""
    wish = f"maxaveragebitrate={BITS_PER_S};stereo=0;useinbandfec=1"
    return re.sub(r"^(a=rtpmap:(\d+) opus/48000/2\r?\n)", rf"\1a=fmtp:\2 {wish}\r\n", answer, flags=re.MULTILINE)


def _announced(answer: str, address: str | None) -> str:
    """The answer with the address under which the other side can reach us, behind a port mapping."""
    if address is None:
        return answer
    return re.sub(r"^(a=candidate:(?:\S+ ){4})\S+( \d+ typ host)", rf"\g<1>{address}\g<2>", answer, flags=re.MULTILINE)

"""Carries a session's audio by WebRTC, and its events on a data channel; `whip` is how such a call is set up.

Law: one audio track, Opus, nothing sent back but events on the client's data channel; no STUN or TURN server is asked
unless the settings name one, and nobody for the address behind a name. What was offered wrongly is an OfferError,
whatever aiortc makes of it. A peer from which neither audio nor a message comes for :data:`DEAD_S` is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import re
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Final

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCDtlsTransport,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpReceiver,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.rtp import RtcpRrPacket, RtpPacket
from aiortc.sdp import candidate_from_sdp

from edge_asr.gateway import dtls, sctp, wire
from edge_asr.gateway.ice import Datagrams
from edge_asr.gateway.rounds import Rounds
from edge_asr.gateway.rtp import MAX_SENDERS, PACE, PACKET_S, Allowance
from edge_asr.gateway.session import TAIL_S, BusyError, Event, Session
from edge_asr.gateway.voice import Voice

log = logging.getLogger(__name__)

MAX_SDP_BYTES: Final = 32 * 1024
MAX_CANDIDATES: Final = 64
ANSWER_S: Final = 10.0
BITS_PER_S: Final = 64_000
"""It is a machine that listens."""

PACKET_MS: Final = 40
"""Asked for: what silence costs is waking up for packets, and by themselves browsers send one every 20 ms."""
DEAD_S: Final = 8.5
"""Looked at once a second, so noticed within 10 s."""

MAX_BUFFERED_BYTES: Final = 1_000_000
"""Events that wait for a client which does not take them; then it is cut off."""

_OTHER_LINE_END: Final = re.compile("\r(?!\n)|[\v\f\x1c-\x1e\x85\u2028\u2029]")
"""aiortc begins a line after these, too: it would see others than we do."""


class OfferError(Exception):
    """An offer or candidate that cannot be taken; one line."""

    def __init__(self, reason: str, *, malformed: bool = True) -> None:
        super().__init__(reason)
        self.malformed = malformed
        """Whether it is none at all; otherwise what it asks for is not to be had here."""


class Call:
    """One WebRTC connection of a session."""

    def __init__(
        self,
        session: Session,
        ice_servers: list[RTCIceServer],
        announce: str | None,
        decide: Callable[[Session, wire.Answer], Coroutine[Any, Any, None]],
        rounds_of: Callable[[Session], Rounds | None],
        *,
        owns_session: bool,
    ) -> None:
        self.session = session
        self._decide = decide
        """Takes a yes or no to a question of the session."""
        self._rounds_of = rounds_of
        self._owns_session = owns_session
        """Whether the session ends with this call; otherwise a WebSocket carries it."""
        self._announce = announce
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=ice_servers))
        dtls.shake_hands_without_callback(self._peer)
        self._receiver = self._take_packets_of(self._peer)
        self._peer.on("track", self._on_track)
        self._peer.on("datachannel", self._on_channel)
        self._peer.on("connectionstatechange", self._on_state)
        self._voice = Voice(session, self._spend)
        self._allowance = Allowance()
        self._ssrc = secrets.randbits(32)
        """Of our reports."""
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._channel: RTCDataChannel | None = None
        self._candidates = 0
        self._has_channel = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        """Whether it is about to end."""
        self.etag = ""
        """Of the ICE session."""
        self.ended = asyncio.Event()

    async def answer(self, offer: str, *, controlled: bool) -> str:
        """The answer to an SDP offer that has passed :func:`check`. Raises OfferError, BusyError."""
        self._has_channel = "m=application" in offer
        self._voice.controlled = controlled or self._has_channel
        try:
            await asyncio.wait_for(self._negotiate(_with_usable_candidates(offer)), ANSWER_S)
        except Exception as error:  # noqa: BLE001 - aiortc raises what its parser happens to stumble over
            await self.close()
            raise OfferError(f"this offer cannot be answered ({type(error).__name__}: {error})"[:200]) from None
        answer = self._peer.localDescription.sdp
        if "\na=candidate:" not in answer:
            await self.close()
            raise BusyError("no UDP port is free for a call, or this machine has no address but 127.0.0.1")
        found = re.search(r"^a=ice-ufrag:(\S+)", answer, re.MULTILINE)
        self.etag = found[1] if found else ""
        if self._owns_session:
            self.session.attach(self, 0)  # also without a channel, by which to tell it anything
        self._start(self._watch(), "watch")
        self.session.watchers.add(self._rest)
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
                    if _is_usable(candidate.protocol, candidate.ip):
                        await self._peer.addIceCandidate(candidate)
                except (ValueError, AssertionError, IndexError, KeyError, AttributeError):
                    raise OfferError(f"no candidate: {value[:100]}") from None

    async def hang_up(self) -> None:
        """End as the client asks for it: what it said is whole."""
        if self._owns_session:
            self.session.finish_soon()
            await asyncio.sleep(TAIL_S)
        await self.close()

    async def close(self) -> None:
        """Be done with it; a talk under way is cut off."""
        if self.ended.is_set():
            return
        self.ended.set()
        self.session.detach(self)
        self.session.watchers.discard(self._rest)
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
        if self._cut:
            return
        self._cut = True
        log.info("%s: the call ends: %s", self.session.source, reason)
        self._start(self.close(), "close")

    async def _negotiate(self, offer: str) -> None:
        await self._peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        transports = {self._receiver.transport}
        if self._peer.sctp is not None:
            sctp.limit(self._peer.sctp, self.cut)
            transports.add(self._peer.sctp.transport)  # the same one, unless the offer has no BUNDLE
        for transport in transports:
            self._count_packets_of(transport)
        await self._peer.setLocalDescription(await self._peer.createAnswer())

    def _take_packets_of(self, peer: RTCPeerConnection) -> RTCRtpReceiver:
        """Have the packets of the one audio track come here, and no codec but Opus be negotiated."""
        transceiver = peer.addTransceiver("audio", "recvonly")
        known = RTCRtpReceiver.getCapabilities("audio")
        opus = [codec for codec in known.codecs if codec.mimeType == "audio/opus"] if known else []
        transceiver.setCodecPreferences(opus)
        transceiver.receiver._handle_rtp_packet = self._on_packet  # type: ignore[method-assign] # noqa: SLF001
        return transceiver.receiver

    def _count_packets_of(self, transport: RTCDtlsTransport) -> None:
        """Look at all packets, also at those that aiortc passes on to nobody: SRTP remembers who has sent them."""
        take, take_report = transport._handle_rtp_data, transport._handle_rtcp_data  # noqa: SLF001

        async def counted(data: bytes, arrival_time_ms: int) -> None:
            if self._admits(data[8:12]):
                await take(data, arrival_time_ms)

        async def counted_report(data: bytes) -> None:
            if self._admits(data[4:8]):
                await take_report(data)

        transport._handle_rtp_data = counted  # type: ignore[method-assign] # noqa: SLF001
        transport._handle_rtcp_data = counted_report  # type: ignore[method-assign] # noqa: SLF001

    def _admits(self, sender: bytes) -> bool:
        """Whether a packet of this SSRC may come now; otherwise it is the last one."""
        if not self._allowance.admits(sender):
            self.cut(f"it has more than {MAX_SENDERS} senders")
        else:
            self._spend(PACKET_S)
        return not self._cut

    def _spend(self, audio_s: float) -> None:
        if not self._allowance.spend(audio_s, self._loop.time()):
            self.cut(f"it sends more than {PACE:g} times as fast as one speaks")

    def _on_track(self, track: MediaStreamTrack) -> None:
        self._start(self._until_its_end(track), "audio")

    def _on_channel(self, channel: RTCDataChannel) -> None:
        if self._channel is not None:
            return
        self._channel = channel
        self._rest()
        channel.on("message", self._on_message)
        session = self.session
        self.send({"type": "ready", "session": session.id, "source": session.source, "resumed": False})
        session.attach(self, 0)

    def _on_state(self) -> None:
        if self._peer.connectionState in {"failed", "closed"}:
            self.cut(self._peer.connectionState)
        self._rest()

    def _rest(self) -> None:
        """Nothing that comes once the call stands is urgent, unless somebody speaks or is asked."""
        self._voice.begin()
        stands = self._peer.connectionState == "connected" and (self._channel is not None or not self._has_channel)
        rounds = self._rounds_of(self.session) if stands else None
        ice = self._receiver.transport.transport._connection  # noqa: SLF001 - its sockets are nowhere else
        for protocol in ice._protocols:  # noqa: SLF001
            if isinstance(protocol.transport, Datagrams):  # not those by TURN
                protocol.transport.rest(rounds)

    def _on_message(self, text: str | bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            order = wire.read(text if isinstance(text, str) else "")
            if isinstance(order, wire.Start):
                self.session.begin(order.model_copy(update={"format": "rtp", "age_ms": self._voice.kept_ms}))
            elif isinstance(order, wire.End):
                self.session.finish_soon()
            elif isinstance(order, wire.Answer):
                self._start(self._decide(self.session, order), "answer")
            elif isinstance(order, wire.Ping):
                self.send({"type": "pong"})
        except wire.WireError as error:
            self.session.complain("misunderstood", str(error))
        except BusyError as error:
            self.session.complain("busy", str(error))

    async def _until_its_end(self, track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            await track.recv()
        if self._owns_session:  # otherwise the talk goes on by the WebSocket
            self.session.finish(torn=True)

    async def _on_packet(self, packet: RtpPacket, arrival_time_ms: int) -> None:  # noqa: ARG002 - aiortc's signature
        """Stands in for the receiver's own jitter buffer and decoder thread: three quarters of what silence cost."""
        self._heard_at = self._loop.time()
        self._voice.take(packet)

    async def _watch(self) -> None:
        """Hang up on a peer that has gone without a word, and with the session."""
        while not self.session.over.is_set():
            await asyncio.sleep(1.0)
            if self._loop.time() - self._heard_at > DEAD_S:
                log.info("%s: nothing came for %g s", self.session.source, DEAD_S)
                break
            await self._report()
        await self.close()

    async def _report(self) -> None:
        """Tell the sender what of its packets has come."""
        report = self._voice.report()
        if report is not None:
            packet = RtcpRrPacket(ssrc=self._ssrc, reports=[report])
            await self._receiver._send_rtcp(packet)  # noqa: SLF001 - aiortc reports what its own jitter buffer saw

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name}:{self.session.source}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def check(offer: str) -> None:
    """What a WHIP offer must look like before aiortc sees it. Raises OfferError."""
    if _OTHER_LINE_END.search(offer):
        raise OfferError("the lines of an SDP end with CRLF or LF, and with nothing else")
    kinds = re.findall(r"^m=(\S+)", offer, re.MULTILINE)
    if not offer.startswith("v=0") or not kinds:
        raise OfferError("this is no SDP of an offer")
    if kinds.count("audio") != 1 or len(kinds) > 2 or set(kinds) - {"audio", "application"}:
        expected = "expected one audio track and perhaps a data channel"
        raise OfferError(f"{expected}, not {' '.join(kinds)[:80]}", malformed=False)
    if re.search(r"^a=(recvonly|inactive)\s*$", offer, re.MULTILINE):
        raise OfferError("the audio must be sent to us: a=sendonly", malformed=False)
    if not re.search(r"^a=rtpmap:\d+ opus/48000/2\s*$", offer, re.MULTILINE | re.IGNORECASE):
        raise OfferError("the audio must be Opus: a=rtpmap:111 opus/48000/2", malformed=False)
    if offer.count("\na=candidate:") > MAX_CANDIDATES:
        raise OfferError(f"more than {MAX_CANDIDATES} candidates")


def _is_usable(protocol: str, address: str) -> bool:
    """Whether a candidate is one to try; RFC 9725 wants others passed over in silence.

    Names are: aioice would ask the whole network for them, a second each, and their owner finds us anyway.
    """
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return protocol.lower() == "udp"


def _with_usable_candidates(offer: str) -> str:
    """The offer without the others, and then without the word that more will not come."""
    lines = offer.splitlines(keepends=True)
    kept = [line for line in lines if not _is_useless(line)]
    if len(kept) == len(lines):
        return offer
    return "".join(line for line in kept if line.strip() != "a=end-of-candidates")


def _is_useless(line: str) -> bool:
    """Whether this is a candidate, as aiortc reads it, and none to try."""
    name, _, value = line.partition(":")
    words = value.split()
    return name == "a=candidate" and len(words) > 4 and not _is_usable(words[2], words[4])


def _wide(answer: str) -> str:
    """The answer that asks browsers for twice the bits which they spend on speech, in half the packets."""
    wish = f"maxaveragebitrate={BITS_PER_S};stereo=0;useinbandfec=1"
    lines = rf"\1a=fmtp:\2 {wish}\r\na=ptime:{PACKET_MS}\r\n"
    return re.sub(r"^(a=rtpmap:(\d+) opus/48000/2\r?\n)", lines, answer, flags=re.MULTILINE)


def _announced(answer: str, address: str | None) -> str:
    """The answer with the address under which the other side can reach us, behind a port mapping."""
    if address is None:
        return answer
    return re.sub(r"^(a=candidate:(?:\S+ ){4})\S+( \d+ typ host)", rf"\g<1>{address}\g<2>", answer, flags=re.MULTILINE)

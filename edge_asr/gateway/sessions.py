"""Everybody's sessions: who may open one, who comes back to one, and when one has lasted long enough.

Law: new sessions are refused before a talk of anybody suffers; who resumes is no new one. A station has one name in
every payload, and no source and no other token has it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from edge_asr import contract, settings
from edge_asr.confirmation import ConfirmationError
from edge_asr.events import SAMPLE_RATE, Json, Utterance
from edge_asr.gateway import wire
from edge_asr.gateway.addresses import counted, full, plain
from edge_asr.gateway.rounds import WAITING_ROUND_S, Rounds
from edge_asr.gateway.session import BusyError, Event, Session
from edge_asr.gateway.tokens import LOCAL, Station, Tokens
from edge_asr.pipeline import Pipeline

log = logging.getLogger(__name__)

UPLOAD = "upload"
"""The kind of a session that brings a recording, which has time."""

SWEEP_S = 1.0
REPORT_S = 0.5


@dataclass
class Sessions:
    """All of them, and who may open another."""

    options: settings.Gateway
    tokens: Tokens
    pipeline: Pipeline
    status: Event = field(default_factory=dict)
    """What every session is told when it begins, and when it changes."""
    _rounds: Rounds = field(default_factory=Rounds)
    _waiting_rounds: Rounds = field(default_factory=lambda: Rounds(WAITING_ROUND_S))
    _running: dict[str, tuple[Session, asyncio.Task[None]]] = field(default_factory=dict)
    """Source -> its session."""

    def __iter__(self) -> Iterator[Session]:
        """Those that are open."""
        return iter([session for session, _ in self._running.values()])

    def check_room(self, address: str, kind: str) -> None:
        """Raise BusyError where nobody from this address can be let in now."""
        self.check_time(kind)
        if len(self._running) >= self.options.max_sessions:
            raise BusyError(f"all {self.options.max_sessions} sessions are taken; try again later")
        who, limit = counted(address), self.options.max_sessions_per_address
        taken = Counter(each for session in self for each in counted(session.address))
        crowd = full(who, taken, limit)
        if crowd is not None:
            raise BusyError(f"{who[crowd] * limit} sessions are open from {crowd} already")

    def check_time(self, kind: str) -> None:
        """Raise BusyError where the recognizer has no time for this; an upload is no further speaker."""
        if self.overloaded:
            raise BusyError("the recognizer is behind; try again in a moment")
        if kind != UPLOAD and self.pipeline.is_busy:
            raise BusyError("the recognizer has no time left for another speaker; try again later")

    def open(self, station: Station, address: str, kind: str) -> Session:
        """Let a station in. Raises BusyError."""
        self.check_room(address, kind)
        of_station = [session for session in self if session.station == station and not session.over.is_set()]
        if len(of_station) >= self.options.max_sessions_per_token:
            deserted = next((session for session in of_station if not session.attached), None)
            if deserted is None:
                raise BusyError(f"{station.name} has {len(of_station)} sessions open already")
            deserted.close()  # its client is here, and does not resume it
        session = Session(self._free_name(station), station, plain(address))
        session.kind = kind
        session.stopping = lambda: self.pipeline.closing
        task = asyncio.create_task(self._run(session), name=f"session:{session.source}")
        self._running[session.source] = session, task
        log.info("%s: session opened by %s from %s", session.source, kind, session.address)
        return session

    def resume(self, session_id: str, station: Station) -> Session | None:
        """The session of this id if it is this station's and not over."""
        found = (each for each in self if secrets.compare_digest(each.id.encode(), session_id.encode()))
        return next((each for each in found if each.station == station and not each.over.is_set()), None)

    @property
    def overloaded(self) -> bool:
        """Whether the recognizer is so far behind that nobody new should come."""
        return self.pipeline.is_late

    async def answer(self, session: Session, answer: wire.Answer) -> None:
        """A button says yes or no to a question of its own session."""
        try:
            if answer.pending_id not in self._asked(session):
                session.complain("answered", "that question is not open any more")
            elif answer.answer == "confirm":
                await self.pipeline.confirm(answer.pending_id, answer.confirmations_left, "")
            else:
                await self.pipeline.cancel(answer.pending_id)
        except ConfirmationError as error:
            session.complain("answered", str(error))

    def understood(self, utterance: Utterance) -> None:
        """Note where in its talk an utterance began, for what is told of it next."""
        found = self._running.get(utterance.source)
        if found is not None:
            found[0].place = utterance.id, round(utterance.start / SAMPLE_RATE, 3)

    def rounds_of(self, session: Session) -> Rounds | None:
        """In which what comes for a session is read; None: at once."""
        if session.attentive:
            return None
        return self._rounds if session.talking else self._waiting_rounds

    def turned(self, source: str, *, speaking: bool) -> None:
        """Somebody begins or ends to speak."""
        found = self._running.get(source)
        if found is not None:
            found[0].meter = self.pipeline.ears[source].meter
            found[0].turned(speaking=speaking)

    def told(self, kind: str, data: Mapping[str, Json]) -> None:
        """Pass what was committed on to the session that said it."""
        session = self._of(data)
        if session is not None:
            utterance_id, offset_s = session.place
            here = data.get("utterance_id") == utterance_id
            session.tell(kind, {**data, "offset_s": offset_s} if here else data)
            session.ask(asked=bool(self._asked(session)))

    def live(self, topic: str, data: Mapping[str, Json]) -> None:
        """Pass a partial on to the session that speaks."""
        session = self._of(data)
        if session is not None and topic == contract.PARTIAL:
            session.tell("transcribing", data, keep=False)

    async def report(self, broker: Callable[[], str]) -> None:
        """Tell every session how the broker and the recognizer stand, whenever that changes; never returns."""
        busy = False
        while True:
            if self.status.get("broker") != broker():
                self.status = {"broker": broker()}
                for session in self:
                    session.tell("status", self.status, keep=False)
            if busy != self.overloaded:
                busy = not busy
                for session in self:
                    if busy:
                        session.tell("overloaded", {}, keep=False)
            await asyncio.sleep(REPORT_S)

    async def sweep(self) -> None:
        """End what has been silent, or open, for too long, and what belongs to a revoked token; never returns."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = asyncio.get_running_loop().time()
            for session in self:
                reason, detail = _why_over(session, self.options, now)
                if not reason and not self.admitted(session.station):
                    reason, detail = "revoked", "its token was revoked"
                elif not reason and session.source in self.tokens.names_of_others(session.station):
                    reason, detail = "old", f"another token is called {session.source} now"
                if reason and not session.over.is_set():
                    log.info("%s: session ended: %s", session.source, detail)
                    session.complain(reason, detail)
                    session.close()

    async def close(self) -> None:
        """End all of them and wait until what they said is committed."""
        for session in self:
            session.close()
        await asyncio.gather(*(task for _, task in self._running.values()))

    def admitted(self, station: Station) -> bool:
        """Whether a station may still be here: by its token, or because this gateway is open to its own machine."""
        return station is LOCAL or self.tokens.holds(station)

    def _free_name(self, station: Station) -> str:
        """The station's name or the first with a number that means nobody else: grammars trust it (``stations:``)."""
        taken = {*self._running, *self.pipeline.ears, *self.tokens.names_of_others(station)}
        names = itertools.chain([station.name], (f"{station.name}_{count}" for count in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        if name != station.name and station.name not in self._running:
            log.warning("%s: a source or a token has this name already; this session is called %s", station.name, name)
        return name

    async def _run(self, session: Session) -> None:
        try:
            await session.run(self.pipeline.hear)
        except Exception:
            log.exception("%s: the session failed", session.source)
            session.complain("failed", "the session failed; the log knows more")
        finally:
            session.close()  # its talk as well, or a demuxer would wait for ever
            del self._running[session.source]
            log.info("%s: session closed", session.source)

    def _asked(self, session: Session) -> set[str]:
        """The ids of the questions to a session that are open."""
        return {each.id for each in self.pipeline.pending if each.utterance.source == session.source}

    def _of(self, data: Mapping[str, Json]) -> Session | None:
        found = self._running.get(str(data.get("source")))
        return found[0] if found else None


def _why_over(session: Session, options: settings.Gateway, now: float) -> tuple[str, str]:
    """(reason, detail) why a session has lasted long enough; empty: it may go on."""
    if not session.attached and now - session.active > options.resume_s:
        return "gone", "the connection is gone"
    if now - session.opened > options.max_session_s:
        return "old", f"{options.max_session_s:g} s are the longest a session may last"
    talking = session.kind == UPLOAD or session.talking  # or still on its way
    if not talking and now - session.active > options.idle_s:
        return "idle", f"nobody spoke for {options.idle_s:g} s"
    return "", ""

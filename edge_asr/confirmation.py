"""Holds risky commands until somebody says yes: per source at most one command is pending.

Law: pure; time comes in as CLOCK_BOOTTIME nanoseconds. A pending command becomes a command only by the confirmation
that follows it from the same source within the window (twice for risk ``two-step``), or by one that names it
(``req/confirm``). A command that wants a role is held whatever its risk, and a voice has no role. Everything else the
source says cancels it, and so does time. Noise in which nobody spoke changes nothing. A confirmed command's life begins
when it is confirmed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edge_asr.clock import NS_PER_S
from edge_asr.events import Command, Confirmer, Rejection, Transcript, Utterance, derived_id

_STEPS: Mapping[str, int] = {"normal": 0, "confirm": 1, "two-step": 2}

_QUESTION = -1
"""Index of a question's id among those that come of its utterance, whose messages count from 0."""


class ConfirmationError(Exception):
    """The question cannot be answered so; ``reason`` is for programs."""

    def __init__(self, reason: Literal["not-pending", "not-allowed"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Pending:
    """A command that waits for a yes."""

    id: str
    utterance: Utterance
    transcript: Transcript
    command: Command
    steps_left: int
    """Confirmations still wanted."""
    until_ns: int
    """CLOCK_BOOTTIME at which it is cancelled."""

    @property
    def asked_again(self) -> bool:
        """Whether a first confirmation was given and another is wanted."""
        return self.steps_left < _steps(self.command)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A pending command that became one."""

    pending: Pending
    at_ns: int
    """CLOCK_BOOTTIME of the confirmation."""
    by: Confirmer


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A pending command that did not."""

    pending: Pending
    rejection: Rejection


@dataclass(frozen=True, slots=True)
class Immediate:
    """A decision that needs nobody's yes."""

    utterance: Utterance
    transcript: Transcript | None
    decision: Command | Rejection | None


Outcome = Pending | Confirmed | Cancelled | Immediate


class ConfirmationDesk:
    """Every source's pending command."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._pending: dict[str, Pending] = {}

    def judge(
        self, utterance: Utterance, transcript: Transcript | None, decision: Command | Rejection | None
    ) -> list[Outcome]:
        """What follows from the next thing a source says, in order."""
        others = self._pending.keys() - {utterance.source}  # of them it says nothing
        outcomes: list[Outcome] = list(self.expire(utterance.ended_ns, unheard=others))
        waiting = self._pending.get(utterance.source)
        answer = decision.answer if isinstance(decision, Command) else None
        if waiting is not None and answer == "confirm":
            if waiting.command.roles:
                return [*outcomes, Immediate(utterance, transcript, _not_by_voice(waiting.command))]
            confirmed = self._confirmed(waiting, utterance.ended_ns, "voice")
            return [*outcomes, Immediate(utterance, transcript, None), confirmed]
        if waiting is not None and not _is_noise(decision):
            said = "cancelled by the speaker" if answer == "cancel" else "something else was said"
            outcomes.append(self._cancelled(waiting, "cancelled" if answer == "cancel" else "not-confirmed", said))
            if answer == "cancel":
                return [Immediate(utterance, transcript, None), *outcomes]
        if isinstance(decision, Command) and _steps(decision) and transcript is not None:
            pending = Pending(
                id=derived_id(utterance.id, _QUESTION),
                utterance=utterance,
                transcript=transcript,
                command=decision,
                steps_left=_steps(decision),
                until_ns=self._until(utterance.ended_ns),
            )
            self._pending[utterance.source] = pending
            return [*outcomes, pending]
        return [*outcomes, Immediate(utterance, transcript, decision)]

    @property
    def pending(self) -> tuple[Pending, ...]:
        """Every open question, the oldest first."""
        return tuple(self._pending.values())

    def confirm(self, pending_id: str, steps_left: int, role: str, now_ns: int) -> Pending | Confirmed:
        """A yes to one question at one of its steps. Raises ConfirmationError."""
        waiting = self._named(pending_id, now_ns)
        if waiting.steps_left != steps_left:
            raise ConfirmationError("not-pending", f"that question wants {waiting.steps_left} confirmations by now")
        if waiting.command.roles and role not in waiting.command.roles:
            who = " or ".join(waiting.command.roles)
            raise ConfirmationError("not-allowed", f"{waiting.command.intent} wants a yes from {who}")
        return self._confirmed(waiting, now_ns, "request")

    def cancel(self, pending_id: str, now_ns: int) -> Cancelled:
        """A no to one question. Raises ConfirmationError."""
        return self._cancelled(self._named(pending_id, now_ns), "cancelled", "cancelled by request")

    def _named(self, pending_id: str, now_ns: int) -> Pending:
        for pending in self._pending.values():
            if pending.id == pending_id and now_ns < pending.until_ns:
                return pending
        raise ConfirmationError("not-pending", "no such question is open: it was answered, cancelled or too late")

    def expire(self, now_ns: int, unheard: Collection[str] = ()) -> list[Cancelled]:
        """Cancel what nobody confirmed in time, but for sources of whom something said in time is still to be heard."""
        late = [
            pending for source, pending in self._pending.items() if pending.until_ns <= now_ns and source not in unheard
        ]
        return [self._cancelled(pending, "not-confirmed", f"no answer in {self.window_s:g} s") for pending in late]

    def close(self, why: str) -> list[Cancelled]:
        """Cancel everything: nobody can be heard any more."""
        return [self._cancelled(pending, "not-confirmed", why) for pending in [*self._pending.values()]]

    def next_expiry_ns(self) -> int | None:
        """CLOCK_BOOTTIME at which :meth:`expire` has something to do; None while nothing is pending."""
        return min((pending.until_ns for pending in self._pending.values()), default=None)

    def _until(self, now_ns: int) -> int:
        return now_ns + round(self.window_s * NS_PER_S)

    def _confirmed(self, pending: Pending, now_ns: int, by: Confirmer) -> Pending | Confirmed:
        if pending.steps_left > 1:
            again = replace(pending, steps_left=pending.steps_left - 1, until_ns=self._until(now_ns))
            self._pending[pending.utterance.source] = again
            return again
        del self._pending[pending.utterance.source]
        return Confirmed(pending, now_ns, by)

    def _cancelled(self, pending: Pending, reason: Literal["cancelled", "not-confirmed"], detail: str) -> Cancelled:
        del self._pending[pending.utterance.source]
        rejection = Rejection(reason, f"{pending.command.words!r}: {detail}", pending.command.confidence)
        return Cancelled(pending, rejection)


def _steps(command: Command) -> int:
    """How many confirmations the command wants at first."""
    return max(_STEPS[command.risk], 1 if command.roles else 0)


def _not_by_voice(command: Command) -> Rejection:
    who = " or ".join(command.roles)
    return Rejection("not-allowed", f"{command.words!r} wants a yes from {who}, and not by voice", command.confidence)


def _is_noise(decision: Command | Rejection | None) -> bool:
    return isinstance(decision, Rejection) and decision.reason == "no-speech"

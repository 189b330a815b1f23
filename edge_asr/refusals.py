"""Tells a message that a broker does not want from a broker that wants nothing at all. Pure: time comes in.

Law:

- A refused message is tried :data:`REFUSALS` times, in its place and alone; one over which, sent alone, the broker ends
  the connection, :data:`ENDINGS` times: a broker in trouble does that, too.
- Then it is put aside if something else stands against it: a message that the broker has taken since the first of these
  tries. Where none does, *witnesses* are called: the oldest other message is sent first, and if that is refused, too,
  the oldest of a category of which nothing was refused.
- If every witness is refused as well, the broker refuses everything, over a quota or a mistake in its access rules.
  Nothing is put aside for that; everything waits, each time twice as long, until something is taken. The message is
  tried before the witnesses, so that the order holds when the broker changes its mind.
- What may shed new light, a command or the first message of a category, ends a pause.
- Once a message that had been refused is taken, the refusals were not about messages: all counts begin afresh.
- After a message was put aside its topic is taken for forbidden, until a message of that topic is taken: the next
  needs no witness.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

from edge_asr.events import Category, Message

REFUSALS: Final = 4
"""Error PUBACKs after which a message is put aside."""

ENDINGS: Final = 10
"""Connections that may end over a message sent alone."""

_TRY_AGAIN_S: Final = 0.25
"""Before the second try; doubled each time, so a message that nobody will ever take holds up the others for 1.75 s."""

_WITNESSES: Final = 2
"""Called in one round: the next in order, which costs the order nothing, and one of another kind."""

_FIRST_HOLD_S: Final = 2.0
"""The first pause of a queue that is refused altogether; doubled each time."""

Fate = Literal["again", "aside"]
"""What becomes of a message now: it keeps its place, or it is put aside as a dead letter."""

NOT_AUTHORIZED: Final = 0x87

_REMEDIES: Final = {
    NOT_AUTHORIZED: "let the device publish to its topics in the broker's access rules",
    0x97: "raise the broker's quota for the device, or wait until it begins anew",
}
"""By the reason code of a PUBACK."""

HUNG_UP: Final = -1
"""Stands for a reason code where the broker ended the connection instead."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The broker takes nothing."""

    detail: str
    """What it says, in words for whoever looks after the box."""
    remedy: str


class Refusals:
    """What one broker has refused and not taken since, over all connections to it. Seconds are the event loop's."""

    def __init__(self, longest_s: float, on_change: Callable[[], None] = lambda: None) -> None:
        """``longest_s``: no pause is longer; ``on_change`` is called whenever ``trouble`` has changed."""
        self._longest_s = longest_s
        self._on_change = on_change
        self._wanted: dict[int, Message] = {}
        """By sequence number: what was refused and has not met its fate."""
        self._tries: Counter[int] = Counter()
        self._endings: Counter[int] = Counter()
        self._witnessed: set[int] = set()
        self._forbidden: set[str] = set()
        """Topics."""
        self._witness: int | None = None
        self._defendant: Message | None = None
        """Against whom the witness is heard."""
        self.called = 0
        """Witnesses since the last pause."""
        self._latest: Trouble | None = None
        self._barren = 0
        """Connections in a row that ended over a state."""
        self._holds = 0
        self.resume_at_s = 0.0
        """Until then nothing is sent."""
        self.accused: Message | None = None
        """A witness is wanted against this one, to be sent before it."""
        self.trouble: Trouble | None = None
        """None: the broker takes something, as far as we know."""

    @property
    def wanted(self) -> frozenset[int]:
        """Sequence numbers of refused messages whose fate is open: until then one message is sent at a time."""
        return frozenset(self._wanted)

    @property
    def unheard(self) -> list[Category]:
        """Categories of which nothing was refused."""
        refused = {message.category for message in self._wanted.values()}
        return [category for category in get_args(Category) if category not in refused]

    def refused(self, message: Message, topic: str, reason: str, code: int, now_s: float) -> Fate:
        """Take an error PUBACK for a message that was sent to a topic."""
        self._tries[message.seq] += 1
        self._endings.pop(message.seq, None)
        tries = self._tries[message.seq]
        exhausted = tries >= REFUSALS
        fate = self._judge(message, topic, f"{topic}: {reason}", code, now_s, exhausted=exhausted)
        if fate == "again" and not exhausted and self.accused is None:
            self._pause(now_s, _TRY_AGAIN_S * 2.0 ** (tries - 1))
        return fate

    def ended(self, message: Message, topic: str, reason: str, now_s: float) -> Fate:
        """Take the end of a connection, by the broker, over a message that was sent alone."""
        self._endings[message.seq] += 1
        exhausted = self._endings[message.seq] >= ENDINGS
        return self._judge(message, topic, f"{topic}: {reason}", HUNG_UP, now_s, exhausted=exhausted)

    def ended_over_state(self, reason: str, now_s: float) -> None:
        """Take the end of a connection, by the broker, over a retained state: messages did not get that far.

        That another state was taken says nothing: rules that allow `status` and forbid `meta` keep every message back.
        """
        self._barren += 1
        if self._barren >= REFUSALS:
            detail = f"the broker hangs up over the device's own state (status, meta, health): {reason}"
            self._latest = Trouble(detail, _REMEDIES[NOT_AUTHORIZED])
            self._hold(now_s)

    def taken(self, message: Message, topic: str) -> None:
        """Take a PUBACK without an error."""
        if message.seq == self._witness or message.seq not in self._wanted:
            self._witnessed.update(self._wanted)
            self._forbidden.discard(topic)
        else:
            self._tries.clear()
            self._endings.clear()
            self._witnessed.clear()
            self._forbidden.clear()
        self._believe()
        self.forget(message.seq)

    def forget(self, seq: int) -> None:
        """A message waits no more, whatever became of it."""
        self._wanted.pop(seq, None)
        self._tries.pop(seq, None)
        self._endings.pop(seq, None)
        self._witnessed.discard(seq)
        if self.accused is not None and self.accused.seq == seq:
            self.accused = None
        if self._witness == seq:
            self._witness = None
        if not self._wanted:
            self._believe()

    def put_aside(self, message: Message, topic: str) -> None:
        """A message is a dead letter now."""
        self._forbidden.add(topic)
        self.forget(message.seq)

    def summoned(self, seq: int) -> None:
        """The message with that number goes as the witness."""
        self._witness, self._defendant, self.accused = seq, self.accused, None
        self.called += 1

    def no_witness(self, now_s: float) -> None:
        """Nothing else waits that could be sent."""
        self._hold(now_s)

    def sheds_light(self) -> list[Category]:
        """The categories whose next message is worth a try before the pause is over; none while there is no pause."""
        return [] if self.trouble is None else list({*self.unheard, "command"})

    def resume(self) -> None:
        """End a pause."""
        self.resume_at_s = 0.0

    def _judge(self, message: Message, topic: str, reason: str, code: int, now_s: float, *, exhausted: bool) -> Fate:
        if message.seq not in self._wanted and topic in self._forbidden:
            self._witnessed.add(message.seq)
        self._wanted[message.seq] = message
        if exhausted and message.seq in self._witnessed:
            return "aside"
        if exhausted or self.trouble is not None:
            self._latest = Trouble(
                f"the broker refuses everything, {reason}", _REMEDIES.get(code, "see the broker's log")
            )
        if message.seq == self._witness:
            self._witness, self.accused = None, self._defendant
            if self.called == _WITNESSES:
                self._hold(now_s)
        elif exhausted or self.trouble is not None:
            self.accused = message
        return "again"

    def _hold(self, now_s: float) -> None:
        self._witness, self.accused, self.called = None, None, 0
        self._holds += 1
        self._pause(now_s, min(self._longest_s, _FIRST_HOLD_S * 2.0 ** min(self._holds - 1, 20)))
        if self.trouble != self._latest:
            self.trouble = self._latest
            self._on_change()

    def _pause(self, now_s: float, pause_s: float) -> None:
        self.resume_at_s = max(self.resume_at_s, now_s + pause_s)

    def _believe(self) -> None:
        """The broker takes something."""
        self._witness, self.accused, self.called = None, None, 0
        self._holds, self._barren = 0, 0
        if self.trouble is not None:
            self.trouble = None
            self.resume_at_s = 0.0
            self._on_change()

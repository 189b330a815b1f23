"""Carries each trouble to people twice: when it begins and when it is over. Pure: time comes in.

A trouble that comes and goes (a loose plug) is one until it has stayed away for :data:`QUIET_S`: an alarm that flaps is
soon ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from edge_asr import clock, contract
from edge_asr.contract import Severity
from edge_asr.events import Draft
from edge_asr.outbox import OutboxError, Statistics, read_statistics

QUIET_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is wrong now."""

    kind: str
    """Stable name, e.g. ``microphone-silent``; every kind stands in docs/monitoring.md."""
    source: str | None
    """The source that it is about; None: the box."""
    severity: Severity
    detail: str
    """What is wrong, in words for whoever looks after the box."""
    remedy: str

    @property
    def key(self) -> tuple[str, str | None]:
        """What makes two looks at a trouble the same trouble."""
        return self.kind, self.source


class AlarmBoard:
    """Remembers which alarms are raised."""

    def __init__(self) -> None:
        self._raised: dict[tuple[str, str | None], tuple[Condition, int]] = {}
        """Key -> the condition as it was raised, and when it was last seen (CLOCK_BOOTTIME)."""

    @property
    def raised(self) -> list[Condition]:
        """Every alarm that is not over, oldest first."""
        return [condition for condition, _ in self._raised.values()]

    def update(self, conditions: Iterable[Condition], now_ns: int) -> list[Draft]:
        """Take everything that is wrong now; return the alarms that begin with this look, then those that are over."""
        begun = []
        for condition in conditions:
            known = self._raised.get(condition.key)
            if known is None:
                begun.append(_draft(condition, "raised"))
            self._raised[condition.key] = (known[0] if known else condition, now_ns)
        ended = [
            condition for condition, seen_ns in self._raised.values() if now_ns - seen_ns >= QUIET_S * clock.NS_PER_S
        ]
        for condition in ended:
            del self._raised[condition.key]
        return [*begun, *(_draft(condition, "over") for condition in ended)]


def earlier(outbox: Path) -> Statistics | None:
    """What an outbox says before it is opened; None: it is new, or damaged so that it cannot say."""
    try:
        return read_statistics(outbox)
    except OutboxError:
        return None


def losses(before: Statistics | None, now: Statistics, outbox: Path) -> list[Draft]:
    """One alarm for each kind of loss between two looks at the outbox: events, which are never over."""
    if before is None:
        before = replace(now, damages=0)
    dropped = sum(now.dropped.values()) - sum(before.dropped.values())
    refused = now.dead_letters - before.dead_letters
    found: list[tuple[str, str, str]] = []
    if dropped > 0:
        detail = f"the outbox was full: {dropped} messages were dropped"
        found.append(("outbox-dropped", detail, "restore the broker or raise outbox.max_bytes"))
    if refused > 0:
        detail = f"the broker refuses {refused} messages for good"
        found.append(("outbox-refused", detail, "check the broker's access rules and size limits"))
    if now.damages > before.damages:
        found.append(("outbox-damaged", f"{outbox} was damaged; what was readable is kept", "check the disk"))
    return [contract.alarm_draft(kind, detail, severity="critical", remedy=todo) for kind, detail, todo in found]


def missing_receipts(command_ids: Sequence[str], within_s: float) -> Draft:
    """One alarm for the commands that the MES should have answered by now: an event, too."""
    what = f"command {command_ids[0]}" + (f" and {len(command_ids) - 1} more" if len(command_ids) > 1 else "")
    detail = f"no receipt for {what} within {within_s:g} s"
    return contract.alarm_draft("receipt-missing", detail, severity="warning", remedy="see whether the MES is there")


def _draft(condition: Condition, state: contract.AlarmState) -> Draft:
    return contract.alarm_draft(
        condition.kind,
        condition.detail,
        severity=condition.severity,
        remedy=condition.remedy,
        source=condition.source,
        state=state,
    )

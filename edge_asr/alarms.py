"""Carries each trouble to people twice: when it begins and when it is over. Pure: time comes in.

A trouble that comes and goes (a loose plug) is one until it has stayed away for :data:`QUIET_S`: an alarm that flaps is
soon ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from edge_asr import clock, contract
from edge_asr.contract import Severity
from edge_asr.events import Category, Draft
from edge_asr.ledger import Statistics
from edge_asr.outbox import OutboxError, read_statistics

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
    before = before or replace(now, damages=0)
    found: list[tuple[str, Severity, str, str]] = []
    dropped = _grown(before.dropped, now.dropped)
    if dropped:
        detail = f"the outbox was full: dropped were {dropped}"
        found.append(("outbox-dropped", "critical", detail, "restore the broker or raise outbox.max_bytes"))
    outdated = _grown(before.outdated, now.outdated)
    if outdated:
        detail = f"waiting longer than the settings allow, deleted were {outdated}"
        found.append(("outbox-outdated", "warning", detail, "restore the broker or raise outbox.limits"))
    refused = _grown(before.refused, now.refused)
    if refused:
        detail = f"refused for good were {refused}"
        found.append(("outbox-refused", "critical", detail, "check the broker's access rules and size limits"))
    if now.damages > before.damages:
        detail = f"{outbox} was damaged; what was readable is kept"
        found.append(("outbox-damaged", "critical", detail, "check the disk"))
    return [contract.alarm_draft(kind, detail, severity=how, remedy=todo) for kind, how, detail, todo in found]


def _grown(before: Mapping[Category, int], now: Mapping[Category, int]) -> str:
    """By how much, of what: ``3 transcript, 1 command``; empty: by nothing."""
    more = ((now[category] - before[category], category) for category in now)
    return ", ".join(f"{count} {category}" for count, category in more if count > 0)


def missing_receipts(command_ids: Sequence[str], within_s: float) -> Draft:
    """One alarm for the commands that the MES should have answered by now: an event, too."""
    what = f"command {command_ids[0]}" + (f" and {len(command_ids) - 1} more" if len(command_ids) > 1 else "")
    detail = f"no receipt for {what} within {within_s:g} s"
    return contract.alarm_draft("receipt-missing", detail, severity="warning", remedy="see whether the MES is there")


def log_line(alarm: Draft) -> str:
    """What the journal says of an alarm, for whoever has nothing but the journal."""
    return "alarm {kind} {state}: {detail}; {remedy}".format_map(alarm.data)


def _draft(condition: Condition, state: contract.AlarmState) -> Draft:
    return contract.alarm_draft(
        condition.kind,
        condition.detail,
        severity=condition.severity,
        remedy=condition.remedy,
        source=condition.source,
        state=state,
    )

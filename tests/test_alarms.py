"""Alarms as a whole: what the documentation names is what the code raises, and each was provoked by a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parent.parent
KINDS = re.findall(
    r"^\| `([a-z-]+)` \| (?:critical|warning) \|",
    (CHECKOUT / "docs/monitoring.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


ROOMS = "".join(path.read_text(encoding="utf-8") for path in sorted((CHECKOUT / "edge_asr").glob("*.py")))
EVENTS = set(re.findall(r'(?:alarm_draft|found\.append\()\(\s*"([a-z-]+)"', ROOMS))
STATES = set(re.findall(r'(?:Condition|_Trouble)\(\s*"([a-z-]+)"', ROOMS.replace("TOO_NOISY", '"too-noisy"')))


def test_the_documentation_lists_every_alarm_that_can_be_raised() -> None:
    assert set(KINDS) == EVENTS | STATES


def test_every_event_has_an_alert_rule_of_its_own_because_the_metric_of_alarms_shows_states_only() -> None:
    rules = yaml.safe_load((CHECKOUT / "monitoring/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["labels"]["kind"] for rule in rules if "kind" in rule["labels"]} == EVENTS


@pytest.mark.parametrize("kind", KINDS)
def test_every_alarm_is_provoked_by_a_test(kind: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").glob("test_*.py"))
    assert re.search(rf'[" ]{kind}[" ]', tests)

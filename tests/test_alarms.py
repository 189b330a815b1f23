"""Alarms as a whole: what the documentation names is what the code raises, and each was provoked by a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
KINDS = re.findall(
    r"^\| `([a-z-]+)` \| (?:critical|warning) \|",
    (CHECKOUT / "docs/monitoring.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_documentation_lists_every_alarm_that_can_be_raised() -> None:
    rooms = "".join(path.read_text(encoding="utf-8") for path in sorted((CHECKOUT / "edge_asr").glob("*.py")))
    rooms = rooms.replace("TOO_NOISY", '"too-noisy"')
    raised = set(re.findall(r'(?:alarm_draft|Condition|_Trouble|found\.append\()\(\s*"([a-z-]+)"', rooms))
    assert raised == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_alarm_is_provoked_by_a_test(kind: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").glob("test_*.py"))
    assert re.search(rf'[" ]{kind}[" ]', tests)

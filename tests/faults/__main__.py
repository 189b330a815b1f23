"""Breaks what breaks in a factory and counts what a consumer then misses.

    tools/faults                    # every scenario, 500 kills: about 10 minutes
    tools/faults --short            # a part of them, 12 kills: under a minute
    tools/faults --figures          # and what delivery costs: append, backlog, a million rows
    tools/faults --json OUT         # the same as JSON

Exit code 1 if a promise was broken. Only processes, namespaces and mounts of its own are touched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import figures, scenarios
from tests.faults.books import Account
from tests.faults.link import isolate

COLUMNS = ("kills", "committed", "lost", "reordered", "duplicates", "stale")
NOTED = ("expired", "foreign", "expired_at_broker", "forgotten", "unreadable", "late_from_broker")
"""Shown after the table's row where they are not 0."""


def row(account: Account) -> str:
    """One line of the table, in Markdown."""
    if account.skipped:
        return f"| {account.scenario} |" + " - |" * len(COLUMNS) + f" skipped: {account.skipped} |"
    numbers = account.asdict()
    notes = [f"{numbers[name]} {name.replace('_', ' ')}" for name in NOTED if numbers[name]]
    cells = [account.scenario, *(f"{numbers[name]:,}" for name in COLUMNS), "; ".join([*notes, *account.failures])]
    return f"| {' | '.join(cells)} |"


def run(wanted: Sequence[str], *, short: bool, kills: int, seed: str, not_isolated: str) -> list[Account]:
    """Run the scenarios one after the other and print each as it ends."""
    accounts: list[Account] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        log = Path(folder) / "device.log"
        with scenarios.Devices(log) as devices:
            for number, name in enumerate(wanted):
                began = time.monotonic()
                place = Path(folder) / str(number)
                place.mkdir()
                account = Account(name, skipped=scenarios.obstacle(scenarios.SCENARIOS[name], not_isolated))
                if not account.skipped:
                    stage = scenarios.Stage(name, place, devices, short=short, kills=kills, seed=seed)
                    account = scenarios.SCENARIOS[name](stage)
                account.seconds = round(time.monotonic() - began, 1)
                print(row(account), flush=True)
                accounts.append(account)
        if any(account.failures for account in accounts):
            logs = [log, *Path(folder).glob("*/device.log")]
            print("".join(found.read_text("utf-8") for found in logs if found.exists()), file=sys.stderr)
    return accounts


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a part of the scenarios, in under a minute")
    parser.add_argument("--figures", action="store_true", help="measure what delivery costs, too")
    parser.add_argument("--kills", type=int, metavar="N", help="default: 500, or 12 with --short")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there")
    parser.add_argument("--seed", default="edge-asr", help="of the random moments")
    parser.add_argument("--only", metavar="TEXT", help="scenarios whose name contains this; none: no scenario")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    asked = parsed(arguments)
    not_isolated = isolate()
    wanted = [
        name
        for name, scenario in scenarios.SCENARIOS.items()
        if not (asked.short and scenario in scenarios.LONG) and (asked.only or "") in name
    ]
    kills = asked.kills if asked.kills is not None else (12 if asked.short else 500)
    print(f"| scenario | {' | '.join(COLUMNS)} | notes |\n|---|{'---:|' * len(COLUMNS)}---|")
    accounts = run(wanted, short=asked.short, kills=kills, seed=asked.seed, not_isolated=not_isolated)
    total = Account("all")
    for name in (*COLUMNS, *NOTED):
        setattr(total, name, sum(getattr(account, name) for account in accounts))
    print(row(total))
    result: dict[str, Any] = {name: getattr(total, name) for name in (*COLUMNS, *NOTED)}
    result["scenarios"] = [account.asdict() for account in accounts]
    missed: list[str] = []
    if asked.figures:
        measured = figures.measure()
        result["figures"] = measured
        missed = figures.missed(measured)
        print("", figures.table(measured), *missed, sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if missed or any(account.violated for account in accounts) else 0


if __name__ == "__main__":
    sys.exit(main())

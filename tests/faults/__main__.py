"""Breaks what breaks in a factory and counts what a consumer then misses.

    tools/faults                    # every scenario, 500 kills, one after the other: about 12 minutes
    tools/faults --short            # every scenario, 12 kills, several at once: under a minute
    tools/faults --figures          # and what delivery costs: append, backlog, a million rows
    tools/faults --json OUT         # the same as JSON
    tools/faults --write DOCUMENT   # and into the marked place of docs/reliability.md

Exit code 1 if a promise was broken. Only processes, namespaces and mounts of its own are touched.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults import figures, report, scenarios
from tests.faults.books import Account
from tests.faults.link import isolate

AT_ONCE = 4
"""Scenarios of the short form that run side by side: they mostly wait."""

LONGEST = ("SIGKILL of the device", "link half open", "link slow and lossy", "link cut")
"""They begin first, so that none of them is alone at the end."""


def run(wanted: Sequence[str], *, short: bool, kills: int, seed: str, not_isolated: str) -> list[Account]:
    """Run the scenarios and print each in its turn."""
    accounts: list[Account] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        log = Path(folder) / "device.log"
        with scenarios.Devices(log) as devices, ThreadPoolExecutor(AT_ONCE if short else 1) as stages:

            def play(number: int) -> Account:
                began = time.monotonic()
                name, place = wanted[number], Path(folder) / str(number)
                place.mkdir()
                account = Account(name, skipped=scenarios.obstacle(scenarios.SCENARIOS[name], not_isolated))
                if not account.skipped:
                    stage = scenarios.Stage(number, name, place, devices, short=short, kills=kills, seed=seed)
                    account = scenarios.SCENARIOS[name](stage)
                account.seconds = round(time.monotonic() - began, 1)
                return account

            longest_first = sorted(range(len(wanted)), key=lambda number: wanted[number] not in LONGEST)
            played = {number: stages.submit(play, number) for number in longest_first}
            for number in range(len(wanted)):
                account = played[number].result()
                print(report.row(account), flush=True)
                accounts.append(account)
        if any(account.failures for account in accounts):
            logs = [log, *Path(folder).glob("*/device.log")]
            print("".join(found.read_text("utf-8") for found in logs if found.exists()), file=sys.stderr)
    return accounts


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="every scenario in brief, in under a minute")
    parser.add_argument("--figures", action="store_true", help="measure what delivery costs, too")
    parser.add_argument("--kills", type=int, metavar="N", help="default: 500, or 12 with --short")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result there")
    parser.add_argument(
        "--write", type=Path, metavar="DOCUMENT", help="put the tables into the document's marked place"
    )
    parser.add_argument("--seed", default="edge-asr", help="of the random moments")
    parser.add_argument("--only", metavar="TEXT", help="scenarios whose name contains this; none: no scenario")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; the exit code."""
    asked = parsed(arguments)
    load_before = os.getloadavg()[0]
    not_isolated = isolate()
    wanted = [name for name in scenarios.SCENARIOS if (asked.only or "") in name]
    kills = asked.kills if asked.kills is not None else (12 if asked.short else 500)
    print(report.HEAD)
    accounts = run(wanted, short=asked.short, kills=kills, seed=asked.seed, not_isolated=not_isolated)
    total = report.total(accounts)
    print(report.row(total))
    parts = ["\n".join([report.HEAD, *map(report.row, [*accounts, total])])]
    result: dict[str, Any] = {name: getattr(total, name) for name in (*report.COLUMNS, *report.NOTED)}
    result["scenarios"] = [account.asdict() for account in accounts]
    missed: list[str] = []
    if asked.figures:
        measured = figures.measure()
        result["figures"] = measured
        missed = figures.missed(measured)
        print("", figures.table(measured), *missed, sep="\n")
        parts += [figures.table(measured), *missed]
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if asked.write:
        report.put_into(asked.write, [report.circumstances(arguments, load_before), *parts])
    return 1 if missed or any(account.violated for account in accounts) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

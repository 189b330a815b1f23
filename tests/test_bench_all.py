"""`tools/bench all` hands each part what it was told for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.bench_all import BESIDE, PARTS, commands, flattened, parser

TOLD = ["--json", "out", "--funasr", "python-a", "bpe.model", "--whisper", "python-b", "--chart", "chart.svg"]


def test_each_part_gets_the_options_that_it_knows(tmp_path: Path) -> None:
    found = commands(parser().parse_args(TOLD), tmp_path)
    assert [*found] == [*BESIDE, *PARTS]
    assert found["engine"][5:10] == ["--funasr", "python-a", "bpe.model", "--chart", "chart.svg"]
    assert found["peers"][-2:] == ["--whisper", "python-b"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_knows_the_options_that_it_gets(part: str, tmp_path: Path) -> None:
    command = commands(parser().parse_args(TOLD), tmp_path)[part]
    known = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert [option for option in command[3:] if option.startswith("--") and f"{option} " not in known] == []


def test_only_some_parts_are_run_where_they_are_named(tmp_path: Path) -> None:
    assert [*commands(parser().parse_args(["--json", "out", "--only", "peers"]), tmp_path)] == ["peers"]


def test_rows_of_a_part_stand_under_its_name() -> None:
    assert flattened("engine", {"engine": [1], "limits": 2}) == {"engine": [1], "engine_run": {"limits": 2}}
    assert flattened("streams", {"silent": 1}) == {"streams": {"silent": 1}}

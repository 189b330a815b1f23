"""A module as a process of its own: its answer, and how it ended where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_asr import child
from edge_asr.child import ChildError


def test_the_answer_is_the_last_line_as_json(tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text('{"heard": "start"}', encoding="utf-8")
    assert child.ask("json.tool", "--compact", str(tmp_path / "answer.json"), limit_s=60) == {"heard": "start"}


def test_a_process_without_an_answer_is_told_by_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os\nos.kill(os.getpid(), 11)\n", encoding="utf-8")
    (tmp_path / "silent.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildError, match=r"^exit code 3$"):
        child.ask("silent", limit_s=60)
    with pytest.raises(ChildError, match=r"^SIGSEGV$"):
        child.ask("dying", limit_s=60)


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError):
        child.ask("json.tool", limit_s=0.0)

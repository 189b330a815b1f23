"""How the log reads in the journal, on a terminal and in a file."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_asr.logs import JournalHandler
from tests.sysbox import PYTHON, Sysbox, booted

SPEAKER = """
import logging
from edge_asr import logs, settings
logs.configure(settings.Log(level="info"))
log = logging.getLogger("edge_asr.pipeline")
log.debug("not worth a line")
log.info("recognized in %d ms", 120, extra={"utterance_id": "0192-abc"})
log.warning("two\\nlines \\u5c0f")
try:
    {}["key"]
except KeyError:
    log.exception("a bug")
logging.getLogger("paho").info("chatter of a library")
logging.getLogger("paho").warning("trouble in a library")
"""


def spoken(stderr: int, **variables: str) -> None:
    subprocess.run([sys.executable, "-c", SPEAKER], check=True, stderr=stderr, env={**os.environ, **variables})


def lines_on_a_terminal(**variables: str) -> list[str]:
    ours, theirs = pty.openpty()
    try:
        spoken(theirs, **variables)
        return os.read(ours, 65536).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_shows_time_level_and_room_with_trouble_in_colour() -> None:
    lines = lines_on_a_terminal(TERM="xterm")
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO pipeline: recognized in 120 ms", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d \033\[33mWARNING\033\[0m pipeline: two", lines[1])
    assert "\033[31mERROR\033[0m pipeline: a bug" in lines[3]
    assert any("paho: trouble in a library" in line for line in lines)
    assert not any("chatter" in line or "not worth a line" in line for line in lines)


def test_no_color_is_respected() -> None:
    assert not any("\033" in line for line in lines_on_a_terminal(NO_COLOR="1"))


def test_a_file_gets_the_date_and_no_colour(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        spoken(file.fileno())
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO pipeline: recognized in 120 ms", lines[0])
    assert lines[1].endswith(" WARNING pipeline: two")
    assert "KeyError: 'key'" in lines


def test_an_inherited_journal_stream_does_not_hide_the_log_of_a_redirected_command(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        spoken(file.fileno(), JOURNAL_STREAM="8:12345")
    assert "recognized in 120 ms" in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sysbox]:
    with booted(tmp_path_factory.mktemp("sysbox")) as machine:
        yield machine


def test_under_systemd_the_journal_gets_fields(box: Sysbox) -> None:
    box.write("/opt/speaker.py", SPEAKER)
    box.start("speaker.service", f"[Service]\nType=oneshot\nExecStart={PYTHON} /opt/speaker.py\n")
    box.run("journalctl", "--sync")
    output = box.run("journalctl", "--unit=speaker", "--output=json", "SYSLOG_IDENTIFIER=edge-asr")
    info, warning, bug, library = [json.loads(line) for line in output.splitlines()]
    assert (info["MESSAGE"], info["PRIORITY"]) == ("recognized in 120 ms", "6")
    assert (info["LOGGER"], info["THREAD_NAME"]) == ("edge_asr.pipeline", "MainThread")
    assert (info["CODE_FILE"], info["CODE_FUNC"]) == ("/opt/speaker.py", "<module>")
    assert info["EDGE_ASR_UTTERANCE_ID"] == "0192-abc"
    assert (warning["MESSAGE"], warning["PRIORITY"]) == ("two\nlines 小", "4")
    assert (bug["PRIORITY"], bug["MESSAGE"].splitlines()[-1]) == ("3", "KeyError: 'key'")
    assert library["MESSAGE"] == "trouble in a library"
    found = box.run("journalctl", "--output=cat", "EDGE_ASR_UTTERANCE_ID=0192-abc")
    assert found == "recognized in 120 ms\n"


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("edge_asr", logging.INFO, __file__, 1, message, None, None, "somewhere")


def test_a_huge_record_fits_one_datagram_and_keeps_both_ends(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        journal.settimeout(5)
        handler = JournalHandler(path)
        handler.handle(record("first" + 10_000_000 * "." + "last"))
        handler.close()
        message, priority = journal.recv(1 << 20).split(b"\n")[:2]
    assert message.startswith(b"MESSAGE=first...")
    assert message.endswith(b"...last")
    assert priority == b"PRIORITY=6"


def test_a_journal_that_is_away_costs_the_record_and_not_the_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = JournalHandler(str(tmp_path / "nobody"))
    handler.handle(record("lost"))
    handler.close()
    assert "Logging error" in capsys.readouterr().err

"""Decides how the daemon's log reads: fields in the journal under systemd, lines on standard error everywhere else.

A record's ``extra={"utterance_id": ...}`` becomes the journal field ``EDGE_ASR_UTTERANCE_ID``, so that
`journalctl EDGE_ASR_UTTERANCE_ID=...` tells one utterance's whole story.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_asr import settings

JOURNAL_SOCKET = "/run/systemd/journal/socket"
FIELD_PREFIX = "EDGE_ASR_"

_FIELD_BYTES = 32 * 1024
"""Longer values lose their middle: a record must fit one datagram, and a traceback's ends say the most."""

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_RESET = "\033[0m"
_RED = "\033[31m"
_COLOURS = {logging.DEBUG: "\033[2m", logging.WARNING: "\033[33m", logging.ERROR: _RED, logging.CRITICAL: _RED}
_EVERY_RECORD_HAS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(log: settings.Log) -> None:
    """Send this program's records of the wanted level, and everybody else's warnings, to one place."""
    to_journal = log.format == "journald" or (log.format == "auto" and _stderr_is_the_journal())
    handler = JournalHandler() if to_journal else _text_handler()
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("edge_asr").setLevel(log.level.upper())
    logging.captureWarnings(capture=True)


def _text_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    terminal = sys.stderr.isatty()
    handler.setFormatter(TextFormatter(terminal=terminal, colours=terminal and "NO_COLOR" not in os.environ))
    return handler


class TextFormatter(logging.Formatter):
    """``12:03:04 INFO pipeline: ...``; away from a terminal with the date, for a file is read on another day."""

    def __init__(self, *, terminal: bool, colours: bool) -> None:
        datefmt = "%H:%M:%S" if terminal else "%Y-%m-%dT%H:%M:%S%z"
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt)
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Write one record; only a copy is touched, other handlers see the original."""
        shown = copy.copy(record)
        shown.name = record.name.removeprefix("edge_asr.")
        if self._colours and record.levelno in _COLOURS:
            shown.levelname = f"{_COLOURS[record.levelno]}{record.levelname}{_RESET}"
        return super().format(shown)


class JournalHandler(logging.Handler):
    """Writes records as datagrams of journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._path = path
        # Not connected: each datagram finds the socket anew, so a restart of journald is not noticed.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            payload = b"".join(_field(name, value) for name, value in self._fields(record).items())
            self._socket.sendto(payload, self._path)
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        own = {name: value for name, value in record.__dict__.items() if name not in _EVERY_RECORD_HAS}
        return {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": "edge-asr",
            "LOGGER": record.name,
            "THREAD_NAME": record.threadName or "",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            **{FIELD_PREFIX + name.upper(): str(value) for name, value in own.items()},
        }


def _field(name: str, value: str) -> bytes:
    """``NAME=value``, or with an explicit length where the value has more than one line."""
    encoded = value.encode(errors="backslashreplace")
    if len(encoded) > _FIELD_BYTES:
        encoded = encoded[: _FIELD_BYTES // 2] + b" [...] " + encoded[-_FIELD_BYTES // 2 :]
    if b"\n" in encoded:
        return name.encode() + b"\n" + len(encoded).to_bytes(8, "little") + encoded + b"\n"
    return name.encode() + b"=" + encoded + b"\n"


def _priority(level: int) -> int:
    """Translate to the syslog severity: 7 debug, 6 info, 4 warning, 3 error, 2 critical."""
    return next((priority for floor, priority in _PRIORITIES if level >= floor), 7)


def _stderr_is_the_journal() -> bool:
    """Compare with JOURNAL_STREAM, since a shell under the unit inherits the variable and may redirect."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"

"""What holds for every test."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest

from edge_asr.outbox import Outbox
from tests.broker import Broker

# A busy machine is no failure: pytest-timeout ends what hangs.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _the_log_as_it_was() -> Iterator[None]:
    """A test that runs a verb in this process configures the log; the next one finds it as before."""
    loggers = [logging.getLogger(), logging.getLogger("edge_asr")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    logging.captureWarnings(capture=False)


@pytest.fixture(scope="session")
def fuzzing() -> Iterator[Callable[[], tuple[int, str]]]:
    """The gateway's parsers are fuzzed beside other tests, which mostly wait; exit status and report at the end."""
    fuzz = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fuzz_gateway.py"]
    with tempfile.TemporaryFile("w+") as output:
        checkout = Path(__file__).parent.parent
        process = subprocess.Popen(["nice", "-n", "5", *fuzz], stdout=output, stderr=output, cwd=checkout)

        def report() -> tuple[int, str]:
            status = process.wait(110)
            output.seek(0)
            return status, output.read()

        try:
            yield report
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A real mosquitto."""
    folder = tmp_path / "broker"
    folder.mkdir()
    with Broker(folder) as running:
        yield running


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with closing(Outbox(tmp_path / "outbox.db", 50_000_000)) as opened:
        yield opened

"""What holds for every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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


LONGEST = ("test_package.py", "test_systemd.py", "test_readme.py")
"""Of files that are gone through side by side (`tools/test`) these come first, so that none is left over in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


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

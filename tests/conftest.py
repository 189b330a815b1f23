"""What holds for every test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import hypothesis
import pytest

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

"""What the gateway asks of the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from edge_asr.metrics import Snapshot
from edge_asr.pipeline import Pipeline

Broker = Literal["connected", "offline", "none"]


@dataclass(frozen=True)
class Box:
    """The daemon, as far as the gateway sees it."""

    pipeline: Pipeline
    broker: Callable[[], Broker]
    snapshot: Callable[[], Awaitable[Snapshot]]

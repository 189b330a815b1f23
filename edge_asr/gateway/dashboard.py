"""Shows whoever looks after the box how it does and what was said lately: read-only, for tokens that may `watch`."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from aiohttp import web

from edge_asr.contract import MicrophoneHealth
from edge_asr.events import Json
from edge_asr.gateway.box import Box
from edge_asr.gateway.rules import Rules
from edge_asr.gateway.session import Event, Session
from edge_asr.gateway.sessions import Sessions
from edge_asr.metrics import Snapshot

KEPT: Final = 60
"""Messages that it shows."""

CPU_WINDOW_S: Final = 0.9

_LEFT_OUT: Final = ("tokens", "boot_id", "device", "time_quality", "model")


class Dashboard:
    """Its data; the page is one of `pages`."""

    def __init__(self, box: Box, sessions: Sessions, rules: Rules, said: deque[Event]) -> None:
        self._box = box
        self._sessions = sessions
        self._rules = rules
        self._said = said
        self._cpu = time.monotonic(), time.process_time(), 0.0

    def routes(self) -> list[web.RouteDef]:
        """The one that the page asks once a second."""
        return [web.get("/board", self._board)]

    async def _board(self, request: web.Request) -> web.Response:
        self._rules.require(request, "watch")
        snapshot = await self._box.snapshot()
        pipeline = self._box.pipeline
        return web.json_response(
            {
                "meta": dataclasses.asdict(snapshot.meta),
                "broker": self._box.broker(),
                "sources": {name: dataclasses.asdict(each) for name, each in self._levels(snapshot).items()},
                "sessions": [_session(session) for session in self._sessions],
                "finals_waiting": snapshot.finals_waiting,
                "partials_dropped": snapshot.partials_dropped,
                "outbox": None if snapshot.outbox is None else dataclasses.asdict(snapshot.outbox),
                "alarms": [dataclasses.asdict(alarm) for alarm in snapshot.alarms],
                "temperature_c": snapshot.thermals.hottest_c,
                "throttled": list(snapshot.thermals.throttled),
                "real_time_factor": pipeline.real_time_factor,
                "utterances": pipeline.utterances,
                "cpu_load": self._cpu_load(snapshot.recognizer_cpu_s or 0.0),
                "memory_bytes": _resident_bytes() + (snapshot.recognizer_bytes or 0),
                "clock_synchronized": snapshot.clock_synchronized,
                "said": list(self._said),
            }
        )

    def _levels(self, snapshot: Snapshot) -> dict[str, MicrophoneHealth]:
        """Of the box's own sources and, behind them, of every session's last talk."""
        heard = snapshot.microphones
        sessions = {each.source: each for each in self._sessions}
        own = {name: health for name, health in heard.items() if name not in sessions}
        talked = {name: each.meter for name, each in sessions.items() if each.meter is not None}
        return {**own, **{name: heard.get(name) or meter.read() for name, meter in talked.items()}}

    def _cpu_load(self, recognizer_s: float) -> float:
        """Cores in use since the last look, the recognizer's included; none are while another takes its place."""
        then, used, load = self._cpu
        now = time.monotonic()
        if now - then >= CPU_WINDOW_S:  # several may watch at once
            spent = time.process_time() + recognizer_s
            load = round(max(0.0, spent - used) / (now - then), 4)
            self._cpu = now, spent, load
        return load


def _session(session: Session) -> Event:
    return {
        "source": session.source,
        "kind": session.kind,
        "format": session.format,
        "address": session.address,
        "attached": session.attached,
        "talking": session.talking,
    }


def shortened(kind: str, data: Mapping[str, Json]) -> Event:
    """A message as the dashboard keeps it."""
    return {"type": kind, **{key: value for key, value in data.items() if key not in _LEFT_OUT}}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()

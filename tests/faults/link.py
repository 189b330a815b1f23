"""A network link in user space between a namespace of its own and ours: many kernels lack ``sch_netem``.

Root only. :func:`isolate` first moves the whole rig into namespaces of its own, so that neither the machine's network
nor its mounts are ever touched, and everything vanishes with the rig.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

_NEW_NETWORK, _NEW_MOUNTS = 0x40000000, 0x00020000
_PRIVATE, _RECURSIVE = 1 << 18, 1 << 14
_PROTOCOL = 9
"""Where an IPv4 header names what it carries."""

_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x0001 | 0x1000

_libc = ctypes.CDLL(None, use_errno=True)

_NETWORKS = itertools.count()


def isolate() -> str:
    """Move this process into its own network and mount namespaces; why that was not possible, or nothing.

    To be called before any thread is started.
    """
    if os.geteuid() != 0:
        return "needs root"
    if _libc.unshare(_NEW_NETWORK | _NEW_MOUNTS) or _libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        return f"no namespaces of its own ({os.strerror(ctypes.get_errno())})"
    _run("ip link set lo up")
    return ""


def isolated(scenario: Callable[[Path], object]) -> None:
    """Print as JSON what a scenario finds in namespaces of its own and a folder, or why they are refused."""
    refusal = isolate()
    if refusal:
        print(json.dumps({"refused": refusal}))
        return
    with tempfile.TemporaryDirectory(prefix="isolated-") as name:
        print(json.dumps(scenario(Path(name))))


@dataclass
class Weather:
    """How the link is; assign to change it."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    """Share of the packets, each way."""
    there: bool = True
    """From device to broker."""
    back: bool = True
    udp: bool = True
    """Many a firewall lets TCP through alone."""


class Link:
    """A cable with weather; a context manager. :attr:`prefix` runs a command at the device's end.

    ``device_side`` and ``broker_side`` are the addresses at its end and ours.
    """

    def __init__(self, luck: random.Random) -> None:
        self.weather = Weather()
        self._luck = luck
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._holder.stdout
        self._holder.stdout.readline()
        self.prefix = ("nsenter", "-t", str(self._holder.pid), "-n")
        self._over, self._end = os.pipe()
        number = next(_NETWORKS)
        self.device_side, self.broker_side = f"10.177.{number}.1", f"10.177.{number}.2"
        self._device = _tunnel(
            f"/proc/{self._holder.pid}/ns/net", f"faults{number}", self.device_side, self.broker_side
        )
        self._broker = _tunnel("/proc/thread-self/ns/net", f"faults{number}", self.broker_side, self.device_side)
        self._thread = threading.Thread(target=self._carry, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)
        self._thread.join()
        for opened in (self._over, self._device, self._broker):
            os.close(opened)
        self._holder.communicate()

    def _carry(self) -> None:
        underway: list[tuple[float, int, int, bytes]] = []
        """Due time, running number, where to, packet."""
        latest = {self._device: 0.0, self._broker: 0.0}
        other = {self._device: self._broker, self._broker: self._device}
        number = 0
        while True:
            pause_s = max(0.0, underway[0][0] - time.monotonic()) if underway else None
            readable, _, _ = select.select([self._over, *other], [], [], pause_s)
            if self._over in readable:
                return
            for end in readable:
                packet, number = self._carried(os.read(end, 65_536), from_device=end == self._device), number + 1
                if packet is not None:
                    # Never before the packet ahead of it: TCP takes reordering for loss.
                    latest[end] = max(latest[end], time.monotonic() + self._travel_s())
                    heapq.heappush(underway, (latest[end], number, other[end], packet))
            while underway and underway[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(underway)
                os.write(end, packet)

    def _carried(self, packet: bytes, *, from_device: bool) -> bytes | None:
        """What comes out at the other end; None: nothing."""
        whole = self.weather.there if from_device else self.weather.back
        if not whole or (packet[_PROTOCOL] == socket.IPPROTO_UDP and not self.weather.udp):
            return None
        return packet if self._luck.random() >= self.weather.loss else None

    def _travel_s(self) -> float:
        return max(0.0, self.weather.delay_s + self._luck.uniform(-1, 1) * self.weather.jitter_s)


def _tunnel(namespace: str, name: str, address: str, peer: str) -> int:
    """An interface in that namespace whose packets we read and write. Only the calling thread goes there and back."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(namespace, os.O_RDONLY)
    try:
        _enter(there)
        tunnel = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tunnel, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
        _run(f"ip addr add {address} peer {peer} dev {name}")
        _run(f"ip link set {name} up")
    finally:
        _enter(home)
        os.close(there)
        os.close(home)
    return tunnel


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)

"""Carries the daemon's state to systemd: ready, reloading, stopping, alive and one line for people (sd_notify(3)).

Also memory that outlives the process: descriptors handed to systemd come back after a restart (sd_pid_notify_with_fds).
Outside systemd every call is a no-op that returns False.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START."""

_SEND_TIMEOUT_S = 1.0
"""Nothing here may hold up the daemon: a service manager that takes no datagram for a second is in worse trouble."""


def ready(status: str) -> bool:
    """Report that start-up or a reload is complete."""
    return _notify("READY=1", _status(status))


def status(text: str) -> bool:
    """Show one line in `systemctl status`."""
    return _notify(_status(text))


def still_starting() -> bool:
    """Ask for half a minute more than TimeoutStartSec= allows, from now on; of no effect once :func:`ready`."""
    return _notify("EXTEND_TIMEOUT_USEC=30000000")


def reloading() -> bool:
    """Report the beginning of a reload; :func:`ready` ends it. The time stamp is what Type=notify-reload asks for."""
    return _notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(status: str) -> bool:
    """Report that shutting down has begun."""
    return _notify("STOPPING=1", _status(status))


def alive() -> bool:
    """Feed the watchdog; to be called every :func:`watchdog_interval_s` and only while the daemon really works."""
    return _notify("WATCHDOG=1")


def trigger() -> bool:
    """Ask to be ended and started again as if the watchdog had run out; False where no watchdog would do it."""
    return watchdog_interval_s() is not None and _notify("WATCHDOG=trigger")


def store(name: str, descriptor: int) -> bool:
    """Let systemd hold a descriptor over restarts (FileDescriptorStoreMax=)."""
    return _notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])


def forget(name: str) -> bool:
    """Let systemd close what :func:`store` gave it."""
    return _notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def handed_over() -> range:
    """The descriptors that systemd has started this process with, until somebody has asked what is :func:`stored`."""
    count = os.environ.get("LISTEN_FDS", "")
    ours = os.environ.get("LISTEN_PID") == str(os.getpid()) and count.isdigit()
    return range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + (int(count) if ours else 0))


def stored() -> list[tuple[str, int]]:
    """(name, descriptor) of everything that the process before had stored; to be called once (sd_listen_fds(3))."""
    descriptors = handed_over()
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_FDS", "LISTEN_PID"):
        os.environ.pop(name, None)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - its signature
    return list(zip(names, descriptors, strict=False))


def watchdog_interval_s() -> float | None:
    """Seconds between two :func:`alive`: half of WatchdogSec=; None where systemd does not watch this process."""
    timeout_us = os.environ.get("WATCHDOG_USEC", "")
    if not timeout_us.isdigit() or os.environ.get("WATCHDOG_PID") not in {None, str(os.getpid())}:
        return None
    return int(timeout_us) / 2 / 1_000_000 or None


def _status(text: str) -> str:
    # A line feed would begin the next assignment.
    return "STATUS=" + " ".join(text.split())


def _notify(*assignments: str, descriptors: Sequence[int] = ()) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    path = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_SEND_TIMEOUT_S)
        try:
            sender.connect(path)
            socket.send_fds(sender, ["\n".join(assignments).encode()], list(descriptors))
        except OSError as error:
            log.warning("systemd did not take %s: %s", assignments[0], error)
            return False
    return True

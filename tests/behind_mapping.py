"""Somebody calls a gateway in a container, whose ports are mapped to an address of its host; a program of its own.

The container is a network namespace; the cable to it does what its host would: outside, only the host's address exists.
Prints what the caller was understood to say, and where it was told to call.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any

from tests.faults.link import Link, isolated
from tests.gateway import Box, box, recording, run
from tests.test_gateway import WhipClient

HOST = "10.178.0.1"
PORTS = 50_000, 50_009
IPV4, SOURCE, DESTINATION = 4, 12, 16
_CHECKSUMS = {socket.IPPROTO_UDP: 6, socket.IPPROTO_TCP: 16}
"""Where it lies within the header."""


def readdressed(packet: bytes, place: int, address: bytes) -> bytes:
    """A packet of IPv4 with another address at this place, and with the checksums that it has then (RFC 1624)."""
    changed = bytearray(packet)
    header = 4 * (packet[0] & 15)
    where = _CHECKSUMS.get(packet[9])
    for checksum in (10, *([] if where is None else [header + where])):
        total = ~struct.unpack_from("!H", changed, checksum)[0] & 0xFFFF
        for old, new in zip(struct.unpack_from("!2H", packet, place), struct.unpack("!2H", address), strict=True):
            total += (~old & 0xFFFF) + new
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", changed, checksum, ~total & 0xFFFF)
    changed[place : place + 4] = address
    return bytes(changed)


class Mapping(Link):
    """A cable whose device is known outside by another address, and by that alone."""

    def _carried(self, packet: bytes, *, from_device: bool) -> bytes | None:
        carried = super()._carried(packet, from_device=from_device)
        if carried is None or carried[0] >> 4 != IPV4:
            return None
        outside, inside = socket.inet_aton(HOST), socket.inet_aton(self.device_side)
        if from_device:
            return readdressed(carried, SOURCE, outside)
        return readdressed(carried, DESTINATION, inside) if carried[DESTINATION:][:4] == outside else None


def call(running: Box) -> dict[str, Any]:
    async def talk() -> dict[str, Any]:
        client = WhipClient(running, recording("20-emergency-stop"))
        async with running.http() as http:
            response = await client.call(http)
            await client.until("ready")
            client.say(type="start", talk=1)
            said = (await client.until("transcript"))["text"]
            candidates = re.findall(r"^a=candidate:(?:\S+ ){4}(\S+) (\d+)", await response.text(), re.MULTILINE)
        await client.peer.close()
        return {"said": said, "candidates": candidates}

    found: dict[str, Any] = run(talk)
    return found


def scenario(folder: Path) -> object:
    with Mapping(random.Random(1)) as link:  # noqa: S311
        subprocess.run(["ip", "route", "add", HOST, "via", link.device_side], check=True)
        where: dict[str, Any] = {"host": "0.0.0.0", "announce": HOST, "udp_ports": list(PORTS)}  # noqa: S104
        with box(folder, prefix=link.prefix, address=HOST, **where) as running:
            return call(running)


if __name__ == "__main__":
    isolated(scenario)

"""Whom a limit counts: an address and, for IPv6, its network as well. Pure.

Law: a device takes as many IPv6 addresses of its network as it likes, yet a whole hall may share that network; so a
network of 64 bits may have :data:`NETWORK_SHARE` times what each of its addresses may. IPv4 that has come over a socket
of both kinds is the IPv4 that it is.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final

NETWORK_SHARE: Final = 4
"""As the limits are by default: all sessions, half of the connections, a page for each of 60 stations at once."""


def plain(address: str) -> str:
    """An address as people know it."""
    return next(iter(counted(address)))


def counted(address: str) -> dict[str, int]:
    """Whom it counts for, the address first, and how many times an address's limit each of them may have."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return {address: 1}  # nobody's: a request without a connection
    if isinstance(found, ipaddress.IPv4Address):
        return {str(found): 1}
    if found.ipv4_mapped is not None:
        return {str(found.ipv4_mapped): 1}
    network = ipaddress.IPv6Network((int(found), 64), strict=False)
    return {str(found): 1, str(network): NETWORK_SHARE}


def full(who: Mapping[str, int], taken: Mapping[str, int], limit: int) -> str | None:
    """Who of those whom an address counts for has taken all that they may; None: nobody."""
    return next((each for each, share in who.items() if taken.get(each, 0) >= share * limit), None)

"""Says how a call shakes hands: as DTLS' client, and without a callback from OpenSSL into Python.

Law: who the peer is follows from the fingerprint in its offer, which aiortc compares once the handshake is done, and
from nothing else; no authority stands behind such certificates. A callback that accepts them all, as aiortc installs,
would need memory that is writable and executable, which the unit forbids (MemoryDenyWriteExecute=). A client need not
ask for the server's certificate, so it needs none; a server would, therefore the client's side must be ours.
"""

from __future__ import annotations

import re

from aiortc import RTCCertificate, RTCPeerConnection
from aiortc.rtcdtlstransport import SRTPProtectionProfile
from OpenSSL import SSL

_CIPHERS = b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305"


class _Certificate(RTCCertificate):
    """A certificate for one call."""

    def _create_ssl_context(self, srtp_profiles: list[SRTPProtectionProfile]) -> SSL.Context:
        context = SSL.Context(SSL.DTLS_METHOD)
        context.set_options(SSL.OP_NO_TICKET)
        context.set_verify(SSL.VERIFY_NONE)
        context.use_certificate(self._cert)
        context.use_privatekey(self._key)
        context.set_cipher_list(_CIPHERS)
        context.set_tlsext_use_srtp(b":".join(profile.openssl_profile for profile in srtp_profiles))
        return context


def shake_hands_without_callback(peer: RTCPeerConnection) -> None:
    """Have a connection that has no transport yet use such a certificate."""
    peer._RTCPeerConnection__certificates = [_Certificate.generateCertificate()]  # type: ignore[attr-defined] # noqa: SLF001


def wants_our_side(offer: str) -> bool:
    """Whether an SDP offer leaves us nothing but to be the server."""
    return re.search(r"^a=setup:active\s*$", offer, re.MULTILINE) is not None

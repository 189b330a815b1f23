"""The gateway's certificates: a private authority for this box and a server certificate for its names and addresses.

Law: browsers give the microphone to HTTPS pages only, and a factory has no public names, so the box is its own
authority: `ca.crt` is installed once on each device. Running it again keeps the authority and renews the server's
certificate. Keys are readable by the service alone.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from ifaddr import get_adapters

from edge_asr.gateway import GatewayError
from edge_asr.gateway.tokens import write_private

SERVER_DAYS = 820
"""Apple's devices refuse more than 825 for a server, private authority or not."""

AUTHORITY_DAYS = 3650
DUE_DAYS = 90
"""So long before its end a certificate should be renewed."""

BACKDATED = dt.timedelta(days=1)
"""A device whose clock is a little behind must not call the certificate not yet valid."""

SANE_YEAR = 2025
"""A gateway without a battery wakes up in 1970: what it signs then would be over before it begins."""

_Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Files:
    """Where they lie."""

    folder: Path

    @property
    def authority(self) -> Path:
        """What devices install."""
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """Who has it can impersonate any site to those devices: only `edge-asr gateway cert` needs it."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """The server's key."""
        return self.folder / "server.key"


def make(folder: Path, names: Sequence[str], *, now: dt.datetime | None = None) -> tuple[str, ...]:
    """Make or renew; returns the names that the certificate holds, this machine's own included.

    Raises GatewayError, and ValueError on what is neither a host name nor an address.
    """
    now = now or dt.datetime.now(dt.timezone.utc)
    if now.year < SANE_YEAR:
        raise GatewayError(f"the clock shows {now:%Y-%m-%d}; set it first, for certificates begin today")
    for name in names:
        general_name(name)
    files = Files(folder)
    try:
        authority, key = _authority(files, now)
        held = tuple(dict.fromkeys((*names, *own_names())))
        _issue(files, authority, key, held, now)
    except OSError as error:
        raise GatewayError(f"{folder}: cannot be written ({error.strerror}); run as the service's user") from None
    return held


def is_due(folder: Path, names: Sequence[str]) -> bool:
    """Whether there is no server certificate, or one that ends soon or lacks a name.

    Raises GatewayError, and ValueError on what is neither a host name nor an address.
    """
    wanted = {general_name(name) for name in names}
    files = Files(folder)
    if not (files.server.exists() and files.server_key.exists()):
        return True
    held = _load(files.server).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return not wanted <= set(held) or days_left(files.server) < DUE_DAYS


def own_names() -> tuple[str, ...]:
    """This machine's host name, its mDNS name, the loopback, and the addresses of all its network cards."""
    host = socket.gethostname()
    names = [name for name in (host, f"{host.partition('.')[0]}.local", "localhost") if _HOST.fullmatch(name)]
    return tuple(dict.fromkeys([*names, "127.0.0.1", "::1", *_addresses()]))


def fingerprint(path: Path) -> str:
    """SHA-256 of a certificate as devices show it. Raises GatewayError."""
    digest = _load(path).fingerprint(hashes.SHA256()).hex().upper()
    return ":".join(digest[place : place + 2] for place in range(0, len(digest), 2))


def days_left(path: Path) -> float:
    """Days until a certificate ends; negative afterwards. Raises GatewayError."""
    return (_load(path).not_valid_after_utc - dt.datetime.now(dt.timezone.utc)) / dt.timedelta(days=1)


_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


def _addresses() -> Iterator[str]:
    """By which others reach this machine, IPv4 first: not those that mean nothing without the card's name."""
    texts = [each.ip if isinstance(each.ip, str) else each.ip[0] for card in get_adapters() for each in card.ips]
    found = [ipaddress.ip_address(text) for text in texts]
    for address in sorted(found, key=lambda each: each.version):
        if not (address.is_link_local or address.is_loopback):
            yield str(address)


def general_name(name: str) -> x509.GeneralName:
    """A certificate's name of either kind. Raises ValueError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise ValueError(f"{name!r} is neither a host name nor an IP address") from None
        return x509.DNSName(name)


def _authority(files: Files, now: dt.datetime) -> tuple[x509.Certificate, _Key]:
    """The one that is there, or a new one."""
    if files.authority.exists() and files.authority_key.exists():
        try:
            key = serialization.load_pem_private_key(files.authority_key.read_bytes(), None)
        except (ValueError, TypeError):
            raise GatewayError(f"{files.authority_key}: is damaged; remove it to make a new authority") from None
        if not isinstance(key, _Key):
            raise GatewayError(f"{files.authority_key}: is not ours; move your own certificates elsewhere")
        return _load(files.authority), key
    if files.authority.exists():
        raise GatewayError(
            f"{files.authority_key}: is not there; bring it back, or remove {files.authority.name} to make a new"
            " authority, which every device has to install"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"edge-asr {socket.gethostname()}"[:64])])
    usage = {"key_cert_sign": True, "crl_sign": True, "digital_signature": False}
    certificate = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _save(files.authority, files.authority_key, certificate, key)
    return certificate, key


def _issue(files: Files, authority: x509.Certificate, signer: _Key, names: Sequence[str], now: dt.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage({"digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _save(files.server, files.server_key, certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + dt.timedelta(days=days) - BACKDATED)
    )


def _key_usage(wanted: dict[str, bool]) -> x509.KeyUsage:
    kinds = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{kind: wanted.get(kind, False) for kind in kinds})


def _save(path: Path, key_path: Path, certificate: x509.Certificate, key: _Key) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(key_path, pem.decode())
    write_private(path, certificate.public_bytes(serialization.Encoding.PEM).decode(), 0o644)


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise GatewayError(f"{path}: cannot be read ({error.strerror}); run `edge-asr gateway cert`") from None
    except ValueError:
        raise GatewayError(f"{path}: is no certificate in PEM; run `edge-asr gateway cert`") from None

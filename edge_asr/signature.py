"""Decides whether a model is the site's own choice: its manifest, with the hash of every file, is signed by its key."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edge_asr.model_store import ModelError


def check(manifest: Path, signature: Path, signed_by: Path) -> None:
    """Hold a manifest against the site's public key, Ed25519 over all its bytes. Raises ModelError."""
    try:
        key = load_pem_public_key(signed_by.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no public key in PEM"
        raise ModelError(f"{signed_by}: cannot be used ({reason}); set model.signed_by to an Ed25519 key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ModelError(f"{signed_by}: is not an Ed25519 key; make one with `openssl genpkey -algorithm ed25519`")
    try:
        key.verify(signature.read_bytes(), manifest.read_bytes())
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        asked = f"has no {missing}, and model.signed_by asks for one; see docs/models.md"
        raise ModelError(f"{manifest.parent}: {asked}") from None
    except (InvalidSignature, OSError):
        raise ModelError(f"{signature}: is not by {signed_by}; do not use this model") from None

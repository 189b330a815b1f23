"""Carries one file of known hash from a web server to the disk, and goes on where a broken connection left off.

Law: nothing here is called unless a person typed `edge-asr models pull`. A file gets its own name only after its
SHA-256 was right; until then it is ``NAME.part``, which the next attempt continues.
"""

from __future__ import annotations

import http.client
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_asr.model_store import sha256_of

Progress = Callable[[int, int | None], None]
"""Is told the bytes that are there, and how many there will be (None: unknown)."""

MAX_BYTES: Final = 4 * 1024**3
ATTEMPTS: Final = 5
"""In a row without a single new byte."""

_PAUSE_S: Final = 0.5
"""Before the second attempt; doubled each time."""

_TIMEOUT_S: Final = 30.0
_BLOCK_BYTES: Final = 1 << 16


class DownloadError(Exception):
    """A file could not be fetched; the message names its address and the remedy."""


def fetch(url: str, target: Path, sha256: str, size: int | None, *, progress: Progress, spare_bytes: int = 0) -> None:
    """Download to ``target``; raises DownloadError. What is there already is not fetched again.

    ``spare_bytes`` of the disk are left to others: what is begun and cannot end would fill it.
    """
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise DownloadError(f"{url}: is not an http or https address; import files with `edge-asr models import`")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")

        def show(have: int, total: int | None) -> None:
            _check_room(url, part, (total or have) - have, spare_bytes)
            progress(have, total)

        _complete(url, part, size, show)
        actual = sha256_of(part)
        if actual != sha256:
            part.unlink()
            raise DownloadError(f"{url}: SHA-256 is {actual[:12]}..., expected {sha256[:12]}...; try another mirror")
        part.rename(target)


def _complete(url: str, part: Path, size: int | None, progress: Progress) -> None:
    """Append to ``part`` until it is all there."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if size is not None and before == size:
            return
        try:
            if _append(url, part, size, progress):
                return
            reason = "the connection ended too early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise DownloadError(f"{url}: the server answers {error.code} {error.reason}; check --mirror") from None
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        now = part.stat().st_size if part.exists() else 0
        failures = 0 if now > before else failures + 1
        if failures == ATTEMPTS:
            raise DownloadError(f"{url}: {reason}; what was fetched is kept, type the same command again") from None
        time.sleep(_PAUSE_S * 2 ** max(0, failures - 1))


def _check_room(url: str, part: Path, wanted_bytes: int, spare_bytes: int) -> None:
    if wanted_bytes > shutil.disk_usage(part.parent).free - spare_bytes:
        part.unlink(missing_ok=True)
        raise DownloadError(f"{url}: {wanted_bytes >> 20} MiB more are more than there is room for; free space first")


def _append(url: str, part: Path, size: int | None, progress: Progress) -> bool:
    """One connection; whether everything is there now."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - http(s), see fetch
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310 - http(s), see fetch
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        error.close()
        if size is None:  # nothing beyond what is there: the hash decides
            return True
        part.unlink()
        return False
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server that knows no ranges begins again
        length = response.length
        total = size if length is None or size is not None else have + length
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            progress(have, total)
            while block := response.read1(_BLOCK_BYTES):
                have += len(block)
                if have > (total or MAX_BYTES):
                    file.truncate(0)
                    raise DownloadError(f"{url}: sends more than the {total or MAX_BYTES} bytes expected; wrong mirror")
                file.write(block)
                progress(have, total)
        return total is None or have == total

"""Keeps utterances that are heard and not yet committed where a restart finds them again: in memory that systemd holds.

Law:

- No audio reaches a file system. An utterance lies in a memory file (memfd_create) whose descriptor the service manager
  keeps (FileDescriptorStoreMax=) from its end until it is settled, over every way in which the process can end. It
  vanishes when the service is stopped and when the machine goes down. Without systemd nothing is kept.
- What was begun :data:`ATTEMPTS` times and never understood is not begun again: it may be what ends the process. What
  is understood and waits for a disk was not what ended it, however often it comes back.
- What was committed but not settled in time is understood again and committed under the same message ids.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from typing import Final

from edge_asr import systemd
from edge_asr.events import Utterance

log = logging.getLogger(__name__)

ATTEMPTS: Final = 2

_NAME: Final = "utterance"
"""Prefix of the descriptors' names in the store."""


class Spool:
    """The utterances under way."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        """Utterance id -> its memory file: a byte that counts attempts, a line of JSON, the audio."""
        self.recovered: tuple[Utterance, ...] = tuple(sorted(self._recover(), key=lambda each: each.ended_ns))
        """What the process before this one did not settle, oldest first."""
        if self.recovered:
            log.warning("recognizing %d utterances again that a restart interrupted", len(self.recovered))

    def keep(self, utterance: Utterance) -> None:
        """Hold an utterance until :meth:`settle`."""
        file = os.memfd_create(_NAME)
        head = {key: value for key, value in asdict(utterance).items() if key != "pcm"}
        os.writev(file, [b"\0", json.dumps(head).encode() + b"\n", utterance.pcm])
        if systemd.store(f"{_NAME}-{utterance.id}", file):
            self._files[utterance.id] = file
        else:
            os.close(file)

    def begin(self, utterance: Utterance) -> bool:
        """Count an attempt; False: it has had all of them."""
        file = self._files.get(utterance.id)
        if file is None:
            return True
        attempts = os.pread(file, 1, 0)[0] + 1
        os.pwrite(file, bytes([attempts]), 0)
        return attempts <= ATTEMPTS

    def forgive(self, utterance: Utterance) -> None:
        """Count no attempt any more: it was understood, and nothing ended."""
        file = self._files.get(utterance.id)
        if file is not None:
            os.pwrite(file, b"\0", 0)

    def settle(self, utterance: Utterance) -> None:
        """Let go of an utterance: everything that came of it is committed."""
        file = self._files.pop(utterance.id, None)
        if file is not None:
            systemd.forget(f"{_NAME}-{utterance.id}")
            os.close(file)

    def _recover(self) -> list[Utterance]:
        found = []
        for name, file in systemd.stored():
            try:
                head, _, pcm = os.pread(file, os.fstat(file).st_size, 0)[1:].partition(b"\n")
                utterance = Utterance(pcm=pcm, **json.loads(head))
            except (ValueError, TypeError, OSError) as error:  # of another version of this program
                log.warning("a kept utterance cannot be read and is lost: %s", error)
                systemd.forget(name)
                os.close(file)
            else:
                self._files[utterance.id] = file
                found.append(utterance)
        return found

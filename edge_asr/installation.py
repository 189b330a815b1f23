"""Decides what becomes of a model on this box: imported, activated, rolled back, removed.

Law: a model enters the store whole, checked and under its manifest's name, or not at all (it is put together in a
hidden folder and renamed). Which model is in use is one small file that is exchanged atomically; the model before it
is remembered. A newly activated model is on probation until the daemon has heard its golden recording with it: one
that cannot be loaded, or with which the daemon died :data:`TRIALS` times, makes way for the one before it by itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_asr import archive, model_store
from edge_asr.archive import ArchiveError
from edge_asr.model_store import EMBEDDED, MANIFEST, Manifest, ModelError
from edge_asr.settings import Settings
from edge_asr.whole_file import replace_file, sync

log = logging.getLogger(__name__)

SIGNATURE: Final = f"{MANIFEST}.sig"
"""64 bytes: Ed25519 over the manifest's bytes; the manifest holds the hash of everything else."""

TRIALS: Final = 3
"""Starts that a new model may cost: a native library may end the process, and systemd then starts us again."""

_STATE: Final = "active.json"
_STAGING: Final = ".staging-"
_REMOVED: Final = ".removed-"
SPARE_BYTES: Final = 64 * 1024 * 1024
"""Left free on the disk by a download and an import: the outbox needs to go on."""

_TEXTS: Final = ("LICENSE", "README")


class _Choice(BaseModel):
    """Which model is in use, and which was before; None: the embedded one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    active: str | None = None
    previous: str | None = None
    proven: bool = True
    """Whether the daemon has worked with it."""
    starts: int = 0
    """How often the daemon began to, while it was not proven."""


def chosen(options: Settings) -> str:
    """Name or path of the model to use: the settings' own, else the active one. Raises ModelError."""
    return options.model.name or Store(options.models_directory).active


class Store:
    """The models in one folder beside the outbox; every method may be called while the daemon runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def active(self) -> str:
        """Name of the model in use where the settings name none. Raises ModelError."""
        return self._choice().active or EMBEDDED

    @property
    def proven(self) -> bool:
        """Whether the daemon has worked with the active model."""
        return self._choice().proven

    def manifests(self) -> tuple[Manifest, ...]:
        """The imported models. Raises ModelError."""
        return model_store.manifests_in(self.folder)

    def add(self, path: Path, signed_by: Path | None = None) -> Manifest:
        """Import a folder or an archive (tar, tar.gz, tar.bz2, zip); raises ModelError and leaves nothing behind."""
        # Unpacking may take minutes, in which the daemon must be able to count its start: that lock is another.
        with self._locked(".import.lock"), self._hidden_folder(_STAGING) as staging:
            room_bytes = max(0, shutil.disk_usage(self.folder).free - SPARE_BYTES)
            try:
                if path.is_dir():
                    _copy(path, staging, room_bytes)
                else:
                    archive.unpack(path, staging, _is_wanted, room_bytes)
                manifest = self._checked(path, staging, signed_by)
            except ArchiveError as error:
                raise ModelError(str(error)) from None
            except ModelError as error:  # it speaks of a folder that is about to vanish
                raise ModelError(str(error).replace(str(staging), str(path))) from None
            _sync(staging)
            with self.changing():
                staging.rename(self.folder / manifest.name)
                sync(self.folder)
        return manifest

    def _checked(self, path: Path, staging: Path, signed_by: Path | None) -> Manifest:
        """The manifest of what was staged; written where there was none. Raises ModelError."""
        check_signature(staging, signed_by)
        manifest = model_store.locate(str(staging)).manifest
        if not (staging / MANIFEST).exists():
            if not manifest.verified:
                manifest = manifest.model_copy(update={"name": model_store.plain_name(path)})
            (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        listed = {*manifest.files, MANIFEST, SIGNATURE}
        for entry in staging.iterdir():
            if entry.name not in listed and not entry.name.startswith(_TEXTS):
                entry.unlink()
        taken = {each.name for each in (*model_store.bundled_manifests(), *self.manifests())}
        if manifest.name in taken:
            raise ModelError(f"{manifest.name}: is installed already; `edge-asr models remove {manifest.name}` first")
        return manifest

    def activate(self, name: str) -> None:
        """Use a model from the next reload or start on; the one in use until now is remembered. Raises ModelError."""
        with self.changing():
            old = self._choice()
            new = None if name == EMBEDDED else name
            if new != old.active:
                self._choose(_Choice(active=new, previous=old.active, proven=new is None))

    def roll_back(self) -> str:
        """Use the model before the present one again, and return its name. Raises ModelError."""
        with self.changing():
            old = self._choice()
            if old.active is None and old.previous is None:
                raise ModelError("no other model was active before; see `edge-asr models list`")
            self._choose(_Choice(active=old.previous, previous=old.active))
        return old.previous or EMBEDDED

    def remove(self, name: str) -> None:
        """Delete an imported model that is not in use. Raises ModelError."""
        with self.changing():
            if name not in {manifest.name for manifest in self.manifests()}:
                raise ModelError(f"{name}: is not an imported model; see `edge-asr models list`")
            choice = self._choice()
            if name == choice.active:
                raise ModelError(f"{name}: is in use; activate another or type `edge-asr models rollback` first")
            if name == choice.previous:
                self._choose(choice.model_copy(update={"previous": None}))
            with self._hidden_folder(_REMOVED) as hidden:
                (self.folder / name).rename(hidden / name)  # gone at once, even if deleting is interrupted

    def begin(self) -> str | None:
        """Count a start with an unproven model; the name of one that has had its chances and was rolled back."""
        choice = self._choice()
        if choice.proven:
            return None
        with self.changing():
            if choice.starts >= TRIALS:
                self._choose(_Choice(active=choice.previous))
                return choice.active
            self._choose(choice.model_copy(update={"starts": choice.starts + 1}))
        return None

    def prove(self) -> None:
        """Say that the daemon works with the active model."""
        choice = self._choice()
        if not choice.proven:
            with self.changing():
                self._choose(choice.model_copy(update={"proven": True, "starts": 0}))

    def _choice(self) -> _Choice:
        path = self.folder / _STATE
        try:
            return _Choice.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Choice()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        except ValidationError:
            raise ModelError(f"{path}: is damaged; delete it and type `edge-asr models activate NAME`") from None

    def _choose(self, choice: _Choice) -> None:
        replace_file(self.folder / _STATE, choice.model_dump_json() + "\n")

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """One change at a time, and each is brief; what the file system refuses becomes one line."""
        with self._locked(".lock"):
            yield

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    _hand_over(self.folder)
        except OSError as error:
            place = error.filename or self.folder
            raise ModelError(f"{place}: {error.strerror}; check permissions and free space") from None

    @contextlib.contextmanager
    def _hidden_folder(self, prefix: str) -> Iterator[Path]:
        """For whoever has the lock; whatever is still in it afterwards is deleted, that of one who was killed too."""
        for left in self.folder.glob(f"{prefix}*"):
            shutil.rmtree(left)
        hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
        hidden.chmod(0o755)  # the service's user is another one
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


class Probation:
    """A beginning of the daemon's work with the model that is in use, which may be a newly activated one.

    It is the daemon that keeps these books: in a recognizer a slow disk would look like a hang of the model.
    """

    def __init__(self, options: Settings) -> None:
        self._store = Store(options.models_directory)
        self._is_named = options.model.name is not None
        self._candidate: str | None = None
        """The model that is tried; None: the one in use has worked before."""
        self.trouble = ""
        """Why a newly activated model had to make way; empty: it had not."""

    def begin(self) -> None:
        """Count a try; a model that has had all of them makes way. Raises ModelError."""
        if self._is_named or self._store.proven:
            self._candidate = None
            return
        self._candidate = self._store.active
        if self._store.begin() is not None:
            self._tell(f"the daemon ended {TRIALS} times with it")

    def fail(self, reason: str) -> bool:
        """Let a newly activated model make way; False: it is none. Raises ModelError."""
        if self._candidate is None:
            return False
        self._store.roll_back()
        self._tell(reason)
        return True

    def succeed(self) -> None:
        """The model works."""
        if self._candidate is not None:
            try:
                self._store.prove()
            except ModelError as error:
                log.warning("%s works, and stays on probation: %s", self._candidate, error)

    def _tell(self, reason: str) -> None:
        self.trouble = f"{self._candidate} is not used, {self._store.active} is again: {reason}"
        self._candidate = None


def check_signature(folder: Path, signed_by: Path | None) -> None:
    """Hold a manifest against the site's public key; without a key nothing is asked. Raises ModelError."""
    if signed_by is not None:
        from edge_asr import signature  # noqa: PLC0415 - 9 MB that only a site with a key needs

        signature.check(folder / MANIFEST, folder / SIGNATURE, signed_by)


def _is_wanted(name: str) -> bool:
    """Whether a file may belong to a model; recordings are golden ones."""
    suffixes = (".onnx", ".npz", ".txt", ".json", ".sig", ".wav", ".flac")
    return not name.startswith(".") and (name.endswith(suffixes) or name.startswith(_TEXTS))


def _copy(path: Path, staging: Path, room_bytes: int) -> None:
    files = sorted(entry for entry in path.iterdir() if _is_wanted(entry.name) and not entry.is_dir())
    for file in files:  # root reads what a link on a stick leads to, and the service's user gets it
        if not stat.S_ISREG(file.lstat().st_mode):
            raise ModelError(f"{file}: is a link or a device; models are plain files, copy it with `cp --dereference`")
    if sum(file.stat().st_size for file in files) > room_bytes:
        raise ModelError(f"{path}: {room_bytes >> 20} MiB of room are not enough for it; free space first")
    for file in files:
        shutil.copyfile(file, staging / file.name, follow_symlinks=False)


def _hand_over(folder: Path) -> None:
    """What root does here belongs to the service's user: the daemon must be able to say which model works."""
    if os.geteuid() == 0:
        owner = folder.parent.stat()
        lasting = [entry for entry in folder.iterdir() if not entry.name.startswith((_STAGING, _REMOVED))]
        for entry in (folder, *lasting, *(within for each in lasting for within in each.rglob("*"))):
            os.chown(entry, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Make sure that names and contents are on the disk before anything depends on them."""
    for entry in (*filter(Path.is_file, folder.iterdir()), folder):
        sync(entry)

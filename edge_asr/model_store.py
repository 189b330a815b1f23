"""Decides which model files may be loaded: where they lie, what they are, and whether they are whole.

Law: no byte of a model reaches a native library before its SHA-256 was compared with the manifest, because those
libraries end the whole process on files they do not understand. A directory without a manifest (a download of the
public SenseVoiceSmall) is recognized by hash where it can be, and looked through for everything that is known to kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_asr.posteriors import TokenTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MANIFEST = "manifest.json"
TOKENS = "tokens.txt"
LANGUAGE_MODEL = "language_model.npz"
UNVERIFIED = "unverified"
"""The version of a model that nobody vouches for."""

Language = Literal["zh", "en", "yue", "ja", "ko"]

EMBEDDED = "micro-en"
"""The bundled recognizer that is used until another is chosen."""

LANGUAGES: tuple[Language, ...] = ("zh", "en", "yue", "ja", "ko")
"""What SenseVoice's language tags can say."""

Provider = Literal["cpu", "cuda", "tensorrt"]
"""What runs a model, named as in the settings."""

_FLOATS = ("model.fp16.onnx", "model.onnx", "model.int8.onnx")
WEIGHTS: Mapping[Provider, tuple[str, ...]] = {
    "cpu": ("model.int8.onnx", "model.onnx", "model.fp16.onnx"),
    "cuda": _FLOATS,
    "tensorrt": _FLOATS,
}
"""Which of a model's files suits whom, the best first: 8-bit is the fastest on a CPU and slower than 32-bit on CUDA."""

_MODEL_NAMES = WEIGHTS["cpu"]
_CHUNK_BYTES = 1 << 20

# onnx.proto: ModelProto.graph, and the highest field number in use (26) with room to grow.
_ONNX_GRAPH = 7
_LAST_ONNX_FIELD = 40

# What sherpa-onnx looks up by name; a vocabulary without them is another model's and ends the process.
_TAGS = (*(f"<|{language}|>" for language in LANGUAGES), "<|nospeech|>", "<|withitn|>", "<|woitn|>")
_BLANKS = {"<blank>", "<blk>", "<unk>"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
"""A plain name: a manifest can never point out of its own directory."""


class ModelError(Exception):
    """A model cannot be used; the message is one line: the file, what is wrong, the remedy. Exit code 78."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManifestFile(_Record):
    """One file as it was released."""

    sha256: Sha256
    size: Annotated[int, Field(gt=0)]
    """Bytes; compared first, so that a truncated copy is called truncated."""


class Golden(_Record):
    """A recording that the model must hear right before it is let near a microphone."""

    audio: FileName
    """One of the model's files."""
    text: Annotated[str, Field(min_length=1)]


class Manifest(_Record):
    """What a model is, where it comes from and of which files it consists."""

    name: FileName
    """Of its folder, too."""
    version: str
    kind: Literal["sense-voice", "vad"]
    description: str
    languages: tuple[Language, ...] = ()
    licence: str
    """SPDX identifier, or the licence's own name."""
    origin: str
    files: Annotated[dict[FileName, ManifestFile], Field(min_length=1)]
    golden: Golden | None = None
    """None: a recognizer of English is held against the bundled golden recording, another against none."""

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        models = {name for name in self.files if name.endswith(".onnx")}
        several = len(models) > 1 and models <= set(_MODEL_NAMES)
        if (len(models) != 1 and not several) or (self.kind == "sense-voice" and TOKENS not in self.files):
            either = f"one .onnx file (or some of {', '.join(_MODEL_NAMES)})"
            raise ValueError(f"files must list {either} and, for a recognizer, {TOKENS}")
        if self.golden is not None and self.golden.audio not in self.files:
            raise ValueError(f"files must list golden.audio, {self.golden.audio}")
        return self

    @property
    def model_file(self) -> str:
        """Name of the ONNX file, of several the CPU's."""
        return self.weights("cpu")

    def weights(self, provider: Provider) -> str:
        """Name of the ONNX file that suits a provider best."""
        return next(
            (name for name in WEIGHTS[provider] if name in self.files),
            next(name for name in self.files if name.endswith(".onnx")),
        )

    @property
    def verified(self) -> bool:
        """Whether every file's hash is one that somebody released under this name."""
        return self.version != UNVERIFIED


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A recognition model whose files are whole."""

    model: Path
    tokens: Path
    manifest: Manifest
    sha256: str
    """Of the model file, as published in ``meta``."""

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.manifest.name

    @property
    def language_model(self) -> Path | None:
        """What the model brings to weigh words by; see ``language_model``."""
        return self.model.parent / LANGUAGE_MODEL if LANGUAGE_MODEL in self.manifest.files else None


_SENSE_VOICE_TOKENS = ManifestFile(
    sha256="f449eb28dc567533d7fa59be34e2abca8784f771850c78a47fb731a31429a1dc", size=315_894
)


def _release(date: str, description: str, sha256: str, size: int) -> Manifest:
    name = f"sherpa-onnx-sense-voice-zh-en-ja-ko-yue-int8-{date}"
    return Manifest(
        name=name,
        version=date,
        kind="sense-voice",
        description=description,
        languages=LANGUAGES,
        licence="FunASR Model License 1.1",
        origin=f"k2-fsa/sherpa-onnx, release asr-models, {name}.tar.bz2",
        files={"model.int8.onnx": ManifestFile(sha256=sha256, size=size), TOKENS: _SENSE_VOICE_TOKENS},
    )


PUBLIC_RELEASES = (
    _release(
        "2024-07-17",
        "SenseVoiceSmall, 8-bit: the one to take",
        "c71f0ce00bec95b07744e116345e33d8cbbe08cef896382cf907bf4b51a2cd51",
        239_233_841,
    ),
    _release(
        "2025-09-09",
        "SenseVoiceSmall, 8-bit, fine-tuned on Cantonese: no punctuation, weaker in every other language",
        "12ca1a2ae7ecf3e0019ef2822307ee0b5cadc9196569e379b4c4026f8205276d",
        237_115_547,
    ),
)
"""Downloads without a manifest that are recognized by the hash of their model file."""

RELEASE_ARCHIVES = {
    "sherpa-onnx-sense-voice-zh-en-ja-ko-yue-int8-2024-07-17.tar.bz2": ManifestFile(
        sha256="7d1efa2138a65b0b488df37f8b89e3d91a60676e416f515b952358d83dfd347e", size=163_002_883
    ),
    "sherpa-onnx-sense-voice-zh-en-ja-ko-yue-int8-2025-09-09.tar.bz2": ManifestFile(
        sha256="7305f7905bfcf77fa0b39388a313f3da35c68d971661a65475b56fb2162c8e63", size=165_783_878
    ),
}
"""What :data:`PUBLIC_RELEASES` are packed in."""


def bundled(what: Literal["models", "grammars", "recordings"]) -> Path:
    """Name the folder of what ships with the program: inside an installed wheel, else in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "bundled" / what
    if installed.is_dir():
        return installed
    return package.parent / ("models" if what == "models" else f"examples/{what}")


def bundled_manifests() -> tuple[Manifest, ...]:
    """List the bundled models by name; their files are not looked at."""
    return manifests_in(bundled("models"))


def manifests_in(folder: Path) -> tuple[Manifest, ...]:
    """List the models of a folder by name; their files are not looked at. Raises ModelError."""
    with _explained(folder):
        return tuple(read_manifest(path) for path in sorted(folder.glob(f"[!.]*/{MANIFEST}")))


def locate(name_or_path: str, installed: Path | None = None, provider: Provider | None = None) -> ModelFiles:
    """Find a recognition model and check every file of it. Raises ModelError.

    By its bundled name, its name in the folder of ``installed`` models, or the path of its directory. With a
    ``provider`` the weights are those that suit it, and files of others are not looked at; else the CPU's.
    """
    with _explained(name_or_path):
        folder = _folder(name_or_path, installed)
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder / MANIFEST)
            if manifest.kind != "sense-voice":
                raise ModelError(f"{folder}: is a {manifest.kind} model, not a recognizer; see `edge-asr models`")
            _verify(folder, manifest, provider)
        else:
            manifest = _recognize(folder, provider)
        _check_tokens(folder / TOKENS)
    name = manifest.weights(provider or "cpu")
    return ModelFiles(folder / name, folder / TOKENS, manifest, manifest.files[name].sha256)


def locate_vad(name: str = "silero-vad") -> Path:
    """Find a bundled speech detector's ONNX file and check it. Raises ModelError."""
    folder = bundled("models") / name
    with _explained(folder):
        manifest = read_manifest(folder / MANIFEST)
        _verify(folder, manifest)
    return folder / manifest.model_file


@contextlib.contextmanager
def _explained(place: object) -> Iterator[None]:
    """Whatever the file system refuses becomes one line; a failing disk does not say under which file it fails."""
    try:
        yield
    except OSError as error:
        found = error.filename or place
        raise ModelError(f"{found}: {error.strerror}; check that it is there and may be read") from None


def _folder(name_or_path: str, installed: Path | None) -> Path:
    store = bundled("models")
    names = sorted(path.parent.name for path in store.glob(f"*/{MANIFEST}"))
    if name_or_path in names:
        return store / name_or_path
    if installed is not None and "/" not in name_or_path and (installed / name_or_path / MANIFEST).is_file():
        return installed / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    known = f"expected a bundled model ({', '.join(names)}) or a directory with {_MODEL_NAMES[0]} and {TOKENS}"
    if not folder.exists():
        raise ModelError(f"{name_or_path}: no such model; {known}")
    if folder.suffix in {".bz2", ".gz", ".tar", ".tgz", ".zip"}:
        raise ModelError(f"{folder}: is an archive; type `edge-asr models import {folder}`")
    raise ModelError(f"{folder}: is a file; {known}")


def read_manifest(path: Path) -> Manifest:
    """Read what a model's folder says of itself. Raises ModelError."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ModelError(f"{path}: {key + ': ' if key else ''}{problem['msg']}; install the model again") from None


def _verify(folder: Path, manifest: Manifest, provider: Provider | None = None) -> None:
    """Compare every file with the manifest; of several weights, those of a provider alone."""
    for name, expected in manifest.files.items():
        if provider is not None and name.endswith(".onnx") and name != manifest.weights(provider):
            continue
        path = folder / name
        size, remedy = _size(path), f"install {manifest.name} {manifest.version} again"
        if size < expected.size:
            raise ModelError(f"{path}: truncated, {size} of {expected.size} bytes; {remedy}")
        actual = sha256_of(path)
        if actual != expected.sha256:
            raise ModelError(f"{path}: SHA-256 is {actual[:12]}..., {expected.sha256[:12]}... was released; {remedy}")


def _recognize(folder: Path, provider: Provider | None) -> Manifest:
    """Write the manifest that a directory lacks."""
    tokens = folder / TOKENS
    models = [folder / name for name in WEIGHTS[provider or "cpu"] if (folder / name).exists()]
    if not models:
        raise ModelError(f"{folder / _MODEL_NAMES[0]}: missing; copy it from the model's archive")
    if provider is not None:
        del models[1:]
    for model in models:
        _check_onnx(model)
    beside = [path for path in (folder / LANGUAGE_MODEL,) if path.exists()]
    found = {path.name: ManifestFile(size=_size(path), sha256=sha256_of(path)) for path in (*models, tokens, *beside)}
    for release in PUBLIC_RELEASES:
        if release.files["model.int8.onnx"] == found.get("model.int8.onnx"):
            if release.files[TOKENS] != found[TOKENS]:
                raise ModelError(f"{tokens}: is not the one of {release.name}; copy it from the model's archive")
            return release.model_copy(update={"files": found})
    return Manifest(
        name=plain_name(folder),
        version=UNVERIFIED,
        kind="sense-voice",
        description="not a known release",
        languages=LANGUAGES,
        licence="unknown",
        origin="unknown",
        files=found,
    )


def plain_name(path: Path) -> str:
    """A name for a model that has none: of its folder or archive."""
    name = re.sub(r"\.(tar|tar\.gz|tgz|tar\.bz2|zip)$", "", path.resolve().name)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "model"


def _size(path: Path) -> int:
    """Bytes of a file that must be there."""
    if not path.is_file():
        raise ModelError(f"{path}: missing; copy it from the model's archive")
    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path}: empty; copy it from the model's archive")
    return size


def sha256_of(path: Path) -> str:
    """Hash a file in pieces: a model can be larger than a gateway's free memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_onnx(path: Path) -> None:
    """Walk the outermost protobuf fields: a foreign file breaks off at once, a truncated one ends inside a field."""
    size = _size(path)
    fields: set[int] = set()
    with path.open("rb") as file, contextlib.suppress(EOFError):
        while file.tell() < size:
            field, wire_type = divmod(_varint(file), 8)
            if wire_type not in {0, 2} or not 1 <= field <= _LAST_ONNX_FIELD:
                file.seek(0)
                raise ModelError(f"{path}: is not an ONNX model, it begins with {file.read(24)!r}; download it again")
            value = _varint(file)
            if wire_type == 2:
                file.seek(value, os.SEEK_CUR)
            fields.add(field)
        if file.tell() == size and _ONNX_GRAPH in fields:
            return
    raise ModelError(f"{path}: truncated or damaged ({size} bytes); copy it from the model's archive")


def _varint(file: BinaryIO) -> int:
    """One protobuf base-128 integer of at most 64 bits. Raises EOFError."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value


def _check_tokens(path: Path) -> None:
    """Look for everything in a vocabulary that ends sherpa-onnx's process or shifts every letter."""
    remedy = f"copy {TOKENS} from the model's archive"
    _size(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ModelError(f"{path}: is not text in UTF-8; {remedy}") from None
    if "\t" in text.partition("\n")[0]:
        raise ModelError(f"{path}: is a SentencePiece vocabulary (token, tab, score); {remedy}")
    try:
        tokens = TokenTable.parse(text).pieces
    except ValueError as error:
        raise ModelError(f"{path}: {error}; {remedy}") from None
    if tokens[0] not in _BLANKS:
        raise ModelError(f"{path}: begins with {tokens[0]!r} instead of the blank; {remedy}")
    missing = next((tag for tag in _TAGS if tag not in tokens), None)
    if missing:
        raise ModelError(f"{path}: has no {missing}, so it is not SenseVoice's; {remedy}")

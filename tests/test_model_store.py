"""Which model files may be loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_asr import model_store
from edge_asr.model_store import PUBLIC_RELEASES, ModelError, bundled, bundled_manifests, locate, locate_vad, sha256_of

MODEL = "model.int8.onnx"
MICRO = bundled("models") / "micro-en"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A bundled model with its manifest, free to be spoilt."""
    return Path(shutil.copytree(MICRO, tmp_path / "copy"))


@pytest.fixture
def download(copy: Path) -> Path:
    """The same files as a user's download has them: without a manifest."""
    (copy / "manifest.json").unlink()
    return copy


def refusal(name_or_path: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        locate(str(name_or_path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_bundled_model_is_whole_and_names_its_licence() -> None:
    assert [manifest.name for manifest in bundled_manifests()] == ["micro-en", "silero-vad"]
    for manifest in bundled_manifests():
        folder = bundled("models") / manifest.name
        listed = {name: (file.sha256, file.size) for name, file in manifest.files.items()}
        assert listed == {name: (sha256_of(folder / name), (folder / name).stat().st_size) for name in listed}
        assert manifest.licence == "MIT"
        assert "MIT" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_a_bundled_name_is_located_with_its_published_hash() -> None:
    files = locate("micro-en")
    assert (files.model, files.tokens) == (MICRO / MODEL, MICRO / "tokens.txt")
    assert (files.name, files.manifest.languages) == ("micro-en", ("en",))
    assert files.sha256 == sha256_of(MICRO / MODEL)
    assert files.manifest.verified


def test_the_bundled_speech_detector_is_located() -> None:
    assert locate_vad().name == "silero_vad.onnx"


def test_a_speech_detector_is_not_taken_for_a_recognizer() -> None:
    assert "not a recognizer" in refusal("silero-vad")


def test_an_installed_wheel_brings_its_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "edge_asr"
    shutil.copytree(MICRO.parent, package / "bundled" / "models")
    (package / "bundled" / "grammars").mkdir()
    monkeypatch.setattr(model_store, "__file__", str(package / "model_store.py"))
    assert bundled("grammars") == package / "bundled" / "grammars"
    assert locate("micro-en").model == package / "bundled" / "models" / "micro-en" / MODEL


def test_an_unknown_name_lists_the_names_there_are() -> None:
    assert refusal("micro-fr").startswith("micro-fr: no such model; expected a bundled model (micro-en")


def test_an_archive_is_refused_with_the_command_that_imports_it(tmp_path: Path) -> None:
    archive = tmp_path / "sense-voice.tar.bz2"
    archive.write_bytes(b"BZh9")
    assert f"`edge-asr models import {archive}`" in refusal(archive)


def test_a_model_file_in_place_of_its_directory_is_refused() -> None:
    assert "is a file; expected" in refusal(MICRO / MODEL)


@pytest.mark.parametrize("name", [MODEL, "tokens.txt"])
def test_one_flipped_bit_in_any_listed_file_is_noticed(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f"{copy / name}: SHA-256 is " in refusal(copy)


@pytest.mark.parametrize("name", [MODEL, "tokens.txt"])
def test_a_truncated_file_is_called_truncated(copy: Path, name: str) -> None:
    os.truncate(copy / name, 1000)
    assert f"{copy / name}: truncated, 1000 of " in refusal(copy)


@pytest.mark.parametrize(
    "deleted", [(MODEL,), ("tokens.txt",), (MODEL, "manifest.json"), ("tokens.txt", "manifest.json")]
)
def test_a_missing_file_is_called_missing(copy: Path, deleted: tuple[str, ...]) -> None:
    for name in deleted:
        (copy / name).unlink()
    assert refusal(copy).startswith(f"{copy / deleted[0]}: missing")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda tree: tree.pop("licence"), "licence: Field required"),
        (lambda tree: tree.update(colour="blue"), "colour: Extra inputs"),
        (lambda tree: tree["files"].pop("tokens.txt"), "must list one .onnx file (or some of "),
        (lambda tree: tree["files"].update({"../tokens.txt": tree["files"]["tokens.txt"]}), "files.../tokens.txt"),
        (lambda tree: tree["files"]["tokens.txt"].update(sha256="abc"), "files.tokens.txt.sha256: "),
    ],
)
def test_a_broken_manifest_is_refused_by_its_key(copy: Path, spoil: object, complaint: str) -> None:
    assert callable(spoil)
    tree = json.loads((copy / "manifest.json").read_bytes())
    spoil(tree)
    (copy / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    message = refusal(copy)
    assert message.startswith(f"{copy / 'manifest.json'}: ")
    assert complaint in message


def test_a_manifest_that_is_not_json_is_refused(copy: Path) -> None:
    (copy / "manifest.json").write_text("{", encoding="utf-8")
    assert "manifest.json: Invalid JSON" in refusal(copy)


def test_a_directory_without_a_manifest_is_accepted_as_unverified(download: Path) -> None:
    files = locate(str(download))
    assert (files.name, files.manifest.version, files.manifest.verified) == ("copy", "unverified", False)
    assert files.sha256 == sha256_of(MICRO / MODEL)


def test_a_language_model_is_one_of_the_models_files_and_may_be_missing(copy: Path) -> None:
    with_manifest = locate(str(copy))
    assert with_manifest.language_model == copy / "language_model.npz"
    (copy / "manifest.json").unlink()
    assert locate(str(copy)).language_model == copy / "language_model.npz"
    (copy / "language_model.npz").unlink()
    assert locate(str(copy)).language_model is None


def test_an_unquantized_model_is_found_under_its_own_name(download: Path) -> None:
    (download / MODEL).rename(download / "model.onnx")
    assert locate(str(download)).model.name == "model.onnx"


def test_a_public_release_is_recognized_by_the_hash_of_its_model(
    download: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (micro,) = (manifest for manifest in bundled_manifests() if manifest.name == "micro-en")
    ours = {name: micro.files[name] for name in (MODEL, "tokens.txt")}
    (download / "language_model.npz").unlink()
    release = PUBLIC_RELEASES[0].model_copy(update={"files": ours})
    monkeypatch.setattr(model_store, "PUBLIC_RELEASES", (PUBLIC_RELEASES[1], release))
    assert locate(str(download)).manifest == release
    with (download / "tokens.txt").open("a", encoding="utf-8") as tokens:
        tokens.write("extra 526\n")
    assert f"tokens.txt: is not the one of {release.name}" in refusal(download)


def test_the_public_vocabulary_is_the_one_pinned_here(download: Path) -> None:
    public = Path(__file__).parents[2] / "shared/data/sensevoice-vocabulary/tokens.txt"
    if not public.exists():
        pytest.skip("the public vocabulary may not be committed; ../shared does not have it")
    shutil.copy(public, download / "tokens.txt")
    pinned = PUBLIC_RELEASES[0].files["tokens.txt"]
    assert (sha256_of(public), public.stat().st_size) == (pinned.sha256, pinned.size)
    assert locate(str(download)).tokens == download / "tokens.txt"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is not an ONNX model, it begins with b'version https://git-lfs.",
        ),
        (b"<!DOCTYPE html><title>404</title>", "is not an ONNX model"),
        (b"PK\x03\x04\x14", "is not an ONNX model"),
        (b"\x08\x08", "truncated or damaged"),
    ],
)
def test_a_foreign_file_in_place_of_the_model_is_refused(download: Path, content: bytes, complaint: str) -> None:
    (download / MODEL).write_bytes(content)
    message = refusal(download)
    assert message.startswith(f"{download / MODEL}: ")
    assert complaint in message


@example(kept=25)  # right behind the tag of the graph
@given(kept=st.integers(min_value=1, max_value=(MICRO / MODEL).stat().st_size - 1))
def test_a_download_cut_off_anywhere_is_noticed_without_a_hash(
    tmp_path_factory: pytest.TempPathFactory, kept: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / MODEL).write_bytes((MICRO / MODEL).read_bytes()[:kept])
    (folder / "tokens.txt").symlink_to(MICRO / "tokens.txt")
    assert f"{folder / MODEL}: truncated or damaged" in refusal(folder)


@given(content=st.binary(max_size=300))
def test_no_garbage_passes_for_a_model(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("garbage")
    (folder / MODEL).write_bytes(content)
    (folder / "tokens.txt").write_text("no tokens\n", encoding="utf-8")
    refusal(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x80\x81\xff", "is not text in UTF-8"),
        ("<unk>\t0\n\u2581a\t-3.5\n".encode(), "is a SentencePiece vocabulary"),
        (b"<unk> 0\na 2\n", "line 2: 'a 2'"),
        (b"<unk> 0\na\n", "line 2: 'a'"),
        (b"a 0\n<unk> 1\n", "begins with 'a' instead of the blank"),
        (b"<blk> 0\na 1\n", "has no <|zh|>"),
    ],
)
def test_tokens_that_would_end_the_process_are_refused(download: Path, content: bytes, complaint: str) -> None:
    (download / "tokens.txt").write_bytes(content)
    message = refusal(download)
    assert message.startswith(f"{download / 'tokens.txt'}: ")
    assert complaint in message


def test_a_file_system_that_refuses_is_one_line(download: Path) -> None:
    (download / MODEL).unlink()
    (download / MODEL).symlink_to(MODEL)
    assert refusal(download).startswith(f"{download / MODEL}: ")

"""Which graph of a model runs on this CPU: made, proven and kept by the real onnxruntime in a real process."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from edge_asr import model_store, prepared, settings
from edge_asr.audio import read_file
from edge_asr.inference import OnnxRecognizer
from edge_asr.model_store import EMBEDDED, ModelError, ModelFiles, sha256_of
from edge_asr.prepared import FOLDER, Heard, Record, cpu_features, find, forget, key_of, objection, prepare
from tests.sense_voice import SenseVoice
from tests.test_cli import typed

GOLDEN = model_store.bundled("recordings") / "golden.flac"
OPTIONS = settings.Model()


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return model_store.locate(EMBEDDED)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where somebody was killed while preparing a model."""
    folder = tmp_path_factory.mktemp("state") / "models"
    (folder / FOLDER / ".making-half").mkdir(parents=True)
    (folder / FOLDER / ".making-half/model.fused").write_bytes(b"half")
    return folder


@pytest.fixture(scope="module")
def record(installed: Path) -> Record:
    """The embedded model, prepared."""
    return prepare(EMBEDDED, installed)


def graph_of(installed: Path, sha256: str) -> Path:
    return installed / FOLDER / sha256 / "model.onnx"


def test_a_prepared_model_hears_the_same_within_the_bound(files: ModelFiles, installed: Path, record: Record) -> None:
    graph = find(files, installed, OPTIONS)
    if record.variant == "own":  # on a CPU where nothing is faster
        assert graph is None
        return
    assert graph == graph_of(installed, files.sha256)
    own, ours = (OnnxRecognizer(files, OPTIONS, each).recognize(read_file(GOLDEN)) for each in (None, graph))
    assert ours.transcript.text == own.transcript.text
    assert own.log_posteriors is not None
    assert ours.log_posteriors is not None
    distance = np.abs(np.exp(own.log_posteriors) - np.exp(ours.log_posteriors)).sum(axis=1).mean() / 2
    assert distance <= 2 * prepared.FARTHEST  # the bound is over more recordings than this one


def test_nothing_is_left_lying_about(files: ModelFiles, installed: Path, record: Record) -> None:
    assert [path.name for path in (installed / FOLDER).iterdir()] == [files.sha256]
    kept = {path.name for path in (installed / FOLDER / files.sha256).iterdir()}
    assert kept == ({"record.json"} if record.variant == "own" else {"record.json", "model.onnx"})


@pytest.mark.parametrize(
    "other",
    [{"optimized": False}, {"provider": "cuda"}, {"engine": "sherpa-onnx"}],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_run_the_models_own_graph(
    files: ModelFiles, installed: Path, record: Record, other: dict[str, object]
) -> None:
    assert record.key == key_of(files, cpu_features())
    assert find(files, installed, settings.Model.model_validate(other)) is None


def test_another_cpu_and_another_model_ask_for_another_proof(files: ModelFiles) -> None:
    here = key_of(files, {"avx2", "avx512_vnni"})
    assert key_of(files, {"avx512_vnni", "avx2"}) == here
    assert key_of(files, {"avx2"}) != here
    other = ModelFiles(files.model, files.tokens, files.manifest, "0" * 64)
    assert key_of(other, {"avx2", "avx512_vnni"}) != here


def test_what_was_found_on_another_cpu_is_not_used(files: ModelFiles, tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / files.sha256
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(files.model.read_bytes())
    elsewhere = Record(key=key_of(files, {"neon"}), model=EMBEDDED, variant="exact", sha256=files.sha256)
    (folder / "record.json").write_text(elsewhere.model_dump_json(), encoding="utf-8")
    assert find(files, tmp_path, OPTIONS) is None


@pytest.mark.parametrize("spoilt", ["changed", "gone"])
def test_a_prepared_graph_that_is_not_what_was_proven_is_not_used(
    files: ModelFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: str
) -> None:
    graph = graph_of(tmp_path, files.sha256)
    graph.parent.mkdir(parents=True)
    graph.write_bytes(files.model.read_bytes())
    proven = Record(key=key_of(files, cpu_features()), model=EMBEDDED, variant="exact", sha256=sha256_of(graph))
    (graph.parent / "record.json").write_text(proven.model_dump_json(), encoding="utf-8")
    assert find(files, tmp_path, OPTIONS) == graph
    if spoilt == "changed":
        with graph.open("r+b") as file:
            file.seek(100_000)
            file.write(b"!")
    else:
        graph.unlink()
    with caplog.at_level(logging.WARNING):
        assert find(files, tmp_path, OPTIONS) is None
    assert "type `edge-asr models optimize`" in caplog.text


def heard(*words: str, cpu_s: float = 1.0, shift: float = 0.0) -> Heard:
    """One recording, one word per frame, with ``shift`` of the probability elsewhere."""
    row = np.log(np.array([[1 - 0.1 - shift, 0.1 + shift]], np.float32))
    return Heard(words[0], [list(words)], [np.repeat(row, max(1, len(words)), axis=0)], cpu_s)


SAID = [f"word{index}" for index in range(200)]
WRONG = ["wrong"] * 3


@pytest.mark.parametrize(
    ("variant", "other", "reason"),
    [
        ("close", heard(*SAID, cpu_s=0.5, shift=0.01), ""),
        ("close", heard(*SAID[:-2], "wrong", "wrong", cpu_s=0.5), ""),
        ("close", heard(*SAID[:-3], *WRONG, cpu_s=0.5), "98.5% of the tokens are the same, less than 99%"),
        (
            "close",
            heard("other", *SAID[1:]),
            "hears 'other' in the golden recording, where its own graph hears 'word0'",
        ),
        ("close", heard(*SAID, cpu_s=0.5, shift=0.05), "posteriors differ by 0.050, more than 0.02"),
        ("close", heard(*SAID, cpu_s=0.99), "needs 0.99 of the CPU time"),
        ("close", heard(*SAID, cpu_s=0.5, shift=float("nan")), "posteriors differ by nan, more than 0.02"),
        ("exact", heard(*SAID, cpu_s=0.5), ""),
        ("exact", heard(*SAID, cpu_s=0.5, shift=1e-6), "is not the same in every bit"),
    ],
)
def test_a_variant_is_refused_for_what_it_does_worse(variant: prepared.Variant, other: Heard, reason: str) -> None:
    assert objection(variant, heard(*SAID), other) == reason


def test_a_model_that_rounding_disturbs_keeps_an_exact_graph_or_its_own(tmp_path: Path) -> None:
    """Random weights amplify every rounding, so the close variant cannot be proven."""
    given = tmp_path / "random"
    given.mkdir()
    tokens = (model_store.bundled("models") / EMBEDDED / "tokens.txt").read_text(encoding="utf-8")
    (given / "tokens.txt").write_text(tokens, encoding="utf-8")
    SenseVoice(3, 1, len(tokens.splitlines())).save(given / "model.int8.onnx")
    found = prepare(f"{given}/", tmp_path / "models")
    assert found.variant in {"exact", "own"}
    assert found.refused[0].startswith("close: ")
    assert (found.agreement, found.distance) == (1, 0)


def test_what_cannot_be_prepared_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model"):
        prepare("nowhere", tmp_path)
    given = tmp_path / "floats"
    given.mkdir()
    (given / "tokens.txt").write_text("<unk> 0\n", encoding="utf-8")
    (given / "model.onnx").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match=r"model\.onnx: is not an ONNX model"):
        prepare(f"{given}/", tmp_path)


def test_typed_it_says_what_came_of_it(tmp_path: Path) -> None:
    done = typed("models", "optimize", STATE_DIRECTORY=str(tmp_path))
    assert (done.returncode, done.stdout.startswith(f"{EMBEDDED}: ")) == (0, True)
    assert "of the CPU time" in done.stdout or "its own graph stays" in done.stdout


def test_what_is_forgotten_is_deleted(files: ModelFiles, tmp_path: Path) -> None:
    folder = tmp_path / FOLDER / files.sha256
    folder.mkdir(parents=True)
    forget(files.sha256, tmp_path)
    assert not folder.exists()
    forget(files.sha256, tmp_path)

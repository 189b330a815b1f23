"""tools/package-sensevoice: from what FunASR's fine-tuning leaves to a model that `edge-asr models import` takes.

The checkpoint becomes float ONNX with sherpa-onnx's metadata, then 8 bits; sherpa-onnx and our engine must read the
same text and tags from recordings with it, or nothing is packaged and the exit code is 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch

from edge_asr import evaluation, model_store
from edge_asr.audio import AudioFileError, read_file, to_float
from edge_asr.evaluation import ManifestError
from edge_asr.model_store import ModelError
from training import export, prove, sense_voice

PIECES = "chn_jpn_yue_eng_ko_spectok.bpe.model"
LICENCE = "FunASR Model License 1.1"
ORIGIN = "SenseVoiceSmall by FunAudioLLM (Alibaba Group), fine-tuned; packaged by edge-asr's tools/package-sensevoice"
RANDOM = "random weights: SenseVoiceSmall's shape and nothing that was learned; hears nothing"
RANDOM_TAGS = (("en",), ("HAPPY", "EMO_UNKNOWN"), ("Speech", "BGM"), ("woitn",))
AGREEMENT = 0.96
"""Share of recordings with equal text and tags; two versions of onnxruntime round differently (``prepared``)."""


def rehearse(checkpoint: Path, vocabulary: Sequence[str]) -> None:
    """Write random weights as FunASR writes learned ones."""
    tags = [[vocabulary.index(f"<|{name}|>") for name in names] for names in RANDOM_TAGS]
    shape = sense_voice.Shape(vocabulary=len(vocabulary))
    torch.save({"state_dict": sense_voice.rehearsal(shape, tags).state_dict()}, checkpoint)


def package(options: argparse.Namespace) -> int:
    """Write the package, whole or not at all; exit code. Raises what the files of the options are refused for."""
    part: Path = options.out.with_name(f"{options.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        return _package(options, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _package(options: argparse.Namespace, out: Path) -> int:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(options.release / PIECES))
    vocabulary = [pieces.id_to_piece(at) for at in range(pieces.vocab_size())]
    mean, deviation = sense_voice.normalization(options.release / "am.mvn")
    if options.rehearse:
        rehearse(options.checkpoint, vocabulary)
    network = sense_voice.restored(options.checkpoint)
    if network.shape.vocabulary != len(vocabulary):
        raise ValueError(f"{options.checkpoint}: has {network.shape.vocabulary} tokens, {PIECES} {len(vocabulary)}")
    out.mkdir(parents=True)
    tokens = (f"{piece} {at}\n" for at, piece in enumerate(vocabulary))
    (out / model_store.TOKENS).write_text("".join(tokens), encoding="utf-8")
    comment = RANDOM if options.rehearse else "SenseVoiceSmall, fine-tuned"
    about = export.metadata(mean.tolist(), deviation.tolist(), network.shape.vocabulary, comment, "FunAudioLLM")
    whole, small = out / "model.onnx", out / "model.int8.onnx"
    export.write(network, whole, about)
    print(f"{whole.name}: {whole.stat().st_size / 1e6:.1f} MB", flush=True)
    export.eight_bits(whole, small, about)
    print(f"{small.name}: {small.stat().st_size / 1e6:.1f} MB", flush=True)
    if not options.floats:
        whole.unlink()
    items = [item for path in options.manifest for item in evaluation.read_manifest(path)]
    clips = [to_float(read_file(item.audio)) for item in items[: prove.FILES]]
    equal, count = prove.contract(out, clips)
    print(f"text and tags equal in sherpa-onnx and our engine: {equal} of {count}", flush=True)
    if equal < AGREEMENT * count:
        print(f"{options.out}: is not packaged, the engines disagree", file=sys.stderr)
        return 1
    licence, origin = ("none: nothing was learned", RANDOM) if options.rehearse else (LICENCE, ORIGIN)
    description = f"{comment}; sherpa-onnx reads the same from {equal} of {count} recordings"
    export.describe(out, options.name, description, options.languages, licence, origin)
    out.rename(options.out)
    print(f"{options.out}: written; `edge-asr models import {options.out}` takes it", flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/package-sensevoice", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="FunASR's outputs/model.pt.avg5, or the release's model.pt")
    parser.add_argument("release", type=Path, help=f"SenseVoiceSmall's folder, for its am.mvn and {PIECES}")
    parser.add_argument("out", type=Path, help="the package's folder, which must not exist")
    parser.add_argument("--name", default="SenseVoiceSmall-site", help="its licence asks to keep SenseVoiceSmall in it")
    parser.add_argument("--languages", nargs="+", default=model_store.LANGUAGES, choices=model_store.LANGUAGES)
    parser.add_argument(
        "--manifest",
        type=Path,
        action="append",
        required=True,
        help="recordings to prove it on, as for `edge-asr eval`",
    )
    parser.add_argument("--floats", action="store_true", help="keep the 32-bit file, too: faster on CUDA")
    parser.add_argument("--rehearse", action="store_true", help="first write random weights to CHECKPOINT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in (options.out, *([options.checkpoint] if options.rehearse else [])):
        if path.exists():
            parser.exit(2, f"{path}: exists already; name another\n")
    try:
        sys.exit(package(options))
    except (ValueError, OSError, AudioFileError, ManifestError, ModelError) as error:
        parser.exit(78, f"tools/package-sensevoice: {error}\n")


if __name__ == "__main__":
    main()

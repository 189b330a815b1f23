"""tools/train: the steps from packages to the shipped model, each resumable, or all of them in a row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from edge_asr.model_store import LANGUAGE_MODEL
from training import (
    evaluate,
    export,
    fit,
    front,
    language_model,
    mine,
    network,
    people,
    prove,
    restore,
    texts,
    tokens,
    voices,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODELS = Path(__file__).resolve().parents[2] / "models"
SAID = {"espeak": 13500, "flite": 14500, "festival": 5500, "kokoro": 9000}
"""Utterances of each synthesizer: twenty-five hours; kokoro's take two hours of CPU, the others' one."""
SAID_MISREAD = {"kokoro": 400, "flite": 600, "espeak": 600, "festival": 300}
"""Utterances of what `mine` found, for which they all need half an hour of CPU."""
TURNS = 5
"""Parts in which they are made, so that an interrupted synthesis leaves some of every synthesizer."""
FOLDS = "0123456789"


def synthesize(work: Path) -> None:
    misread, seed = mine.read(work / mine.MISREAD), mine.seed_of(work / mine.MISREAD)
    for speaker, count in SAID_MISREAD.items() if misread else ():
        voices.synthesize(work / "said", speaker, count, seed, lambda random: random.choice(misread))
    for turn in range(1, TURNS + 1):
        for speaker, count in SAID.items():
            voices.synthesize(work / "said", speaker, count * turn // TURNS, 1, texts.draw)


def prepare(work: Path) -> None:
    """The token table and the front, from the texts and some of the voices, once: what was trained depends on them."""
    if (work / "front.pt").exists():
        print(f"{work / 'front.pt'}: is there already, and kept", flush=True)
        return
    tokens.train(work / "pieces.model")
    shards = sorted((work / "said").glob("*.npz"))
    if not shards:
        raise SystemExit(f"{work / 'said'}: nobody has said anything yet; run `tools/train synthesize` first")
    generator = np.random.default_rng(0)
    clips = []
    for shard in shards:
        audio = voices.read_shard(shard)[0].audio.astype(np.float32) / 32768
        clips.append(np.asarray(audio + generator.normal(0, 3e-4, audio.size), np.float32))
    power_map, neg_mean, inv_stddev = front.fit(clips)
    fitted = {"power_map": power_map, "neg_mean": neg_mean, "inv_stddev": inv_stddev}
    network.save(fitted, work / "front.pt")


def train(work: Path, options: argparse.Namespace) -> None:
    recorded = [each for path in options.people for each in people.utterances(path, options.without)]
    rates = {"head_rate": options.rates[0], "encoder_rate": options.rates[1]} if options.rates else {}
    alone = {"head_alone": 0.0} if options.start else {}  # a head that has learned need not wait for the encoder
    plan = fit.Plan(minutes=options.minutes, size=options.size, **rates, **alone)
    torch.set_num_threads(options.threads)
    run = fit.Run(work, options.name, plan, options.start)
    run.train(fit.Stream(work, options.noise, plan, recorded, options.folds, last=options.last))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/train", description=__doc__)
    parser.add_argument(
        "step",
        choices="all mine synthesize prepare restore train blend export language-model describe prove evaluate".split(),
    )
    parser.add_argument("work", type=Path, help="where everything that is made goes; a run goes on from what is there")
    parser.add_argument("--noise", type=Path, action="append", default=[], help="a folder of recordings of noise")
    parser.add_argument(
        "--folds", default=FOLDS, help="train on noise whose names start with one of these; `evaluate` on the rest"
    )
    parser.add_argument("--people", type=Path, action="append", default=[], help="manifest of {audio, text, speaker}")
    parser.add_argument("--without", action="append", default=[], help="a speaker to leave out, to measure on")
    parser.add_argument("--minutes", type=float, default=70.0, help="of training (default: %(default)s)")
    parser.add_argument(
        "--size", choices=tuple(fit.SIZES), default="base", help="Whisper's encoder (default: %(default)s)"
    )
    parser.add_argument("--rates", type=float, nargs=2, metavar=("HEAD", "ENCODER"), help="peaks of the learning rates")
    parser.add_argument("--last", action="store_true", help="more commands and more people: for a last, short run")
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with, for a second run")
    parser.add_argument(
        "--of", nargs=2, action="append", default=[], metavar=("NAME", "SHARE"), help="a checkpoint to blend"
    )
    parser.add_argument(
        "--package",
        type=Path,
        default=MODELS / "micro-en",
        help="what `restore` restores and `mine` asks (default: the shipped one)",
    )
    parser.add_argument("--sentences", type=int, default=4000, help="that `mine` has said (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="model", help="of the checkpoint and the folder of the export")
    parser.add_argument("--shared", type=Path, default=SHARED, help="validation recordings, where there are any")
    parser.add_argument("--json", type=Path, help="write the figures of `evaluate` to this file")
    return parser.parse_args()


def left_out(folds: str) -> str:
    """Of what is not trained on."""
    return "".join(fold for fold in FOLDS if fold not in folds)


def _evaluate(work: Path, model: Path, options: argparse.Namespace) -> None:
    figures = evaluate.everything(model, work, options.shared, left_out(options.folds))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    options = _options()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    model, checkpoint = work / "models" / options.name, work / f"{options.name}.pt"

    def pieces() -> tokens.Tokenizer:
        return tokens.Tokenizer(work / "pieces.model")

    steps: dict[str, Callable[[], None]] = {
        "mine": lambda: mine.mine(options.package, work / mine.MISREAD, options.sentences),
        "synthesize": lambda: synthesize(work),
        "prepare": lambda: prepare(work),
        "restore": lambda: restore.begin(options.package, work, checkpoint),
        "train": lambda: train(work, options),
        "blend": lambda: fit.blend({work / f"{name}.pt": float(share) for name, share in options.of}, checkpoint),
        "export": lambda: export.export(checkpoint, pieces(), model),
        "language-model": lambda: language_model.write(pieces(), evaluate.unheard(), model / LANGUAGE_MODEL),
        "describe": lambda: export.describe(
            model, options.name, export.DESCRIPTION, ["en"], export.LICENCE, export.ORIGIN.format(size=options.size)
        ),
        "prove": lambda: prove.everything(model, work, options.size),
        "evaluate": lambda: _evaluate(work, model, options),
    }
    for step, take in steps.items():
        if options.step == step or (options.step == "all" and step not in {"mine", "restore", "blend"}):
            print(f"== {step}", flush=True)
            take()


if __name__ == "__main__":
    main()

"""tools/adapt: teach a model of tools/train the words and voices of one site, without unlearning the rest.

Sentences of the site's grammars and hotwords are synthesized, the site's own labelled recordings are added, and the
upper layers learn from both, mixed with general sentences so that nothing is forgotten. What is kept is the point
between the old and the new weights that hears the site best and the rest no worse (Wortsman et al., "Robust fine-tuning
of zero-shot models", 2022); where no such point is better, nothing is written and the exit code is 1. The language
model beside it is made anew, and reads many more of the site's sentences than were spoken.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from edge_asr import grammar, settings
from edge_asr import hotwords as hotword_lists
from edge_asr.inference import Contract, Features
from edge_asr.model_store import LANGUAGE_MODEL
from training import export, language_model, people, restore, texts, voices
from training.examples import Pool, batches
from training.fit import losses, masked
from training.network import LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, Network
from training.noise import Noise, made, recordings
from training.texts import Sentence
from training.tokens import Tokenizer
from training.voices import Said

SITE_READ = 4000
"""Sentences of the site that the language model reads; it costs no time to speak of."""
HELD_OUT_EVERY = 5
"""One in so many sentences is not trained on but measured, whoever says it and however often."""
FORGETTING = 0.01
"""How much worse the general word error rate may become, in points of 1."""
BLENDS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the new weights that are tried."""

Rates = tuple[float, float]
"""Word error rates on the site and on the rest."""


class AdaptError(Exception):
    """The site's files do not suffice."""


@dataclass(frozen=True, slots=True)
class Plan:
    minutes: float = 20.0
    site_share: float = 0.6
    """Of what is heard while learning."""
    rate: float = 1.0e-4
    frames: int = 400
    learning_layers: int = 3
    """The topmost encoder layers; the head learns whole."""


def site_sentences(grammars: Sequence[Path], hotwords: Path | None) -> Callable[[Random], Sentence]:
    """How to draw one: a walk through a grammar, or a hotword within a sentence. Raises AdaptError."""
    read = [grammar.load(path) for path in grammars]
    graphs = [
        (grammar.compile_graph({path.name: each}).words, texts.abbreviations(each))
        for path, each in zip(grammars, read, strict=True)
    ]
    listed = hotword_lists.load(settings.Hotwords(file=hotwords)) if hotwords is not None else ()
    phrases = [phrase for each in listed for phrase in each.spoken or (each.written,)]
    if not graphs and not phrases:
        raise AdaptError("nothing to say: name at least one --grammar or --hotwords")
    frames = (
        "{}",
        "the {}",
        "check the {}",
        "{} on line two",
        "call {}",
        "report a fault on the {}",
        "stop the {} now",
    )

    def draw(random: Random) -> Sentence:
        if phrases and (not graphs or random.random() < 0.4):
            return texts.sentence("site", random.choice(frames).format(random.choice(phrases)))
        graph, abbreviations = random.choice(graphs)
        return texts.walk("site", graph, abbreviations, random)

    return draw


def _folder(work: Path, sources: Sequence[Path]) -> Path:
    """Where the sentences of these files are kept: never what was made of others, or of an earlier state of them."""
    contents = (hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    return work / f"site-{hashlib.sha256(' '.join(contents).encode()).hexdigest()[:12]}"


def spoken(folder: Path, count: int, draw: Callable[[Random], Sentence]) -> list[Said]:
    """Said by flite and espeak-ng in turns."""
    for speaker in ("flite", "espeak"):
        voices.synthesize(folder, speaker, count // 2, 11, draw)
    return [said for path in sorted(folder.glob("*.npz")) for said in voices.read_shard(path)]


class Ears:
    """Word error rates of a network in torch."""

    def __init__(self, contract: Contract, tokenizer: Tokenizer) -> None:
        self.features, self.tokenizer = Features(contract), tokenizer

    @torch.no_grad()
    def word_error_rate(self, network: Network, said: Sequence[Said]) -> float:
        network.eval()
        wrong = words = 0
        for each in said:
            x = torch.from_numpy(self.features(np.pad(each.audio.astype(np.float32) / 32768 * 0.5, 4800)))[None]
            asked = torch.tensor([LANGUAGE_IDS["auto"]]), torch.tensor([WITHOUT_ITN])
            best = network(x, torch.tensor([x.shape[1]]), *asked)[0, 4:].argmax(-1).tolist()
            ids = [token for at, token in enumerate(best) if token and (at == 0 or best[at - 1] != token)]
            wrong += Levenshtein.distance(each.text.split(), self.tokenizer.decode(ids).split())
            words += len(each.text.split())
        return wrong / max(1, words)


def learn(network: Network, site: Pool, rest: Pool, contract: Contract, tokenizer: Tokenizer, plan: Plan) -> None:
    """In place, for the plan's minutes."""
    network.train()
    network.encoder.requires_grad_(requires_grad=False)
    for layer in list(network.encoder.layers)[-plan.learning_layers :]:
        layer.requires_grad_(requires_grad=True)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    streams = [batches(pool, contract, tokenizer, plan.frames) for pool in (site, rest)]
    random, began = Random(0), time.monotonic()
    while (passed := (time.monotonic() - began) / 60 / plan.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, passed / 0.05 + 0.05, (1 - passed) / 0.7 + 0.02)
        batch = next(streams[0] if random.random() < plan.site_share else streams[1])
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(masked(batch.x, batch.x_length, random), batch.x_length, batch.language, batch.text_norm)
        ctc, tags = losses(logits, batch)
        optimizer.zero_grad()
        (ctc + 0.3 * tags).backward()
        torch.nn.utils.clip_grad_norm_(learning, 2.0)
        optimizer.step()


def blended(old: dict[str, Tensor], new: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: torch.lerp(old[name], new[name], share) for name in old}


def _split(said: Sequence[Said]) -> tuple[list[Said], list[Said]]:
    """(to learn from, to measure on): no sentence in both, for a small grammar's come again and again."""
    ordered = sorted({each.text for each in said})
    Random(5).shuffle(ordered)
    held = frozenset(ordered[::HELD_OUT_EVERY])
    return [each for each in said if each.text not in held], [each for each in said if each.text in held]


def package(network: Network, base: Path, out: Path) -> None:
    """OUT: the model and its tokens."""
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.onnx"
        export.write_float(network, whole)
        export.quantize(whole, out / "model.int8.onnx", network)
    shutil.copy(base / "tokens.txt", out / "tokens.txt")


def describe(base: Path, out: Path, name: str, figures: dict[str, float]) -> None:
    """The manifest of what lies in OUT, as `edge-asr models import` takes it."""
    described = f"adapted from {base.name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
    origin = f"{base.name} of edge-asr, adapted by tools/adapt on the site's own sentences and recordings"
    export.describe(out, name, described, ["en"], export.LICENCE, origin)


@dataclass(frozen=True, slots=True)
class Material:
    """What is learned from, and what is measured on."""

    site: list[Said]
    site_held: list[Said]
    rest: list[Said]
    rest_held: list[Said]
    read: list[str]
    """Sentences of the site for the language model."""

    @classmethod
    def gathered(cls, options: argparse.Namespace) -> Material:
        """From the options. Raises AdaptError."""
        recorded = [each for path in options.manifest for each in people.utterances(path)]
        named = options.grammar or options.hotwords
        draw = site_sentences(options.grammar, options.hotwords) if named else None
        sources = [*options.grammar, *([options.hotwords] if options.hotwords else [])]
        said = spoken(_folder(options.work, sources), options.sentences, draw) if draw is not None else []
        if not recorded and not said:
            raise AdaptError("nothing to learn from: name --manifest, --grammar or --hotwords")
        site, site_held = _split([*recorded, *said])
        if not site:
            raise AdaptError("one sentence is too few to learn from and to measure on")
        rest, rest_held = _split(spoken(options.work / "rest", options.sentences, texts.draw))
        random = Random(3)
        drawn = [draw(random).text for _ in range(SITE_READ)] if draw is not None else []
        return cls(site, site_held, rest, rest_held, [*(each.text for each in site), *drawn])

    @property
    def unheard(self) -> frozenset[str]:
        """What the language model may not read, so that a site can measure by it."""
        return frozenset(each.text for each in self.site_held)


def adapt(options: argparse.Namespace) -> int:
    plan = Plan(minutes=options.minutes)
    tokenizer = Tokenizer(options.pieces)
    listed = (options.model / "tokens.txt").read_text(encoding="utf-8").splitlines()
    if [line.split(" ")[0] for line in listed] != tokenizer.pieces:
        raise AdaptError(f"{options.model}: its tokens are not those of {options.pieces}; name the model's own pieces")
    network = restore.network(options.model / "model.int8.onnx", tokenizer.pieces)
    front = network.front
    mean, deviation = front.neg_mean.numpy(), front.inv_stddev.numpy()
    contract = Contract(7, 6, 32768.0, mean, deviation, LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, 0)
    material = Material.gathered(options)
    noises: list[Noise] = made(np.random.default_rng(1), 40)
    for folder in options.noise:
        noises += recordings(folder, "0123456789")
    ears, old = Ears(contract, tokenizer), {name: value.clone() for name, value in network.state_dict().items()}

    def rates() -> Rates:
        site, rest = (ears.word_error_rate(network, held) for held in (material.site_held, material.rest_held))
        return site, rest

    before = rates()
    print(f"before: word error rate {before[0]:.3f} on the site, {before[1]:.3f} on the rest", flush=True)
    pools = Pool([*material.site, *material.rest], noises, 1), Pool(material.rest, noises, 2)
    learn(network, *pools, contract, tokenizer, plan)
    after = best_blend(network, old, before, rates)
    if after is None:
        print("nothing is better on the site without being worse on the rest: no model written", file=sys.stderr)
        return 1
    figures = {"site WER before": before[0], "after": after[0], "rest before": before[1], "rest after": after[1]}
    part = options.out.with_name(f"{options.out.name}.part")  # OUT is there whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    package(network, options.model, part)
    language_model.write(tokenizer, material.unheard, part / LANGUAGE_MODEL, material.read)
    describe(options.model, part, options.name, figures)
    part.rename(options.out)
    print(f"{options.out}: written; `edge-asr models import {options.out}` takes it", flush=True)
    return 0


def best_blend(network: Network, old: dict[str, Tensor], before: Rates, rates: Callable[[], Rates]) -> Rates | None:
    """Leave in the network the blend of old and new weights that hears the site best, and what it reaches.

    None where none is better on the site without being worse on the rest.
    """
    new = {name: value.clone() for name, value in network.state_dict().items()}
    tried = {}
    for share in BLENDS:
        network.load_state_dict(blended(old, new, share))
        site, rest = tried[share] = rates()
        print(f"{share:4.0%} of the new weights: {site:.3f} on the site, {rest:.3f} on the rest", flush=True)
    kept = {share: rate for share, rate in tried.items() if rate[1] <= before[1] + FORGETTING and rate[0] < before[0]}
    if not kept:
        return None
    share = min(kept, key=lambda each: kept[each])
    network.load_state_dict(blended(old, new, share))
    return kept[share]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/adapt", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("work", type=Path, help="for what is synthesized; may be used again")
    parser.add_argument("out", type=Path, help="the new model's folder, which must not exist")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that tools/train made")
    parser.add_argument(
        "--pieces", type=Path, required=True, help="its pieces.model, from the same WORK of tools/train"
    )
    parser.add_argument("--name", default="site-en", help="of the new model (default: %(default)s)")
    parser.add_argument("--grammar", type=Path, action="append", default=[], help="a grammar file of the site")
    parser.add_argument("--hotwords", type=Path, help="the site's hotword list")
    parser.add_argument(
        "--manifest", type=Path, action="append", default=[], help="the site's recordings {audio, text}"
    )
    parser.add_argument("--noise", type=Path, action="append", default=[], help="a folder of recordings of noise")
    parser.add_argument("--minutes", type=float, default=20.0, help="of learning (default: %(default)s)")
    parser.add_argument(
        "--sentences",
        type=int,
        default=400,
        help="synthesized of the site, and as many general ones (default: %(default)s)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out.exists():
        parser.exit(2, f"{options.out}: exists already; name another folder\n")
    try:
        sys.exit(adapt(options))
    except (AdaptError, ValueError, OSError, grammar.GrammarError, hotword_lists.HotwordError) as error:
        parser.exit(78, f"tools/adapt: {error}\n")


if __name__ == "__main__":
    main()

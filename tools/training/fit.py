"""The training run: the head first, on the frozen encoder, then the upper encoder layers with it.

A run lasts a given time, not a number of steps, and every rate follows from the share of it that has passed, so that it
fits a machine of any speed; a checkpoint holds all of its state but the random generators, and a run that was
interrupted goes on from its last one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from edge_asr.inference import Contract
from training.examples import Batch, Pool, batches
from training.network import LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, Network, Shape, save
from training.noise import Noise, made, recordings
from training.tokens import BLANK, Tokenizer
from training.voices import Said, read_shard
from training.whisper import PACKAGES


@dataclass(frozen=True, slots=True)
class Plan:
    """How one run trains; times in minutes, lengths in LFR frames of 60 ms."""

    minutes: float
    size: str = "base"
    frames: int = 700
    """Per step: 42 s of audio."""
    head_alone: float = 0.12
    """The share of the time in which the encoder stays frozen."""
    frozen_layers: int = 2
    """Encoder layers, counted from the audio, that never learn; nor do the convolutions before them."""
    head_rate: float = 1.2e-3
    encoder_rate: float = 1.0e-4
    layer_decay: float = 0.8
    """Each encoder layer learns so much slower than the one above it."""
    averaging: float = 0.998
    """Of the exponential moving average of the weights, which is what is exported."""
    tag_weight: float = 0.3
    checkpoint_minutes: float = 4.0
    longest_step_s: float = 20.0
    """A step counts for no more: a machine that was asleep or a process that was stopped has not learned."""


SIZES = tuple(PACKAGES)


def load_front(path: Path) -> tuple[dict[str, Tensor], Contract]:
    """The fitted front of :mod:`training.front` and the contract that follows from it."""
    front: dict[str, Tensor] = torch.load(path)
    mean, deviation = front["neg_mean"].numpy(), front["inv_stddev"].numpy()
    return front, Contract(7, 6, 32768.0, mean, deviation, LANGUAGE_IDS, WITH_ITN, WITHOUT_ITN, 0)


def blend(parts: Mapping[Path, float], out: Path) -> None:
    """The weighted mean of checkpoints of runs that began with each other (model soups: Wortsman et al., 2022)."""
    saved = {path: torch.load(path) for path in parts}
    first = next(iter(saved.values()))
    total = sum(parts.values())
    model = {
        name: sum(parts[path] / total * each["model"][name] for path, each in saved.items())
        if value.is_floating_point()
        else value
        for name, value in first["model"].items()
    }
    save({"shape": first["shape"], "model": model}, out)


class Stream(IterableDataset[Batch]):
    """Batches from a process of their own."""

    def __init__(
        self, work: Path, noise_folders: list[Path], plan: Plan, people: list[Said], folds: str, *, last: bool
    ) -> None:
        self.work, self.noise_folders, self.plan, self.people = work, noise_folders, plan, people
        self.folds, self.last = folds, last

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        seed = time.time_ns() % 2**32
        said = [each for path in sorted((self.work / "said").glob("*.npz")) for each in read_shard(path)] + self.people
        noises: list[Noise] = made(np.random.default_rng(seed), 150)
        for folder in self.noise_folders:
            noises += recordings(folder, self.folds)
        _, contract = load_front(self.work / "front.pt")
        pool = Pool(said, noises, seed, last=self.last)
        yield from batches(pool, contract, Tokenizer(self.work / "pieces.model"), self.plan.frames)


def masked(x: Tensor, lengths: Tensor, random: Random) -> Tensor:
    """SpecAugment (Park et al., 2019) on stacked features: bands of mel bins and short times set to their mean."""
    n, t, _ = x.shape
    view = x.view(n, t, 7, 80).clone()
    for at in range(n):
        for _ in range(random.choice((0, 0, 1, 2))):
            width = random.randint(1, 14)
            low = random.randint(0, 80 - width)
            view[at, :, :, low : low + width] = 0
        if random.random() < 0.4:
            width = random.randint(1, 3)
            start = random.randint(0, max(0, int(lengths[at]) - width))
            view[at, start : start + width] = 0
    return view.view(n, t, 560)


def losses(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(CTC per token, cross-entropy per tag)."""
    log = functional.log_softmax(logits[:, 4:].float(), -1).transpose(0, 1)
    ctc = functional.ctc_loss(
        log, batch.targets, batch.x_length.long(), batch.target_length, blank=BLANK, reduction="sum", zero_infinity=True
    )
    tags = functional.cross_entropy(logits[:, :4].float().reshape(-1, logits.shape[-1]), batch.tags.reshape(-1))
    return ctc / batch.target_length.sum().clamp(min=1), tags


class Run:
    """One training run and what it can be resumed from."""

    def __init__(self, work: Path, name: str, plan: Plan, start: Path | None = None) -> None:
        """``start``: a checkpoint whose weights this run begins with."""
        self.plan, self.path = plan, work / f"{name}.pt"
        tokenizer = Tokenizer(work / "pieces.model")
        tags = (tokenizer.ids[f"<|{name}|>"] for name in ("nospeech", "Speech"))
        self.network = Network(Shape(len(tokenizer), *tags, size=plan.size))
        front, _ = load_front(work / "front.pt")
        self.network.front.load_state_dict(front)
        if start is not None:
            self.network.load_state_dict(torch.load(start)["model"])
        self.groups = list(self._groups())
        self.optimizer = torch.optim.AdamW(
            [{key: group[key] for key in ("params", "peak", "encoder")} for group in self.groups], 0.0,
            betas=(0.9, 0.98), weight_decay=0.01,
        )  # fmt: skip
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.elapsed_s = 0.0
        self.steps = 0
        if self.path.exists():
            self._resume()
        known = self.network.front.state_dict()
        if not all(torch.allclose(fitted, known[each]) for each, fitted in front.items()):  # it undoes what that does
            source = self.path if self.path.exists() else start
            raise ValueError(
                f"{source}: was made with another front than {work / 'front.pt'}; take the WORK it is from"
            )

    def _groups(self) -> Iterator[dict[str, Any]]:
        plan, encoder = self.plan, self.network.encoder
        for part in (encoder.conv1, encoder.conv2, *encoder.layers[: plan.frozen_layers]):
            part.requires_grad_(requires_grad=False)
        learning = list(encoder.layers)[plan.frozen_layers :]
        for above, layer in enumerate([encoder.norm, *reversed(learning)]):
            yield {
                "params": list(layer.parameters()),
                "peak": plan.encoder_rate * plan.layer_decay**above,
                "encoder": True,
            }
        rest = [value for name, value in self.network.named_parameters() if not name.startswith("encoder.")]
        yield {"params": rest, "peak": plan.head_rate, "encoder": False}

    def _resume(self) -> None:
        saved = torch.load(self.path)
        self.network.load_state_dict(saved["raw"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average, self.elapsed_s, self.steps = saved["model"], saved["elapsed_s"], saved["steps"]
        print(f"{self.path.name}: goes on after {self.elapsed_s / 60:.1f} min, {self.steps} steps", flush=True)

    def save(self) -> None:
        state = self.network.checkpoint() | {"model": self.average, "raw": self.network.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "elapsed_s": self.elapsed_s, "steps": self.steps}
        save(state, self.path)

    def _rate(self, passed: float, *, encoder: bool) -> float:
        """The share of its peak rate at which a part learns: up in a twentieth, flat, then down to nothing."""
        start = self.plan.head_alone if encoder else 0.0
        if passed < start:
            return 0.0
        return min(1.0, (passed - start) / 0.04, max(0.02, (1 - passed) / 0.65))

    def step(self, batch: Batch, random: Random) -> tuple[float, float]:
        passed = min(1.0, self.elapsed_s / 60 / self.plan.minutes)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(passed, encoder=group["encoder"])
        learns = passed >= self.plan.head_alone
        for group in self.groups:
            if group["encoder"]:
                for parameter in group["params"]:
                    parameter.requires_grad_(requires_grad=learns)
        x = masked(batch.x, batch.x_length, random)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(x, batch.x_length, batch.language, batch.text_norm)
        ctc, tags = losses(logits, batch)
        self.optimizer.zero_grad()
        (ctc + self.plan.tag_weight * tags).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 4.0)
        self.optimizer.step()
        keep = min(self.plan.averaging, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        self.steps += 1
        return float(ctc.detach()), float(tags.detach())

    def train(self, stream: Stream) -> None:
        """Until the plan's time has passed; prints a line every 25 steps."""
        self.network.train()
        random, heard_s, seen = Random(self.steps), 0.0, list[tuple[float, float]]()
        loader = DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=24)
        saved = last = time.monotonic()
        for batch in loader:
            seen.append(self.step(batch, random))
            heard_s += float(batch.x_length.sum()) * 0.06
            now = time.monotonic()
            self.elapsed_s, last = self.elapsed_s + min(now - last, self.plan.longest_step_s), now
            if self.steps % 25 == 0:
                ctc, tags = np.mean(seen, 0)
                line = f"{self.elapsed_s / 60:6.1f} min  {self.steps:5d} steps  {heard_s / 3600:.2f} h heard"
                print(f"{line}  CTC per token {ctc:.3f}  tags {tags:.3f}", flush=True)
                seen.clear()
            done = self.elapsed_s >= self.plan.minutes * 60
            if done or now - saved > self.plan.checkpoint_minutes * 60:
                self.save()
                saved = now
            if done:
                return

"""From kaldi's filters to Whisper's: the map of powers, the CMVN, and Whisper's own log-mel to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from edge_asr.inference import Contract, Features
from training.network import LFR_SHIFT

Wave = NDArray[np.float32]

RAW = Contract(7, 6, 32768.0, np.zeros(560, np.float32), np.ones(560, np.float32), {"auto": 0}, 14, 15, 0)
"""SenseVoice's features before CMVN."""


def whisper_filters() -> NDArray[np.float64]:
    """[201, 80] triangles on Slaney's mel scale, 0..8 kHz, of area one, as Whisper's mel_filters.npz."""

    def mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4))

    def hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))

    edges = hertz(np.linspace(0, float(mel(np.array(8000.0))), 82))
    bins = np.linspace(0, 8000, 201)[:, None]
    rising = (bins - edges[None, :-2]) / np.diff(edges)[None, :-1]
    falling = (edges[None, 2:] - bins) / np.diff(edges)[None, 1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[None]


def whisper_power(audio: Wave) -> NDArray[np.float64]:
    """[frames, 80] mel power as Whisper computes it: Hann window of 25 ms every 10 ms, centred, no preemphasis."""
    padded = np.pad(audio.astype(np.float64), 200, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 400)[::160]
    window = np.hanning(401)[:-1]
    spectrum = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    return np.asarray(spectrum[:-1] @ whisper_filters())


def kaldi_log(audio: Wave) -> NDArray[np.float32]:
    """[6 T, 80]: the log fbank frames that the LFR windows hold, each once, the first three repeats of the first."""
    return Features(RAW)(audio)[:, :480].reshape(-1, 80)


OFFSET = 2
"""Kaldi frame k of :func:`kaldi_log` is centred 12.5 ms + 10 ms (k - 3); Whisper's frame k - OFFSET is the nearest."""


def _normalised(log: torch.Tensor) -> torch.Tensor:
    return (torch.maximum(log, log.max() - 8) + 4) / 4


def _pairs(clips: Sequence[Wave]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each clip: kaldi's mel power [frames, 80], and Whisper's normalised log-mel [frames, 80] at the same times."""
    pairs = []
    for clip in clips:
        log, mel = kaldi_log(clip)[4:], whisper_power(clip)[4 - OFFSET :]
        count = min(len(log), len(mel))
        power = np.exp(log[:count].astype(np.float64) - 2 * np.log(32768.0))
        pairs.append((torch.tensor(power, dtype=torch.float32), torch.tensor(mel[:count], dtype=torch.float32)))
    return pairs


def mapped(power: torch.Tensor, power_map: torch.Tensor) -> torch.Tensor:
    """Kaldi mel power [frames, 80] -> Whisper's normalised log-mel, as the network's front computes it."""
    return _normalised(torch.log10(torch.clamp(power @ power_map, min=1e-10)))


def fit(clips: Sequence[Wave], steps: int = 1500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(power map [80, 80], neg_mean [560], inv_stddev [560]) from clips of speech.

    A non-negative least-squares fit per Whisper filter is where gradient descent on the normalised log-mel starts.
    """
    pairs = _pairs(clips)
    x, y = (np.concatenate([pair[side].numpy() for pair in pairs]).astype(np.float64) for side in (0, 1))
    start = np.zeros((80, 80))
    for band in range(80):
        weight = 1 / np.sqrt(y[:, band] * y[:, band].mean() + 1e-12)
        start[:, band], _ = nnls(x * weight[:, None], y[:, band] * weight)
    root = torch.tensor(np.sqrt(start + 1e-9), dtype=torch.float32, requires_grad=True)  # its square is non-negative
    optimizer = torch.optim.Adam([root], 0.01)
    for step in range(steps):
        power, mel = pairs[step % len(pairs)]
        own = _normalised(torch.log10(torch.clamp(mel, min=1e-10)))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        (mapped(power, root**2) - own).abs().mean().backward()
        optimizer.step()
    stacked = np.concatenate([Features(RAW)(clip) for clip in clips])
    return (
        root.detach() ** 2,
        torch.tensor(-stacked.mean(0), dtype=torch.float32),
        torch.tensor(1 / stacked.std(0), dtype=torch.float32),
    )


def error(power_map: torch.Tensor, clip: Wave) -> float:
    """Mean absolute difference of the mapped and Whisper's own normalised log-mel (their range is about 2)."""
    ((power, mel),) = _pairs([clip])
    return float((mapped(power, power_map) - _normalised(torch.log10(torch.clamp(mel, min=1e-10)))).abs().mean())


__all__ = ["LFR_SHIFT", "error", "fit", "kaldi_log", "mapped", "whisper_power"]

"""CTC by brute force: what a vocabulary so small that every alignment can be written out makes of posteriors."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_asr.posteriors import BLANK, TokenTable, log_softmax

Floats = NDArray[np.float32]

TINY = TokenTable(("<blank>", "▁a", "b", "▁", "a"))

TOKENS_OF = {"a": 1, "ab": 2, "aa": 2, "ab a": 3, "b": 1, "aba": 3, "a b": 3}
"""Phrases of ``TINY`` and the tokens that they take: "▁a" and "a" are one, "▁b" is two."""


def posteriors_of(table: TokenTable, max_frames: int) -> st.SearchStrategy[Floats]:
    """[frames, len(table)] log-posteriors."""
    logit = st.floats(-3, 3, width=32)
    row = st.lists(logit, min_size=len(table), max_size=len(table))
    return st.lists(row, min_size=1, max_size=max_frames).map(lambda rows: log_softmax(np.array(rows, np.float32)))


def likelihoods(log_posteriors: Floats) -> dict[tuple[int, ...], float]:
    """Log-likelihood of every token sequence: the sum over its alignments."""
    frames, size = log_posteriors.shape
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for alignment in itertools.product(range(size), repeat=frames):
        sequence = tuple(label for label, _ in itertools.groupby(alignment) if label != BLANK)
        total[sequence] += math.exp(sum(log_posteriors[t, label] for t, label in enumerate(alignment)))
    return {sequence: math.log(likelihood) for sequence, likelihood in total.items()}

"""Continuations of one prompt under several masks: where they part, and how surprised a model is by each token."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dpruner.errors import InputError


@dataclass(frozen=True)
class Alignment:
    """Two token sequences laid beside each other.

    Attributes:
        segments: (kind, start_a, stop_a, start_b, stop_b), in order; the kind is "equal", "replace", "delete" (only in A) or "insert"
            (only in B).
        equal_a, equal_b: bool (tokens,), which tokens of each stand in the other as well.
        parts_at: index of the first token at which they differ (the length of the shorter where it begins the other), None if never.
    """

    segments: tuple[tuple[str, int, int, int, int], ...]
    equal_a: np.ndarray
    equal_b: np.ndarray
    parts_at: int | None

    @property
    def identical(self) -> bool:
        """Whether the two are the same tokens in the same order."""
        return self.parts_at is None


def align(a: Sequence[int], b: Sequence[int]) -> Alignment:
    """Lay two token sequences beside each other (difflib, on token ids: what looks alike may be other tokens).

    Args:
        a, b: token ids, lists or 1-D tensors.
    """
    a, b = [int(t) for t in a], [int(t) for t in b]
    segments = tuple(difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes())
    equal_a, equal_b = np.zeros(len(a), dtype=bool), np.zeros(len(b), dtype=bool)
    for kind, start_a, stop_a, start_b, stop_b in segments:
        if kind == "equal":
            equal_a[start_a:stop_a], equal_b[start_b:stop_b] = True, True
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return Alignment(segments, equal_a, equal_b, None if same == len(a) == len(b) else same)


def surprisal(log_probs: Sequence[float]) -> np.ndarray:
    """Surprisal in bits, −log₂ p, of log-probabilities in nats; float64 of the same shape, ∞ where a token was given no chance."""
    return np.maximum(-np.asarray(log_probs, dtype=np.float64) / math.log(2), 0.0)


def perplexity(log_probs: Sequence[float]) -> float:
    """Perplexity of a text, exp(−mean log p), from the log-probabilities of its tokens in nats; NaN for an empty one."""
    values = np.asarray(log_probs, dtype=np.float64)
    return float(np.exp(-values.mean())) if values.size else float("nan")


def token_table(tokens: Sequence[str], log_probs: Sequence[float], equal: Sequence[bool] | None = None) -> pd.DataFrame:
    """One row for each token of a continuation.

    Args:
        tokens: as text.
        log_probs: in nats; NaN where nothing was predicted.
        equal: whether the token stands in the text it is compared with, as from `align`; default all.

    Returns:
        Columns index, token, surprisal (bits), probability, differs.

    Raises:
        InputError: the lengths differ.
    """
    values = np.asarray(log_probs, dtype=np.float64)
    equal = np.ones(len(tokens), dtype=bool) if equal is None else np.asarray(equal, dtype=bool)
    if not len(tokens) == len(values) == len(equal):
        raise InputError("The tokens cannot be tabled",
                         f"there are {len(tokens)} tokens, {len(values)} log-probabilities and {len(equal)} marks",
                         "give one of each for every token")
    return pd.DataFrame({"index": np.arange(len(tokens)), "token": list(tokens), "surprisal": surprisal(values),
                         "probability": np.exp(values), "differs": ~equal})

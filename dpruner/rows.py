"""The figures of a run as rows of metrics.parquet: sparsity, perplexity, similarity."""

import itertools
import math

import pandas as pd

from dpruner import store
from dpruner.config import RunConfig
from dpruner.evaluate import of_windows
from dpruner.masks import jaccard, jaccard_floor, sparsity_of
from dpruner.model import count_weights
from dpruner.plan import HALVED, wants_halves
from dpruner.store import Run

METRIC_COLUMNS = ("method", "domain", "text", "metric", "value", "low", "high", "n")


def rows(*records: tuple) -> pd.DataFrame:
    """A piece of metrics.parquet; figures without an interval have NaN bounds."""
    frame = pd.DataFrame(records, columns=METRIC_COLUMNS)
    return frame.astype({"value": float, "low": float, "high": float, "n": "int64"})


def exact(method, domain, text, metric, value, n) -> tuple:
    """A figure that is counted, not estimated."""
    return method, domain, text, metric, value, None, None, n


def perplexity_rows(method: str, label: str, found: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Perplexities as a piece of metrics.parquet."""
    figures = ((text, of_windows(windows.loss.to_numpy(), windows.tokens.to_numpy(), seed)) for text, windows in found.groupby("text", sort=False))
    return rows(*((method, label, text, "perplexity", float(e), e.low, e.high, e.n) for text, e in figures))


def described(model, method: str, label: str, masks) -> pd.DataFrame:
    """Sparsity of the prunable weights and of the whole model, both always reported."""
    prunable, total = count_weights(model)
    share = sparsity_of(masks)
    return rows(exact(method, label, "", "sparsity of prunable weights", share, prunable),
                exact(method, label, "", "sparsity of the whole model", share * prunable / total, total))


def similarities(run: Run, config: RunConfig, labels: list[str]) -> pd.DataFrame:
    """Jaccard similarity of every two domains' masks, with what two random masks of these counts would share.

    Where there are masks of the halves of the domains' texts, "jaccard halves" is the mean over the four pairs of a half of one domain and a
    half of the other: it compares with "jaccard ceiling", whose masks come from as much text.
    """
    found = []
    for method, (a, b) in itertools.product(config.methods, itertools.combinations(labels, 2)):
        one, other = (store.LazyMasks(run.path("masks", method, label)) for label in (a, b))
        size = sum(math.prod(shape) for shape in one.shapes.values())
        found += [exact(method, a, b, "jaccard", jaccard(one, other), size),
                  exact(method, a, b, "jaccard floor", jaccard_floor(one, other), size)]
        if wants_halves(config) and method in HALVED:
            halves = [[store.LazyMasks(run.path("masks", method, f"{label}~{n}")) for n in (1, 2)] for label in (a, b)]
            found.append(exact(method, a, b, "jaccard halves", sum(jaccard(*pair) for pair in itertools.product(*halves)) / 4, size))
    return rows(*found)

"""What λ, the weight of the general side, decides: the dual score's mask against that of the domain importance alone.

The score `balanced` is S = F/mean(F) + λ·G/mean(G). A run keeps the ranks of F, G and S and the scores at the edges of their bins; from
these the decisions at any λ follow, to about the width of a bin.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.sparsity import threshold
from dpruner.masks import BINS

INNER = (16, 240)   # bins whose two edges are close to each other: the tails of scores are long
SAMPLE = 1 << 20    # weights that are enough to see a scale
LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)

__all__ = ["LAMBDAS", "changed_by_lambda", "general_scale", "middles"]


def middles(edges) -> np.ndarray:
    """The score in the middle of every bin, float64 (256,), from its edges (257,)."""
    edges = np.asarray(edges, dtype=np.float64)
    return (edges[1:] + edges[:-1]) / 2


def general_scale(ranks: Mapping[str, np.ndarray], edges: Mapping[str, np.ndarray], lam: float) -> float:
    """The factor 1/mean(G) of one matrix, as the dual score shows it: the slope of (S − F) over λ·G.

    Args:
        ranks, edges: of one matrix, by "domain" (F over its mean), "general" (G) and "dual" (S).
        lam: the λ of the dual score.

    Returns:
        NaN where it cannot be seen: λ is 0, or too few weights lie in inner bins.
    """
    step = max(1, np.asarray(ranks["dual"]).size // SAMPLE)
    bins = {side: np.asarray(r).reshape(-1)[::step] for side, r in ranks.items()}
    inner = np.logical_and.reduce([(b >= INNER[0]) & (b < INNER[1]) for b in bins.values()])
    value = {side: middles(edges[side])[b[inner]] for side, b in bins.items()}
    weight = float(np.dot(value["general"], value["general"])) if inner.sum() >= 16 else 0.0
    return float(np.dot(value["dual"] - value["domain"], value["general"])) / (lam * weight) if lam > 0 and weight > 0 else float("nan")


def changed_by_lambda(histogram: np.ndarray, edges: Mapping[str, np.ndarray], scale: float, sparsity: float,
                      lambdas: Sequence[float] = LAMBDAS) -> pd.DataFrame:
    """Decisions of one matrix that differ from those at λ = 0, for any λ of the formula `balanced`.

    Every weight counts with the scores in the middle of its bins.

    Args:
        histogram: (256, 256), weights by (bin in G, bin in F), as `analysis.overlap.joint_histogram` makes it.
        edges: by "domain" and "general".
        scale: as `general_scale` finds it.

    Returns:
        Columns lam, changed (expected count, not whole), share; no rows where the scale is unknown.
    """
    lambdas = lambdas if math.isfinite(scale) else ()
    F, G = middles(edges["domain"]), middles(edges["general"]) * scale
    total, lowest = int(histogram.sum()), threshold(sparsity)
    domain_bin, general_bin = np.nonzero(histogram.T)   # by domain bin, so that weights of equal score stay in that order
    counts = histogram[general_bin, domain_bin]
    alone = domain_bin >= lowest
    rows = []
    for lam in lambdas:
        order = np.argsort(F[domain_bin] + lam * G[general_bin], kind="stable")
        passed = np.cumsum(counts[order])
        # the cell on the threshold is removed in part
        removed = np.clip(lowest / BINS * total - (passed - counts[order]), 0, counts[order])
        rows.append((lam, float(np.where(alone[order], removed, counts[order] - removed).sum())))
    return pd.DataFrame(rows, columns=["lam", "changed"]).assign(share=lambda t: t["changed"] / max(total, 1))

"""What is kept where: parts of a matrix, layers by modules, spread against chance, and one threshold for the whole model.

D-Pruner removes the same share of every matrix, so what can differ are the parts: rows, columns, heads. All of it follows from ranks
(uint8: the bin, of 256 equal ones, of a weight's rank in its matrix); the mask of a sparsity s is `ranks >= ceil(256 s)`, exact where 256 s
is whole and at most 1/256 off elsewhere.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import gammaln

from analysis.chart import percent
from analysis.matrices import as_array, places
from dpruner.errors import InputError
from dpruner.masks import BINS, require_sparsity


def threshold(sparsity: float) -> int:
    """The lowest bin that is kept, 0..256.

    Raises:
        InputError: the sparsity is not a number from 0 to 1.
    """
    require_sparsity(sparsity)
    return math.ceil(BINS * sparsity)


def told(sparsity: float) -> str:
    """A sparsity in words, and what ranks make of it: they are kept in 256 steps, and a mask cut from them removes a whole number of these."""
    cut = threshold(sparsity) / BINS
    return percent(sparsity, 0) + (f" ({percent(cut)}, as ranks come in steps of 1/{BINS})" if abs(cut - sparsity) > 1e-9 else "")


# ---- parts of one matrix


def part_counts(flags, axis: str = "row", size: int = 1, transposed: bool = False) -> np.ndarray:
    """How many weights of every row, column or head are True.

    Args:
        flags: bool, tensor or array shaped as stored.
        axis: "row" or "column" of the (out, in) weight.
        size: rows or columns that make one part; a head's are what `dpruner.model.heads_of` gives as (axis, size).
        transposed: the weight is stored as (in, out).

    Returns:
        int64 (parts,).

    Raises:
        InputError: another axis, or a size that does not divide the rows or columns.
    """
    return _joined(np.count_nonzero(as_array(flags, transposed), axis=_across(axis)), size)


def kept_parts(ranks, sparsity: float, axis: str = "row", size: int = 1, transposed: bool = False) -> np.ndarray:
    """Weights of every row, column or head that the mask of a sparsity keeps, int64 (parts,); arguments as for `part_counts`."""
    return part_counts(at_least(ranks, threshold(sparsity)), axis, size, transposed)


def part_table(ranks, sparsity: float, axis: str = "row", size: int = 1, transposed: bool = False) -> pd.DataFrame:
    """Kept share and mean rank of every row, column or head at a sparsity.

    Args:
        ranks: uint8, tensor or array shaped as stored; the rest as for `part_counts`.

    Returns:
        Columns index, weights, kept, kept_share (0..1), mean_rank (0..1: the mean share of the matrix's weights that score lower).
    """
    rows = as_array(ranks, transposed)
    kept = kept_parts(rows, sparsity, axis, size)
    weights = rows.size // len(kept)
    total = _joined(rows.sum(axis=_across(axis), dtype=np.int64), size)
    return pd.DataFrame({"index": np.arange(len(kept)), "weights": weights, "kept": kept, "kept_share": kept / weights,
                         "mean_rank": (total / weights + 0.5) / BINS})


def at_least(ranks, lowest: int) -> np.ndarray:
    """`ranks >= lowest`, also for 256, which is no uint8."""
    array = np.asarray(ranks)
    return array >= lowest if lowest < BINS else np.zeros(array.shape, dtype=bool)


def _across(axis: str) -> int:
    """The array axis to sum over for counts of every row or column."""
    if axis not in ("row", "column"):
        raise InputError(f"A matrix has no {axis!r}", "its parts lie along its rows or its columns", "choose row or column")
    return 1 if axis == "row" else 0


def _joined(counts: np.ndarray, size: int) -> np.ndarray:
    """Sums of every `size` neighbours along the first axis."""
    if size < 1 or len(counts) % size:
        raise InputError(f"Heads of {size} do not fit", f"the matrix has {len(counts)} rows or columns there",
                         "give a size that divides it")
    return counts if size == 1 else counts.reshape(-1, size, *counts.shape[1:]).sum(axis=1, dtype=counts.dtype)


# ---- how unequal the parts are, against chance


@dataclass(frozen=True)
class Chance:
    """What a random mask keeps of one part: the hypergeometric distribution.

    Attributes:
        weights: weights of the part.
        kept: int64 (k,), the counts that have a chance worth naming, ascending.
        cdf: (k,), chance of at most that count.
        sd: standard deviation of the count.
    """

    weights: int
    kept: np.ndarray
    cdf: np.ndarray
    sd: float

    def losing_more(self, share: float) -> float:
        """Chance that the part loses more than this share of its weights."""
        fewer = np.count_nonzero(_loses_more(self.kept, self.weights, share))
        return float(self.cdf[fewer - 1]) if fewer else 0.0

    def quantile(self, level: np.ndarray) -> np.ndarray:
        """Counts that are not passed with these chances (0..1)."""
        return self.kept[np.minimum(np.searchsorted(self.cdf, level), len(self.kept) - 1)]


@lru_cache(maxsize=1024)   # matrices of one shape share it
def chance(size: int, kept: int, weights: int) -> Chance:
    """What a random mask that keeps `kept` of a matrix's `size` weights keeps of a part of `weights`: mean `weights·kept/size`."""
    share = kept / size
    variance = weights * share * (1 - share) * (size - weights) / max(size - 1, 1)
    low, high = max(0, weights + kept - size), min(weights, kept)
    mean, reach = weights * share, 12 * math.sqrt(variance) + 2   # beyond 12 standard deviations nothing is left to count
    counts = np.arange(max(low, math.floor(mean - reach)), min(high, math.ceil(mean + reach)) + 1)
    logs = _log_choose(kept, counts) + _log_choose(size - kept, weights - counts) - _log_choose(size, weights)
    chances = np.exp(logs - logs.max())   # scaled: the logarithms of large factorials are only good to about 1e-7
    return Chance(weights, counts, np.cumsum(chances / chances.sum()), math.sqrt(variance))


def _log_choose(n, k) -> np.ndarray:
    return gammaln(n + 1.0) - gammaln(np.asarray(k) + 1.0) - gammaln(n - np.asarray(k) + 1.0)


def _loses_more(kept: np.ndarray, weights: int, share: float) -> np.ndarray:
    """Whether a part loses more than this share; the small term keeps 224 of 320 from passing 0.7 by rounding."""
    return weights - kept > share * weights * (1 + 1e-12)


def gini(values: np.ndarray) -> float:
    """Gini coefficient: 0 where all are equal, toward 1 where one has everything. Half the relative mean absolute difference."""
    ordered = np.sort(values).astype(np.float64)
    total, n = ordered.sum(), len(ordered)
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n) if total > 0 else 0.0


def spread(kept: np.ndarray, weights: int, more_than: float | None = None) -> dict[str, float]:
    """How unequally the parts of one matrix lose, beside what a random mask of the same count shows.

    Args:
        kept: (parts,) weights kept of each.
        weights: weights of each part.
        more_than: share lost that is counted as much; default halfway between the matrix's own and everything.

    Returns:
        kept_share; sd (of the parts' kept shares), sd_random, sd_ratio; gini (of the kept counts), gini_random; more_than, losing_more
        (share of the parts that lose more than that) and losing_more_random. sd_random is exact; gini_random takes counts as normal.
    """
    parts, total = len(kept), int(kept.sum())
    expected = chance(parts * weights, total, weights)
    share = total / (parts * weights)
    more_than = 1 - share / 2 if more_than is None else more_than
    sd, sd_random = float(kept.std() / weights), expected.sd / weights
    gini_random = sd_random / share * math.sqrt((parts - 1) / (parts * math.pi)) if share > 0 else 0.0
    return {"kept_share": share, "sd": sd, "sd_random": sd_random, "sd_ratio": sd / sd_random if sd_random > 0 else math.nan,
            "gini": gini(kept), "gini_random": gini_random,
            "more_than": more_than, "losing_more": float(_loses_more(kept, weights, more_than).mean()),
            "losing_more_random": expected.losing_more(more_than)}


def rank_spread(matrices: Iterable[tuple[str, np.ndarray]], sparsity: float, part: str = "row",
                heads: Mapping[str, tuple[str, int]] | None = None, transposed: Collection[str] = (),
                more_than: float | None = None) -> pd.DataFrame:
    """`spread` of every matrix at any sparsity, from ranks.

    Args:
        matrices: (name, ranks as stored), as from `analysis.matrices.rank_matrices` or `dict.items()`.
        part: "row", "column" or "head".
        heads: {matrix: (axis, size)} for "head"; matrices without heads are left out.
        transposed: names of the weights stored as (in, out).

    Returns:
        Columns matrix, block, module, part, parts, weights (of one part), then those of `spread`; one row for each matrix.
    """
    rows = []
    for name, ranks in matrices:
        if part == "head" and name not in (heads or {}):
            continue
        axis, size = heads[name] if part == "head" else (part, 1)
        kept = kept_parts(ranks, sparsity, axis, size, name in transposed)
        rows.append((name, kept, np.asarray(ranks).size // len(kept)))
    return _spread_table(rows, part, more_than)


def stats_spread(stats: pd.DataFrame, part: str = "row", more_than: float | None = None) -> pd.DataFrame:
    """`spread` of every matrix for the masks that a run made, from its stats.parquet.

    Args:
        stats: rows of one method and domain, with columns matrix, part, weights, kept.
        part: "row", "column" or "head".

    Returns:
        As `rank_spread`.

    Raises:
        InputError: the rows are of more than one mask.
    """
    if any(column in stats and stats[column].nunique() > 1 for column in ("method", "domain")):
        raise InputError("The spread cannot be computed", "the table holds several masks", "choose the rows of one method and one domain")
    chosen = stats[stats["part"] == part]
    rows = [(str(name), group["kept"].to_numpy(), int(group["weights"].iloc[0]))
            for name, group in chosen.groupby("matrix", sort=False, observed=True)]
    return _spread_table(rows, part, more_than)


def _spread_table(rows: list[tuple[str, np.ndarray, int]], part: str, more_than: float | None) -> pd.DataFrame:
    found = [{"part": part, "parts": len(kept), "weights": weights, **spread(kept, weights, more_than)} for _, kept, weights in rows]
    return pd.concat([places([name for name, _, _ in rows]), pd.DataFrame(found)], axis=1)


# ---- importance


def importance_kept(edges: Mapping[str, np.ndarray], means: Mapping[str, float], sparsity: float) -> pd.DataFrame:
    """The share of every matrix's importance that the weights kept at a sparsity carry.

    What is removed lies in the low bins, where neighbouring edges are close: a bin counts with their logarithmic mean, as scores grow about
    exponentially there. The total is exact: the highest bin, whose scores may differ a thousandfold, is only counted through the mean.

    Args:
        edges: {matrix: (257,) scores at the edges of the bins}.
        means: {matrix: mean score of all its weights}.

    Returns:
        Columns matrix, block, module, mean_score, importance_kept; NaN where scores are negative or all zero.
    """
    lowest, rows = threshold(sparsity), []
    for name, scores in edges.items():
        scores, mean = np.asarray(scores, dtype=np.float64), float(means[name])
        removed = mean if lowest == BINS else float(_between(scores[:lowest], scores[1:lowest + 1]).sum() / BINS)
        rows.append((mean, max(1 - removed / mean, 0.0) if mean > 0 and scores[0] >= 0 else math.nan))
    return pd.concat([places(list(edges)), pd.DataFrame(rows, columns=["mean_score", "importance_kept"])], axis=1)


def _between(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Logarithmic means of neighbouring edges; their middle where they are nearly equal or not positive."""
    growing = (low > 0) & (high > low * (1 + 1e-6))
    a, b = np.where(growing, low, 1.0), np.where(growing, high, 2.0)
    return np.where(growing, (b - a) / np.log(b / a), (low + high) / 2)


# ---- one threshold for the whole model


def whole_model_kept(edges: Mapping[str, np.ndarray], sizes: Mapping[str, int], sparsity: float) -> pd.DataFrame:
    """Kept share of every matrix when one threshold holds for the whole model.

    Scores are taken as evenly spread between two edges; a share is therefore right to 1/256, and the shares of all matrices together are
    exactly what was asked for. Scores that were scaled for each matrix alone (`means="matrix"`) say little about each other.

    Args:
        edges: {matrix: (257,) scores, ascending: the lowest of each of the 256 bins, then the highest of all}, as a run's folder edges/ and
            `dpruner.masks.ranked` have them.
        sizes: {matrix: weights}.
        sparsity: share removed of all weights together.

    Returns:
        Columns matrix, block, module, weights, kept (expected, not whole), kept_share.

    Raises:
        InputError: sparsity outside 0..1, or edges of another length, not ascending, or not finite.
    """
    require_sparsity(sparsity)
    names = list(edges)
    table = np.array([np.asarray(edges[n], dtype=np.float64) for n in names]) if names else np.zeros((0, BINS + 1))
    if table.shape != (len(names), BINS + 1) or not np.isfinite(table).all() or (np.diff(table) < 0).any():
        raise InputError("The whole-model threshold cannot be found", "the edges of some scores are not 257 ascending numbers",
                         "give edges of a run's folder edges/")
    weights = np.array([sizes[n] for n in names], dtype=np.float64)
    removed = _removed_shares(table, weights, sparsity) if names else np.zeros(0)
    kept = weights * (1 - removed)
    return places(names).assign(weights=weights.astype(np.int64), kept=kept, kept_share=1 - removed)


def _removed_shares(edges: np.ndarray, weights: np.ndarray, sparsity: float) -> np.ndarray:
    """Share of every matrix below the threshold under which the whole has this share.

    Args:
        edges: (matrices, 257).
        weights: (matrices,).
    """
    def total(shares):
        return float(shares @ weights / weights.sum())

    knots = np.unique(edges)   # between two of them every matrix's share grows linearly, at one of them it may jump
    low, high = 0, len(knots) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(_share_below(edges, knots[middle], "right")) >= sparsity else (middle + 1, high)
    below, up_to = (_share_below(edges, knots[low], side) for side in ("left", "right"))
    if total(below) > sparsity and low > 0:   # the threshold lies between the knot before and this one
        below, up_to = _share_below(edges, knots[low - 1], "right"), below
    gap = total(up_to) - total(below)
    return below + (up_to - below) * np.clip((sparsity - total(below)) / gap if gap > 0 else 0.0, 0, 1)


def _share_below(edges: np.ndarray, score: float, side: str) -> np.ndarray:
    """Share of every matrix's weights that score lower ("left"), or at most this ("right")."""
    passed = ((edges < score) if side == "left" else (edges <= score)).sum(axis=1)
    bins = np.clip(passed - 1, 0, BINS - 1)
    start, stop = (np.take_along_axis(edges, bins[:, None] + i, axis=1)[:, 0] for i in (0, 1))
    inside = np.divide(score - start, stop - start, out=np.zeros(len(edges)), where=stop > start)
    return np.select([passed == 0, passed == BINS + 1], [0.0, 1.0], (bins + np.clip(inside, 0, 1)) / BINS)

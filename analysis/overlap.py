"""General against domain importance: overlap of two rankings at every sparsity, their regions, and what a third score keeps of these.

Everything about two rankings follows from their joint histogram, (256, 256) counts of weights by (bin in A, bin in B): a page reads the
ranks once and answers every slider from it. Histograms of several matrices may be added.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.matrices import places, rank_shapes, require_same, stream, summed
from analysis.sparsity import threshold
from dpruner.errors import InputError
from dpruner.masks import BINS

NEITHER, ONLY_A, ONLY_B, BOTH = range(4)
REGIONS = ("neither", "only A", "only B", "both")
CHUNK = 1 << 18   # weights at once: what they need fits into the processor's cache


def joint_histogram(a, b) -> np.ndarray:
    """How many weights lie in every pair of bins.

    Args:
        a, b: uint8 ranks of one shape, tensors or arrays.

    Returns:
        int64 (256, 256), first axis the bin in `a`.

    Raises:
        InputError: the shapes differ, or the ranks are not uint8.
    """
    flat = _flat(a, b)
    counts = np.zeros(BINS * BINS, dtype=np.int64)
    pair = np.empty((CHUNK, 2), dtype=np.uint8)   # two bytes side by side are one number: 256·a + b
    for start in range(0, flat[0].size, CHUNK):
        some = pair[:min(CHUNK, flat[0].size - start)]
        some[:, 0], some[:, 1] = flat[1][start:start + len(some)], flat[0][start:start + len(some)]
        counts += np.bincount(some.view("<u2")[:, 0], minlength=BINS * BINS)
    return counts.reshape(BINS, BINS)


def joint_histograms(path_a: Path, path_b: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(matrix, joint histogram) of two files of ranks, one matrix in memory at a time; `dict` and `summed` take it from there.

    Raises:
        InputError: a file is missing or damaged, or they hold different matrices.
    """
    paths = [Path(path_a), Path(path_b)]
    shapes = require_same([rank_shapes(p) for p in paths], paths)
    for name, (a, b) in stream(paths, list(shapes) if names is None else names):
        yield name, joint_histogram(a, b)


def _flat(*ranks) -> list[np.ndarray]:
    """The ranks as arrays (weights,), checked."""
    arrays = [np.asarray(r) for r in ranks]
    if any(x.dtype != np.uint8 or x.shape != arrays[0].shape for x in arrays):
        raise InputError("The ranks cannot be compared", "they are not bytes of one and the same shape", "give ranks of the same matrix")
    return [x.reshape(-1) for x in arrays]


def _kept_pairs(histogram: np.ndarray) -> np.ndarray:
    """Weights with a bin of at least i in A and at least j in B, int64 (257, 257)."""
    kept = np.zeros((BINS + 1, BINS + 1), dtype=np.int64)
    kept[:BINS, :BINS] = histogram[::-1, ::-1].cumsum(0, dtype=np.int64).cumsum(1)[::-1, ::-1]
    return kept


# ---- figures of two rankings


@dataclass(frozen=True)
class Regions:
    """Weights by who keeps them.

    Attributes:
        both, only_a, only_b, neither: counts.
    """

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def weights(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def changed(self) -> int:
        """Decisions that differ between the two masks."""
        return self.only_a + self.only_b

    @property
    def jaccard(self) -> float:
        """Weights both keep as a share of those either keeps; 1 where both keep nothing."""
        return float(jaccard(self.both, self.both + self.only_a, self.both + self.only_b))

    @property
    def floor(self) -> float:
        """The Jaccard similarity of two random masks that keep as many."""
        return float(random_jaccard(self.both + self.only_a, self.both + self.only_b, self.weights))


def jaccard(both, kept_a, kept_b) -> np.ndarray:
    """|A ∩ B| / |A ∪ B| from counts (of any matching shapes); 1 where both sets are empty, as they are equal."""
    both, either = np.asarray(both, dtype=np.float64), np.asarray(kept_a, dtype=np.float64) + kept_b - both
    return np.divide(both, either, out=np.ones(np.shape(either)), where=either > 0)


def random_jaccard(kept_a, kept_b, weights) -> np.ndarray:
    """What two random masks of these counts share: expected both over expected either; 1/3 where each keeps half."""
    return jaccard(np.asarray(kept_a, dtype=np.float64) * kept_b / weights, kept_a, kept_b)


def regions(histogram: np.ndarray, sparsity_a: float, sparsity_b: float) -> Regions:
    """Weights kept by both, one, or none of two masks, each at its own sparsity.

    Args:
        histogram: (256, 256), as from `joint_histogram`, or a sum of such.

    Raises:
        InputError: a sparsity outside 0..1.
    """
    at_a, at_b = threshold(sparsity_a), threshold(sparsity_b)
    both, kept_a, kept_b, weights = (int(part.sum(dtype=np.int64)) for part in (
        histogram[at_a:, at_b:], histogram[at_a:], histogram[:, at_b:], histogram))
    return Regions(both, kept_a - both, kept_b - both, weights - kept_a - kept_b + both)


def curve(histogram: np.ndarray) -> pd.DataFrame:
    """Overlap of the kept sets at every sparsity from 0 to 255/256, the same for both.

    Returns:
        Columns sparsity, kept_a, kept_b, both, overlap (both as a share of the smaller set), overlap_floor (what random masks would share),
        jaccard, floor, corrected ((jaccard − floor)/(1 − floor); NaN at sparsity 0, where any two masks are equal).
    """
    return pd.DataFrame(_curve(histogram))


def _curve(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `curve`."""
    kept, at = _kept_pairs(histogram), np.arange(BINS)
    both, a, b, weights = kept[at, at], kept[at, 0], kept[0, at], kept[0, 0]
    shared, floor = jaccard(both, a, b), random_jaccard(a, b, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        corrected = np.where(floor < 1, (shared - floor) / (1 - floor), np.nan)
        return {"sparsity": at / BINS, "kept_a": a, "kept_b": b, "both": both, "overlap": both / np.minimum(a, b),
                "overlap_floor": np.maximum(a, b) / weights, "jaccard": shared, "floor": floor, "corrected": corrected}


def spearman(histogram: np.ndarray) -> float:
    """Rank correlation of two rankings (Spearman's ρ of the bins, ties with their mean rank); NaN where one has a single bin.

    Binning moves it by less than 1/256² from that of the full ranks. Of a sum of histograms it is the correlation of ranks within matrices.
    """
    centred = []
    for axis in (1, 0):
        counts = histogram.sum(axis=axis, dtype=np.int64).astype(np.float64)
        ranks = counts.cumsum() - counts / 2
        centred.append((ranks - np.average(ranks, weights=counts), counts))
    (a, counts_a), (b, counts_b) = centred
    scale = np.sqrt(np.dot(counts_a, a * a) * np.dot(counts_b, b * b))
    return float(a @ histogram.astype(np.float64) @ b / scale) if scale > 0 else float("nan")


def overlap_table(histograms, sparsity_a: float, sparsity_b: float | None = None) -> pd.DataFrame:
    """Overlap of two rankings in every matrix.

    Args:
        histograms: {matrix: (256, 256)}.
        sparsity_b: default as `sparsity_a`.

    Returns:
        Columns matrix, block, module, weights, both, only_a, only_b, neither, changed (share of the decisions that differ), jaccard, floor,
        spearman.
    """
    rows = []
    for histogram in histograms.values():
        r = regions(histogram, sparsity_a, sparsity_a if sparsity_b is None else sparsity_b)
        rows.append({"weights": r.weights, "both": r.both, "only_a": r.only_a, "only_b": r.only_b, "neither": r.neither,
                     "changed": r.changed / r.weights, "jaccard": r.jaccard, "floor": r.floor, "spearman": spearman(histogram)})
    return pd.concat([places(list(histograms)), pd.DataFrame(rows)], axis=1)


def every_sparsity(histograms) -> pd.DataFrame:
    """All overlaps of two rankings, so that a page answers any sparsity by choosing rows.

    Args:
        histograms: {matrix: (256, 256)}.

    Returns:
        Columns by ("matrix", "module", "model"), group (as text), those of `curve`, weights, changed (share of the decisions that differ),
        spearman; 256 rows for each group.
    """
    names, found = [], []
    for by in ("matrix", "module", "model"):
        for group, histogram in (histograms if by == "matrix" else summed(histograms, by)).items():
            names.append((by, str(group)))
            columns = _curve(histogram)
            a, b, both = (columns[c] for c in ("kept_a", "kept_b", "both"))
            found.append({**columns, "weights": np.full(BINS, a[0]), "changed": (a + b - 2 * both) / a[0],
                          "spearman": np.full(BINS, spearman(histogram))})
    table = pd.DataFrame({c: np.concatenate([f[c] for f in found]) for c in found[0]})
    by, group = (pd.Categorical(np.repeat(np.array(labels, dtype=object), BINS)) for labels in zip(*names, strict=True))
    return table.assign(by=by, group=group)


def at_sparsity(table: pd.DataFrame, sparsity: float, by: str = "matrix") -> pd.DataFrame:
    """Rows of `every_sparsity` at one sparsity, those of matrices with their block and module.

    Raises:
        InputError: nothing is kept at this sparsity.
    """
    lowest = threshold(sparsity)
    if lowest >= BINS:
        raise InputError("There is no overlap to show", f"at a sparsity of {sparsity:.1%} nothing is kept", "choose a lower sparsity")
    rows = table[(table["by"] == by) & (table["sparsity"] == lowest / BINS)].reset_index(drop=True)
    return pd.concat([places(rows["group"].tolist()), rows], axis=1) if by == "matrix" else rows


# ---- a third score, and where the weights of a region sit


def region_codes(a, b) -> np.ndarray:
    """Who keeps each weight: 0 neither, 1 only A, 2 only B, 3 both (names in REGIONS).

    Args:
        a, b: bool masks of one shape, tensors or arrays, True = kept.

    Returns:
        uint8, same shape.
    """
    a, b = _masks(a, b)
    return a.view(np.uint8) + 2 * b.view(np.uint8)


def region_counts(a, b) -> Regions:
    """How many weights both, one or none of two masks keep; arguments as for `region_codes`."""
    a, b = _masks(a, b)
    both, of_a, of_b = (int(np.count_nonzero(m)) for m in (a & b, a, b))
    return Regions(both, of_a - both, of_b - both, a.size - of_a - of_b + both)


def _masks(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise InputError("The masks cannot be compared", f"their shapes are {a.shape} and {b.shape}", "choose masks of the same matrix")
    return a, b


def region_histogram(a, b, third, sparsity_a: float, sparsity_b: float) -> np.ndarray:
    """Bins of a third ranking, such as the dual score's, for the weights of every region.

    Args:
        a, b, third: uint8 ranks of one matrix.

    Returns:
        int64 (4, 256): region code of `region_codes` by bin of the third. Histograms of several matrices may be added.
    """
    at_a, at_b = threshold(sparsity_a), threshold(sparsity_b)
    flat = _flat(a, b, third)
    counts = np.zeros(4 * BINS, dtype=np.int64)
    for start in range(0, flat[0].size, CHUNK):
        x, y, z = (f[start:start + CHUNK].astype(np.uint16) for f in flat)
        counts += np.bincount(((x >= at_a) + 2 * (y >= at_b).astype(np.uint16)) * BINS + z, minlength=4 * BINS)
    return counts.reshape(4, BINS)


def kept_of_regions(histogram: np.ndarray, sparsity: float) -> pd.DataFrame:
    """What the third ranking keeps of every region at a sparsity.

    Args:
        histogram: (4, 256), as from `region_histogram`.

    Returns:
        Columns region, weights, kept, kept_share (NaN where the region is empty); both, only A, only B, neither.
    """
    order = [BOTH, ONLY_A, ONLY_B, NEITHER]
    weights, kept = histogram.sum(axis=1)[order], histogram[:, threshold(sparsity):].sum(axis=1)[order]
    share = np.divide(kept, weights, out=np.full(4, np.nan), where=weights > 0)
    return pd.DataFrame({"region": [REGIONS[i] for i in order], "weights": weights, "kept": kept, "kept_share": share})


def brushed(a, b, bins_a: tuple[int, int], bins_b: tuple[int, int]) -> np.ndarray:
    """Which weights lie in a rectangle of the plane of two rankings.

    Args:
        a, b: uint8 ranks of one shape.
        bins_a, bins_b: first and last bin, both inside.

    Returns:
        bool, same shape; `analysis.sparsity.part_counts` and `analysis.glance.cell_shares` say where in the matrix they sit.
    """
    a, b = np.asarray(a), np.asarray(b)
    return (a >= bins_a[0]) & (a <= bins_a[1]) & (b >= bins_b[0]) & (b <= bins_b[1])


def bin_range(low: float, high: float) -> tuple[int, int]:
    """First and last bin of the ranks from `low` to `high` per cent; empty (first behind last) where the two are equal."""
    return math.ceil(BINS * low / 100), math.ceil(BINS * high / 100) - 1

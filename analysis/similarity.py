"""How alike masks are: counts streamed from packed masks, similarity with its chance floor, order, map and intervals."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from analysis.matrices import groups, mask_shapes, rank_shapes, require_same, stream
from analysis.overlap import jaccard, random_jaccard
from analysis.sparsity import at_least, threshold
from dpruner.errors import InputError
from dpruner.masks import require_sparsity
from dpruner.metrics import draws

MEASURES = ("jaccard", "cosine", "overlap", "corrected")
WORDS = 1 << 17   # 64-bit words at once: a mebibyte, which stays in the processor's cache


@dataclass(frozen=True)
class Counts:
    """How many weights masks keep, alone and in pairs, in every matrix: all that similarities need.

    Attributes:
        labels: of the masks.
        names: of the matrices.
        weights: int64 (matrices,).
        both: int64 (matrices, masks, masks), weights that two masks both keep; the diagonal is what each keeps.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    weights: np.ndarray
    both: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """int64 (matrices, masks)."""
        return np.diagonal(self.both, axis1=1, axis2=2)

    def only(self, labels: Sequence[str]) -> "Counts":
        """The same for some of the masks, in the order given."""
        at = [self.labels.index(label) for label in labels]
        return Counts(tuple(labels), self.names, self.weights, self.both[:, at][:, :, at])

    def within(self, names: Sequence[str]) -> "Counts":
        """The same for some of the matrices."""
        at = [self.names.index(name) for name in names]
        return Counts(self.labels, tuple(names), self.weights[at], self.both[at])


def count_masks(paths: Mapping[str, Path]) -> Counts:
    """Counts of packed mask files of one model, matrix by matrix; the bits behind the end of a row are zero and count for nothing.

    Args:
        paths: {label: mask file}, at least one.

    Raises:
        InputError: a file is missing, damaged, no mask file, or of another model.
    """
    files = [Path(p) for p in paths.values()]
    shapes = require_same([mask_shapes(p) for p in files], files)
    return _counted(paths, shapes, files, lambda bits: bits)


def count_ranks(paths: Mapping[str, Path], sparsity: float) -> Counts:
    """Counts of the masks that files of ranks stand for at any sparsity.

    Args:
        paths: {label: file of ranks}, at least one.

    Raises:
        InputError: a file is missing, damaged, or of another model, or a sparsity outside 0..1.
    """
    files = [Path(p) for p in paths.values()]
    shapes = require_same([rank_shapes(p) for p in files], files)
    lowest = threshold(sparsity)
    return _counted(paths, shapes, files, lambda ranks: np.packbits(at_least(ranks, lowest)))


def count_dense(masks: Mapping[str, Mapping[str, object]]) -> Counts:
    """Counts of masks in memory.

    Args:
        masks: {label: {matrix: bool tensor or array}}, at least one.
    """
    shapes = require_same([{n: tuple(m.shape) for n, m in mask.items()} for mask in masks.values()], list(masks))
    both = [_common_bits([np.packbits(np.asarray(mask[n])) for mask in masks.values()]) for n in shapes]
    return _counts(masks, shapes, both)


def _counted(paths: Mapping, shapes: Mapping, files: list[Path], bits: Callable) -> Counts:
    return _counts(paths, shapes, [_common_bits([bits(array) for array in arrays]) for _, arrays in stream(files, list(shapes))])


def _counts(labels, shapes: Mapping[str, tuple[int, ...]], both: list[np.ndarray]) -> Counts:
    weights = np.array([np.prod(s, dtype=np.int64) for s in shapes.values()], dtype=np.int64)
    return Counts(tuple(labels), tuple(shapes), weights, np.array(both, dtype=np.int64).reshape(len(shapes), len(labels), len(labels)))


def _common_bits(masks: list[np.ndarray]) -> np.ndarray:
    """Bits that every two of some packed masks have in common, int64 (masks, masks)."""
    flat = [np.ascontiguousarray(m).reshape(-1) for m in masks]
    whole = flat[0].size // 8 * 8
    counts = np.zeros((len(flat), len(flat)), dtype=np.int64)
    pieces = [[f[:whole].view(np.uint64)[start:start + WORDS] for f in flat] for start in range(0, whole // 8, WORDS)]
    for piece in [*pieces, [f[whole:] for f in flat]]:
        for i, j in itertools.combinations_with_replacement(range(len(flat)), 2):
            common = piece[i] if i == j else piece[i] & piece[j]
            counts[i, j] += int(np.bitwise_count(common).sum(dtype=np.uint32))   # 2²³ bits a piece at most
    return np.maximum(counts, counts.T)


# ---- measures


def analytic_floor(kept_a: float, kept_b: float | None = None) -> float:
    """Jaccard similarity of two random masks that keep these shares: pq / (p + q − pq), so 1/3 at 50 %.

    Args:
        kept_a, kept_b: shares kept, 0..1; the second as the first by default.

    Raises:
        InputError: a share outside 0..1.
    """
    kept_b = kept_a if kept_b is None else kept_b
    require_sparsity(1 - kept_a)
    require_sparsity(1 - kept_b)
    return float(random_jaccard(kept_a, kept_b, 1.0))


def _totals(counts: Counts, by: str):
    """(group, both, expected both of random masks with these counts in every matrix, kept by each), the matrices of (masks, masks)."""
    at = {name: i for i, name in enumerate(counts.names)}
    for group, members in groups(counts.names, by).items():
        chosen = [at[n] for n in members]
        kept, weights = counts.kept[chosen].astype(np.float64), counts.weights[chosen]
        expected = np.einsum("ma,mb,m->ab", kept, kept, 1 / np.maximum(weights, 1))
        yield group, counts.both[chosen].sum(axis=0), expected, counts.kept[chosen].sum(axis=0)


def _measured(measure: str, both: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A measure for every two masks; two masks that keep nothing are equal, and one of them shares nothing with any other."""
    a, b = kept[:, None], kept[None, :]
    if measure == "jaccard":
        return jaccard(both, a, b)
    scale = np.sqrt(a.astype(np.float64) * b) if measure == "cosine" else np.minimum(a, b).astype(np.float64)
    return np.divide(both, scale, out=((a == 0) & (b == 0)).astype(np.float64), where=scale > 0)


def similarity(counts: Counts, measure: str = "jaccard", by: str = "model") -> dict[str | int, np.ndarray]:
    """Similarity of every two masks, over the whole model, every module, block or matrix.

    Args:
        measure: "jaccard" |A∩B|/|A∪B|; "cosine" |A∩B|/√(|A||B|); "overlap" |A∩B|/min(|A|,|B|), the overlap coefficient; "corrected"
            (J − floor)/(1 − floor), 0 for random masks, 1 for equal ones, below 0 for masks that avoid each other.
        by: "model", "module", "block" or "matrix".

    Returns:
        {group: float64 (masks, masks)}, symmetric, 1 on the diagonal.

    Raises:
        InputError: another measure or grouping.
    """
    _require_measure(measure)
    found = {}
    for group, both, expected, kept in _totals(counts, by):
        if measure == "corrected":
            values, floor = _measured("jaccard", both, kept), _measured("jaccard", expected, kept)
            values = np.divide(values - floor, 1 - floor, out=np.ones_like(values), where=floor < 1)
            np.fill_diagonal(values, 1.0)   # also where random masks of these counts would be equal: 0/0
        else:
            values = _measured(measure, both, kept)
        found[group] = values
    return found


def floor(counts: Counts, measure: str = "jaccard", by: str = "model") -> dict[str | int, np.ndarray]:
    """What random masks that keep as many of every matrix would show, as `similarity`.

    On the diagonal stands what two such masks share, not one with itself.
    """
    _require_measure(measure)
    if measure == "corrected":
        return {group: np.zeros_like(expected) for group, _, expected, _ in _totals(counts, by)}
    return {group: _measured(measure, expected, kept) for group, _, expected, kept in _totals(counts, by)}


def mean_of_pairs(matrices: Mapping[str | int, np.ndarray]) -> dict[str | int, float]:
    """The mean over every two different masks in every group; NaN for a single mask."""
    def mean(matrix):
        a, b = np.triu_indices(len(matrix), 1)
        return float(matrix[a, b].mean()) if len(a) else float("nan")

    return {group: mean(matrix) for group, matrix in matrices.items()}


class Halves(NamedTuple):
    """What masks share that were each made from half of a domain's text: with equal amounts of text, domains compare on equal terms.

    Attributes:
        same: (masks, masks), the ceiling of each pair: the mean of what the two halves of either domain share.
        other: (masks, masks), the mean over a half of one domain and a half of the other, four pairs of masks.
        least_same, most_other: (masks, masks), the lower of the two behind `same`, the highest of the four behind `other`. Where the one
            lies above the other, not a single half of a domain is as near to the other domain's as to its own; of six numbers that mean the same
            two chosen ones are the highest once in 15.
    """

    same: np.ndarray
    other: np.ndarray
    least_same: np.ndarray
    most_other: np.ndarray


def halves(counts: Counts, measure: str = "jaccard", by: str = "model") -> dict[str | int, Halves]:
    """Same and different domains on equal terms, in every group.

    Args:
        counts: of the halves' masks, the two of each domain side by side; the rest as for `similarity`.
    """
    return {group: _halves(matrix) for group, matrix in similarity(counts, measure, by).items()}


def _halves(shared: np.ndarray) -> Halves:
    n = len(shared) // 2
    four = shared.reshape(n, 2, n, 2)
    own = np.diagonal(four[:, 0, :, 1])
    return Halves((own[:, None] + own[None, :]) / 2, four.mean(axis=(1, 3)), np.minimum(own[:, None], own[None, :]), four.max(axis=(1, 3)))


def of_the_way(value: float, floor: float, ceiling: float) -> float:
    """How far a similarity lies from what random masks share (0) to what two halves of one domain share (1); above 1 where it passes that."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else float("nan")


def _require_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise InputError(f"The similarity {measure!r} is not known", "there are four measures", f"choose one of {', '.join(MEASURES)}")


def pairs(counts: Counts, by: str = "model", seed: int = 0) -> pd.DataFrame:
    """Every two masks in every group, with the interval of their Jaccard similarity.

    Returns:
        Columns group, a, b, jaccard, low, high (95 %, matrices drawn with replacement; NaN for a single matrix), floor, corrected, cosine,
        overlap, weights, kept_a, kept_b, both, changed (decisions that differ).
    """
    tables = {measure: similarity(counts, measure, by) for measure in MEASURES}
    floors, at, rows = floor(counts, "jaccard", by), {name: i for i, name in enumerate(counts.names)}, []
    for group, members in groups(counts.names, by).items():
        chosen = [at[n] for n in members]
        both, kept = counts.both[chosen], counts.kept[chosen]
        low, high = interval(both, kept[:, :, None] + kept[:, None, :] - both, seed)
        for i, j in itertools.combinations(range(len(counts.labels)), 2):
            kept_a, kept_b, shared = both[:, i, i], both[:, j, j], both[:, i, j]
            rows.append({"group": group, "a": counts.labels[i], "b": counts.labels[j], "jaccard": tables["jaccard"][group][i, j],
                         "low": low[i, j], "high": high[i, j], "floor": floors[group][i, j],
                         **{m: tables[m][group][i, j] for m in ("corrected", "cosine", "overlap")},
                         "weights": int(counts.weights[chosen].sum()), "kept_a": int(kept_a.sum()), "kept_b": int(kept_b.sum()),
                         "both": int(shared.sum()), "changed": int((kept_a + kept_b - 2 * shared).sum())})
    columns = ["group", "a", "b", "jaccard", "low", "high", "floor", "corrected", "cosine", "overlap", "weights", "kept_a", "kept_b",
               "both", "changed"]
    return pd.DataFrame(rows, columns=columns)


def interval(both: np.ndarray, either: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of Jaccard similarities over matrices: how far they depend on which matrices a model happens to have.

    Args:
        both, either: (matrices, ...) counts.

    Returns:
        (low, high), float64 (...); NaN where there is a single matrix, which says nothing about others.
    """
    matrices = len(both)
    if matrices < 2:
        return np.full(both.shape[1:], np.nan), np.full(both.shape[1:], np.nan)
    times = np.concatenate(list(draws(matrices, seed)))   # one product instead of a sum for every pair of masks
    shared, joined = (np.tensordot(times, x.astype(np.float64), 1) for x in (both, either))
    ratios = np.divide(shared, joined, out=np.ones_like(shared), where=joined > 0)
    low, high = np.quantile(ratios, (0.025, 0.975), axis=0)
    return low, high


# ---- order and map


def order(matrix: np.ndarray) -> np.ndarray:
    """An order in which like masks stand side by side: average linkage on 1 − similarity, leaves ordered optimally.

    Args:
        matrix: (masks, masks) similarities.

    Returns:
        int64 (masks,) indices.
    """
    if len(matrix) < 3:
        return np.arange(len(matrix))
    found = linkage(squareform(_distances(matrix), checks=False), method="average", optimal_ordering=True)
    leaves = leaves_list(found).astype(np.int64)
    return leaves if leaves[0] < leaves[-1] else leaves[::-1]   # either end may come first: the one that was named first


def embed(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Masks as points in the plane whose distances come close to 1 − similarity: classical scaling (Torgerson 1952).

    Args:
        matrix: (masks, masks) similarities.

    Returns:
        ((masks, 2) coordinates, in each of which the point farthest from 0 is positive; the share, 0..1, of the squared distances that the
        plane shows, 1 where there is nothing to show).
    """
    distances = _distances(matrix)
    n = len(distances)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-centre @ (distances**2) @ centre / 2)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    real = np.where(values > 1e-12, values, 0.0)   # rounding, and what no plane can show, is no direction
    points = np.zeros((n, 2))
    points[:, :len(real)] = vectors * np.sqrt(real)
    farthest = np.abs(points).round(9).argmax(axis=0)
    points *= np.where(points[farthest, [0, 1]] < 0, -1, 1)
    shown = np.square(points[:, None] - points[None]).sum()
    total = np.square(distances).sum()
    return points, float(min(shown / total, 1.0)) if total > 0 else 1.0


def domain_points(matrix: np.ndarray, labels: Sequence[str]) -> tuple[pd.DataFrame, float]:
    """`embed` as a table: columns label, x, y; and the share of the squared distances that it shows."""
    points, shown = embed(matrix)
    return pd.DataFrame({"label": list(labels), "x": points[:, 0], "y": points[:, 1]}), shown


def _distances(matrix: np.ndarray) -> np.ndarray:
    distances = np.maximum(1 - (matrix + matrix.T) / 2, 0)
    np.fill_diagonal(distances, 0)
    return distances

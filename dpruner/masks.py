"""From scores to masks: exact counts at every granularity; applying, packing and ranking them."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from dpruner import memory
from dpruner.errors import InputError

GRANULARITIES = ("matrix", "block", "row", "global")   # and "n:m"
GROUP_COLUMNS = 128
BINS = 256
SAMPLED = 2**14   # values from which selection by a sample is faster


class Scores(dict):
    """{full parameter name: float32 Tensor shaped as the model stores the weight}, knowing which weights are stored as (in, out).

    Args:
        transposed: names of the weights stored as (in, out); rows and columns of a mask are meant in the (out, in) sense.
    """

    def __init__(self, items=(), transposed: Collection[str] = ()):
        super().__init__(items)
        self.transposed = frozenset(transposed)


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the precision that scores are computed in: float32, and float64 where it is that already."""
    return tensor.to(precision(tensor))


def precision(tensor: torch.Tensor) -> torch.dtype:
    """What `precise` makes of a tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_rows(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A view (out, in) of a tensor shaped as stored; its own inverse. The one boundary where Conv1D differs."""
    return tensor.t() if transposed else tensor


def require_sparsity(sparsity: float) -> None:
    """Refuse a sparsity outside 0..1 (a fraction removed, not a percentage).

    Raises:
        InputError: it is not a number from 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise InputError(f"The sparsity {sparsity} cannot be used", "it is the fraction of weights removed, from 0 to 1",
                         "give 0.5 to remove half of them")


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` lowest of each row, ties by lower index first.

    Args:
        scores: (groups, size).

    Returns:
        BoolTensor (groups, size) with exactly `count` True in every row.
    """
    if count == 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_of_rows(scores, count)
    chosen = scores <= threshold
    if torch.count_nonzero(chosen) == count * len(scores):   # no row has more of equals than it wants
        return chosen
    below, ties = scores < threshold, scores == threshold
    return below | (ties & (ties.cumsum(1) <= count - below.sum(1, keepdim=True)))


def _kth_of_rows(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th lowest value (from 1) of each row of (groups, size), as (groups, 1); numpy selects several times faster than torch on the CPU."""
    if scores.device.type != "cpu" or scores.dtype == torch.bfloat16:
        return scores.kthvalue(k, dim=1, keepdim=True).values
    values = scores.detach().numpy()
    if len(values) == 1 and values.size >= SAMPLED:
        return torch.from_numpy(_kth_of_many(values[0], k).reshape(1, 1))
    return torch.from_numpy(np.partition(values, k - 1, axis=1)[:, k - 1:k].copy())


def _kth_of_many(values: np.ndarray, k: int) -> np.ndarray:
    """The k-th lowest (from 1) of many values: a sample says between which two it lies, and only those between are sorted out.

    Floyd and Rivest, "Expected time bounds for selection", 1975. The two are four standard deviations of the sample's rank away, so that they
    hardly ever miss; a miss is noticed, and then all values are looked at.

    Args:
        values: (size,).
    """
    sample = np.sort(values[::round(len(values) ** (1 / 3)) | 1])   # odd: it shares no factor with widths that are powers of two
    middle, spread = k / len(values) * len(sample), 2 * math.sqrt(len(sample))
    low, high = sample[max(0, int(middle - spread))], sample[min(len(sample) - 1, int(middle + spread))]
    between, rank = values[np.flatnonzero((values >= low) & (values <= high))], k - np.count_nonzero(values < low)
    if not 0 < rank <= len(between):
        between, rank = values, k
    return np.partition(between, rank - 1)[rank - 1]


def parse_granularity(granularity: str) -> tuple[int, int] | None:
    """(n, m) of "n:m", None for the named ones."""
    if granularity in GRANULARITIES:
        return None
    pattern = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", granularity)
    if pattern and 0 < int(pattern[1]) < int(pattern[2]):
        return int(pattern[1]), int(pattern[2])
    raise InputError(f"The granularity {granularity!r} is not known", "it says over which weights a threshold is taken",
                     f"choose one of {', '.join(GRANULARITIES)}, or n:m such as 2:4")


def _column_groups(columns: int, hidden: int) -> list[int]:
    """Widths of the column groups of "iterative blocking": 128 each, or as many near-equal ones as the hidden size has."""
    if columns % GROUP_COLUMNS == 0:
        return [GROUP_COLUMNS] * (columns // GROUP_COLUMNS)
    groups = max(1, -(-hidden // GROUP_COLUMNS))
    return [len(part) for part in np.array_split(np.arange(columns), groups)]


def usual_width(rows: Collection[torch.Tensor]) -> int:
    """The most frequent input width of matrices (out, in), which counts as the hidden size; 0 where there are none."""
    return Counter(r.shape[1] for r in rows).most_common(1)[0][0] if rows else 0


def removed_rows(scores: torch.Tensor, sparsity: float, granularity: str, hidden: int) -> torch.Tensor:
    """BoolTensor (out, in), True = removed, for scores (out, in) at any granularity but "global"; `hidden` as from `usual_width`."""
    out, columns = scores.shape
    if granularity == "matrix":
        return lowest(scores.reshape(1, -1), round(sparsity * scores.numel())).view(out, columns)
    if granularity == "row":
        return lowest(scores, round(sparsity * columns))
    if granularity == "block":
        parts = scores.split(_column_groups(columns, hidden), dim=1)
        return torch.cat([removed_rows(part, sparsity, "matrix", hidden) for part in parts], dim=1)
    _, m = parse_granularity(granularity)
    whole = columns // m * m
    groups = lowest(scores[:, :whole].reshape(-1, m), round(sparsity * m)).view(out, whole)
    return torch.cat([groups, lowest(scores[:, whole:], round(sparsity * (columns - whole)))], dim=1)


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """int64 keys in 0..2³²-1 in the order of the float32 scores (flat; float64 is rounded): the bits of a float are sorted once negatives are flipped."""
    bits = (scores.reshape(-1).float() + 0.0).view(torch.int32)   # + 0.0 makes -0.0 and 0.0 one value
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31


def kth_lowest(tensors: Collection[torch.Tensor], k: int) -> tuple[int, int]:
    """The k-th lowest (from 1) of all values of several tensors, without joining them: two rounds of counting, 16 bits each.

    Returns:
        (its key as `_ordered` gives it, how many values are strictly below it).
    """
    below, prefix = 0, 0
    for shift in (16, 0):
        counts = np.zeros(2**16, dtype=np.int64)
        for tensor in tensors:
            keys = _ordered(tensor)
            if shift == 0:
                keys = keys[keys >> 16 == prefix]
            counts += torch.bincount((keys >> shift) & 0xFFFF, minlength=2**16).cpu().numpy()
        digit = int(np.searchsorted(counts.cumsum(), k - below))
        below += int(counts[:digit].sum())
        prefix = prefix << 16 | digit
    return prefix, below


def _global_removed(rows: dict[str, torch.Tensor], sparsity: float) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, True = removed) of each matrix in turn. One threshold for all matrices (each (out, in)); ties go to the earlier matrix, then to the lower index."""
    count = round(sparsity * sum(r.numel() for r in rows.values()))
    if count == 0:
        yield from ((n, torch.zeros_like(r, dtype=torch.bool)) for n, r in rows.items())
        return
    threshold, below = kth_lowest(rows.values(), count)
    quota = count - below
    for name, r in rows.items():
        keys = _ordered(r)
        ties = keys == threshold
        gone = (keys < threshold) | (ties & (ties.cumsum(0) <= quota))
        quota -= min(quota, int(ties.sum()))
        yield name, gone.view(r.shape)


def global_shares(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """The share of every matrix that one threshold for all of them would remove.

    Args:
        scores: {name: Tensor}; each is asked for twice, so that they may be computed when they are asked for.
        sparsity: fraction of all weights that goes.
    """
    count = round(sparsity * sum(s.numel() for s in scores.values()))
    if count == 0:
        return dict.fromkeys(scores, 0.0)
    threshold, _ = kth_lowest(scores.values(), count)
    return {n: float((_ordered(s) <= threshold).double().mean()) for n, s in scores.items()}


def make_masks(scores: Mapping[str, torch.Tensor], sparsity: float | None = None, granularity: str = "matrix",
               transposed: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Keep the highest scores: exactly `round(sparsity · group size)` weights go in every group, ties by lower index first (METHOD section 5).

    Args:
        scores: {name: Tensor as the model stores the weight}; higher is kept.
        sparsity: fraction removed, 0..1. For "n:m" it may be left out and is 1 − n/m.
        granularity: "matrix" (one threshold a matrix), "block" (one for every 128 input columns; where 128 does not divide, as many near-equal
            groups as the hidden size has, the most frequent input width counting as such), "row" (per output), "global" (one for the whole
            model), or "n:m" (n kept of every m along the input; what is left over at the end of a row is its own group).
        transposed: names stored as (in, out); known by itself when `scores` comes from this package.

    Returns:
        {name: BoolTensor shaped as stored, True = kept}.

    Raises:
        InputError: sparsity outside 0..1 or at odds with n:m, unknown granularity, NaN in a score.
    """
    pattern = parse_granularity(granularity)
    if pattern:
        implied = 1 - pattern[0] / pattern[1]
        if sparsity is not None and abs(sparsity - implied) > 1e-9:
            raise InputError(f"The sparsity {sparsity} and the granularity {granularity} contradict each other",
                             f"{granularity} removes {implied:.4g} of the weights", "leave the sparsity out or choose another granularity")
        sparsity = implied
    if sparsity is None:
        raise InputError("No sparsity was given", f"the granularity {granularity!r} does not imply one", "give the fraction to remove, such as 0.5")
    require_sparsity(sparsity)
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise InputError(f"The scores of {name} cannot be ranked", "they hold NaN", "check the model's weights and the calibration loss")
    transposed = getattr(scores, "transposed", ()) if transposed is None else transposed
    rows = {n: as_rows(s, n in transposed) for n, s in scores.items()}
    if granularity == "global":
        removed = _global_removed(rows, sparsity)
    else:
        hidden = usual_width(rows.values())
        removed = ((n, removed_rows(r, sparsity, granularity, hidden)) for n, r in rows.items())
    return {n: memory.kept(as_rows(~r, n in transposed).contiguous()) for n, r in removed}


def sparsity_of(masks: Mapping[str, torch.Tensor]) -> float:
    """Fraction of the masked weights that is removed."""
    return 1 - sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


@contextlib.contextmanager
def pruned(model: nn.Module, masks: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[nn.Module]:
    """The model with masks applied; its weights come back bit for bit on exit, also when the body raises.

    Without `weights` only the removed values are put aside; a removed weight is exactly 0.

    Args:
        masks: {full parameter name: BoolTensor, True = kept}; not every weight needs one.
        weights: compensated weights {name: Tensor}, put in before the mask is applied.

    Raises:
        InputError: a mask fits no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise InputError("The masks do not fit the model", f"there is no weight {name} of shape {tuple(mask.shape)} in it",
                             "use masks made for this very model")
    kept_aside = []
    try:
        for name, mask in masks.items():
            data = parameters[name].data
            gone = ~mask.to(data.device)
            kept_aside.append((data, memory.kept(gone), memory.copied(data) if weights else memory.kept(data[gone])))
            if weights:
                data.copy_(weights[name])
            data.masked_fill_(gone, 0)
        yield model
    finally:
        for data, gone, values in kept_aside:
            if values.shape == data.shape:
                data.copy_(values)
            else:
                data[gone.to(data.device)] = values.to(data.device)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """A mask as bits: numpy.packbits along the last axis, little-endian. BoolTensor (..., n) to uint8 (..., ⌈n/8⌉)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpack(bits: torch.Tensor, shape: Collection[int]) -> torch.Tensor:
    """The mask of that shape back from its bits."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=tuple(shape)[-1], bitorder="little").astype(bool))


def rank_bins(scores: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Each weight's rank in its matrix, in 256 equal bins, 0 the lowest: `⌊256 · rank / size⌋`.

    `rank_bins(S) >= 256 · s` is the mask of sparsity s at granularity "matrix", exactly where 256 · s and s · size are whole, within 1/256 elsewhere.

    Args:
        scores: Tensor as stored; ties by lower index of the (out, in) order, as in `make_masks`.

    Returns:
        uint8, same shape.
    """
    return ranked(scores, transposed)[0]


def ranked(scores: torch.Tensor, transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`rank_bins`, and the scores between which the bins lie: what turns a rank back into a score, to 1/256 of the weights.

    Returns:
        (uint8 bins as stored, float32 (257,): lowest score of each bin, then the highest of all).
    """
    rows = as_rows(scores, transposed)
    flat = rows.reshape(-1)
    # numpy sorts values some twenty times faster than a stable sort finds the order; elsewhere torch is at home
    values = torch.from_numpy(np.sort(flat.detach().numpy())) if flat.device.type == "cpu" and flat.dtype != torch.bfloat16 else flat.sort().values
    size = values.numel()
    first = -(-torch.arange(BINS, device=flat.device) * size // BINS)   # ceil(bin · size / 256): the first rank in the bin
    lowest_of = values[first.clamp(max=size - 1)]
    starts = lowest_of[first < size]   # fewer than 256 where the matrix has fewer weights: the last bins are empty
    bins = torch.bucketize(flat, starts[1:], right=True, out_int32=True).to(torch.uint8)
    _share_out_ties(bins, flat, values, starts.unique())
    return as_rows(bins.view(rows.shape), transposed).contiguous(), torch.cat([lowest_of, values[-1:]]).float()


def _share_out_ties(bins: torch.Tensor, flat: torch.Tensor, values: torch.Tensor, at_edges: torch.Tensor) -> None:
    """Equal scores that lie across an edge of bins go to both sides of it, the lower index first; in place.

    Args:
        bins: uint8 (size,), right for all other scores.
        flat: the scores (size,).
        values: the scores, sorted.
        at_edges: the distinct lowest scores of the bins.
    """
    begin, end = torch.searchsorted(values, at_edges), torch.searchsorted(values, at_edges, right=True)
    across = begin * BINS // values.numel() != (end - 1) * BINS // values.numel()
    tied, begin = at_edges[across], begin[across]
    if not tied.numel():
        return
    group = torch.bucketize(flat, tied).clamp(max=tied.numel() - 1)
    where = (tied[group] == flat).nonzero().squeeze(1)
    group, order = group[where].to(torch.uint8).sort(stable=True)   # 256 groups at most, and bytes are sorted fastest
    group = group.long()
    nth = torch.arange(group.numel(), device=flat.device) - torch.searchsorted(group, torch.arange(tied.numel(), device=flat.device))[group]
    bins[where[order]] = ((begin[group] + nth) * BINS // values.numel()).to(torch.uint8)


def jaccard(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Weights that both masks keep, as a share of those that either keeps."""
    both = sum(int((a[n] & b[n]).sum()) for n in a)
    either = sum(int((a[n] | b[n]).sum()) for n in a)
    return both / max(either, 1)


def jaccard_floor(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """What two random masks with these masks' counts in every matrix would share: 1/3 where half is kept."""
    both = either = 0.0
    for n in a:
        kept_a, kept_b = float(a[n].float().mean()), float(b[n].float().mean())
        both += a[n].numel() * kept_a * kept_b
        either += a[n].numel() * (kept_a + kept_b - kept_a * kept_b)
    return both / max(either, 1.0)

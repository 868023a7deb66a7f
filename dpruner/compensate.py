"""Masks whose kept weights move, so that every layer's output stays close (METHOD section 4, `compensate=`)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from dpruner import memory
from dpruner.errors import InputError
from dpruner.general import saliency, sweep_group
from dpruner.formulas import inverse
from dpruner.hessian import mix
from dpruner.masks import as_rows, global_shares, lowest, precise, require_sparsity
from dpruner.model import prunable_linears, transposed_names
from dpruner.partial import NOTHING, Checkpoint
from dpruner.walk import Progress, quiet, walk

HESSIANS = ("general", "domain", "mix")
ALLOTMENTS = ("loss", "even")


class Compensated(NamedTuple):
    """A mask {name: BoolTensor, True = kept} and the weights that go with it {name: Tensor in the model's precision, 0 where removed}."""

    masks: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def compensated_walk(model: nn.Module, calibrations: list[list[torch.Tensor]], choose, *, refined: int = 0, stage: str = "compensation",
                     progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Compensated:
    """The walk of section 2 with any rule for what goes, keeping its mask and its updated weights.

    Args:
        calibrations: sets of batches; their Hessians are mixed where there is more than one.
        choose: `choose(name, W1, d, columns)` gives a BoolTensor (out, b), True = remove; in the (out, in) sense.
        refined: steps of least squares that move a matrix's kept weights once more when its mask is known; see `obs.refine`.
    """
    names = transposed_names(model)
    linears = prunable_linears(model)
    masks = {n: memory.zeros(m.weight.detach(), torch.bool) for n, m in linears.items()}
    weights = {n: memory.copied(m.weight.detach()) for n, m in linears.items()}

    def visit(rows, hessians):
        H = hessians[0].mean() if len(hessians) == 1 else mix([h.mean() for h in hessians])
        new, removed = sweep_group(rows, H, choose, refined=refined)
        for name in rows:
            masks[name].copy_(as_rows(~removed[name], name in names))
            weights[name].copy_(as_rows(new[name], name in names))
        return new

    walk(model, calibrations, visit, {"mask": masks, "weight": weights}, stage=stage, progress=progress, checkpoint=checkpoint)
    return Compensated(masks, weights)


def compensation_sets(general: list[torch.Tensor], domain: list[torch.Tensor], hessian: str = "mix") -> list[list[torch.Tensor]]:
    """The calibration sets whose Hessian decides: open domain, domain, or both.

    Raises:
        InputError: `hessian` is none of "general", "domain", "mix".
    """
    if hessian not in HESSIANS:
        raise InputError(f"The Hessian {hessian!r} is not known", "compensation follows one of three calibrations",
                         f"choose one of {', '.join(HESSIANS)}")
    return {"general": [general], "domain": [domain], "mix": [general, domain]}[hessian]


def compensate_after(model: nn.Module, calibrations: list[list[torch.Tensor]], masks: Mapping[str, torch.Tensor], *,
                     progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Compensated:
    """`compensate="after"`: the mask is given; the walk only moves the kept weights.

    Args:
        masks: {name: BoolTensor as stored, True = kept}, of any formula and granularity.
    """
    names = transposed_names(model)

    def choose(name, W1, d, columns):
        return ~as_rows(masks[name].to(W1.device), name in names)[:, columns]

    return compensated_walk(model, calibrations, choose, progress=progress, checkpoint=checkpoint)


def dual_saliency(W: torch.Tensor, diagonal: torch.Tensor, fisher: torch.Tensor, lam: float) -> torch.Tensor:
    """`[w²/d²]/mean + λ·[f·w²]/mean`, means over the block: what the layer's output loses, plus what the loss itself says of the weight.

    Args:
        W, fisher: (out, b).
        diagonal: (b,).
    """
    output, loss = saliency(W, diagonal), fisher * W.square()
    return relative(output) + lam * relative(loss)


def relative(scores: torch.Tensor) -> torch.Tensor:
    """Scores divided by their mean; zeros stay zeros where all are."""
    mean = scores.mean()
    return scores / torch.where(mean > 0, mean, torch.ones_like(mean))


ALLOT = 0.5        # how far sparsities follow the predicted loss, 0 (even) to 1; chosen in docs/RESULTS.md
MOST_ALLOTTED = 0.97


class _Losses(Mapping):
    """{name: predicted loss of removing each weight}, computed when it is asked for: no second copy of the model is held."""

    def __init__(self, linears: Mapping[str, nn.Module], fishers: list[Mapping[str, torch.Tensor]]):
        self.linears, self.fishers = linears, fishers
        self.totals = [sum(float(self._loss(n, f).sum(dtype=torch.float64)) for n in linears) for f in fishers]

    def _loss(self, name: str, fisher: Mapping[str, torch.Tensor]) -> torch.Tensor:
        w = precise(self.linears[name].weight.detach())
        return fisher[name].to(w.device) * w.square()

    def __getitem__(self, name: str) -> torch.Tensor:
        return sum(self._loss(name, f) * inverse(total) for f, total in zip(self.fishers, self.totals, strict=True))

    def __iter__(self):
        return iter(self.linears)

    def __len__(self):
        return len(self.linears)


def allotted(model: nn.Module, fishers: list[Mapping[str, torch.Tensor]], sparsity: float, strength: float = ALLOT) -> dict[str, float]:
    """Sparsities of the matrices, so that those lose less whose weights the loss needs more; their mean over all weights is `sparsity`.

    The loss of removing a weight is predicted as f·w², f the diagonal Fisher; open domain and domain count alike, each divided by its
    total. One threshold for the whole model would remove some share of every matrix; its sparsity lies between that share and the even one,
    because compensation makes up for more where more goes.

    Args:
        fishers: diagonal Fishers {name: Tensor as stored}, of the domain, or of both sides.
        sparsity: fraction of all prunable weights to remove.
        strength: 0 allots evenly, 1 as the one threshold would.

    Returns:
        {name: fraction to remove}, each at most 0.97 (or `sparsity`, where that is more).
    """
    linears = prunable_linears(model)
    wanted = global_shares(_Losses(linears, fishers), sparsity)
    sizes = {n: m.weight.numel() for n, m in linears.items()}
    most, whole = max(MOST_ALLOTTED, sparsity), sum(sizes.values())

    def shifted(by: float) -> dict[str, float]:
        return {n: min(max(sparsity + strength * (share - sparsity) + by, 0.0), most) for n, share in wanted.items()}

    low, high = -1.0, 1.0   # what cannot go from a full or an empty matrix goes from the others: all sparsities move by as much
    for _ in range(40):
        middle = (low + high) / 2
        removed = sum(s * sizes[n] for n, s in shifted(middle).items())
        low, high = (middle, high) if removed < sparsity * whole else (low, middle)
    return shifted(high)


def compensate_walk(model: nn.Module, calibrations: list[list[torch.Tensor]], fisher: Mapping[str, torch.Tensor],
                    sparsity: float | Mapping[str, float], lam: float = 1.0, *, refined: int = 0, progress: Progress = quiet,
                    checkpoint: Checkpoint = NOTHING) -> Compensated:
    """`compensate="walk"`: the dual score is taken inside the walk, from the weights as compensation has left them (METHOD section 4).

    Args:
        fisher: {name: Tensor as stored}, the diagonal Fisher; see `domain.fisher_diagonal` and `mixed_fisher`.
        sparsity: of all matrices, or {name: sparsity} as `allotted` gives them; `round(sparsity · out · b)` weights go in every block of
            128 columns.
        lam: weight of the loss's side against the layer output's.
        refined: as in `compensated_walk`.
    """
    sparsities = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(prunable_linears(model), sparsity)
    for one in set(sparsities.values()):
        require_sparsity(one)
    names = transposed_names(model)

    def choose(name, W1, d, columns):
        f = as_rows(fisher[name].to(W1.device), name in names)[:, columns]
        scores = dual_saliency(W1, d, f, lam)
        return lowest(scores.reshape(1, -1), round(sparsities[name] * scores.numel())).view(scores.shape)

    return compensated_walk(model, calibrations, choose, refined=refined, progress=progress, checkpoint=checkpoint)


def mixed_fisher(fishers: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sum of diagonal Fishers, each matrix divided by its mean (`fisher="both"`), where the first ones are: others may come from a file."""
    return {n: memory.kept(sum(relative(f[n].to(first.device)) for f in fishers)) for n, first in fishers[0].items()}


FISHER_ENOUGH = 32   # sequences; with 16 text of neither calibration suffers, see docs/RESULTS.md


def fisher_batches(batches: Sequence) -> Sequence:
    """The calibration sequences whose gradients the walk looks at: every other one, neighbours being the likest, where that leaves enough.

    A gradient costs three forward passes: with all of them the walk would take more than twice the time of SparseGPT.
    """
    return batches[::2] if len(batches) >= 2 * FISHER_ENOUGH else batches

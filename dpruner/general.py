"""General importance G: what the open domain loses with each weight (METHOD section 2). No gradients."""

import torch
from torch import nn

from dpruner.errors import InputError
from dpruner.hessian import dampen, dead_inputs, factor
from dpruner.masks import Scores, as_rows, require_sparsity
from dpruner.model import blank_scores
from dpruner.obs import BLOCKSIZE, refine, sweep
from dpruner.partial import NOTHING, Checkpoint
from dpruner.walk import Progress, quiet, walk

SPARSITY = 0.52   # what the authors' release prunes while it scores: half of LLaMA-2-7B


def saliency(W: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """`W² / diag(U)²`: the output error of removing each weight alone, the others moving to make up for it (optimal brain surgeon).

    Args:
        W: (out, in).
        diagonal: (in,), of the upper factor U.
    """
    return W.square() / diagonal.square()


def release_cut(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which scores of a block of columns the released code removes: all that are ≤ `sorted(scores)[⌊sparsity · numel⌋]`, counted from zero.

    That is one weight more than ⌊sparsity · numel⌋, and more with ties. At sparsity 0 nothing goes.

    Args:
        scores: (out, b).

    Returns:
        BoolTensor (out, b), True = remove.
    """
    if sparsity == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    index = min(int(sparsity * scores.numel()), scores.numel() - 1)
    return scores <= scores.flatten().kthvalue(index + 1).values


def sweep_group(rows: dict[str, torch.Tensor], H: torch.Tensor, choose, blocksize: int = BLOCKSIZE, refined: int = 0):
    """Prune and compensate all linears that share an input, in one sweep.

    Args:
        rows: {name: float32 (out, in)}.
        H: (in, in), as accumulated; dead inputs lose their columns, then it is dampened and factored.
        choose: `choose(name, W1, d, columns)` for one linear's block of columns; see `obs.sweep`.
        refined: steps of `obs.refine` after the sweep.

    Returns:
        ({name: compensated weight (out, in), zero where removed}, {name: BoolTensor (out, in), True = removed}).
    """
    sizes = [r.shape[0] for r in rows.values()]
    W = torch.cat(list(rows.values()))
    W[:, dead_inputs(H)] = 0

    def choose_all(W1, d, columns):
        return torch.cat([choose(name, part, d, columns) for name, part in zip(rows, W1.split(sizes), strict=True)])

    H = dampen(H)
    new, removed = sweep(W, factor(H), choose_all, blocksize)
    if refined:
        new = refine(new, W, H, ~removed, refined)
    return dict(zip(rows, new.split(sizes), strict=True)), dict(zip(rows, removed.split(sizes), strict=True))


def general_importance(model: nn.Module, batches: list[torch.Tensor], sparsity: float = SPARSITY, mode: str = "sequential", *,
                       progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Scores:
    """G of every prunable weight: `W² / diag(U)²`, with W as the compensation so far has left it (METHOD section 2).

    Args:
        model: a decoder; its weights are untouched afterwards.
        batches: open-domain calibration, LongTensors (b, seqlen); how they are batched changes no bit.
        sparsity: the general sparsity at which the walk prunes while it scores.
        mode: "sequential" (every block sees inputs made by pruned blocks) or "static" (one pass, nothing is updated).
        progress: called with ("general importance", blocks done, blocks).
        checkpoint: see `walk`.

    Returns:
        Scores, float32 ≥ 0, shaped as stored.

    Raises:
        InputError: sparsity outside 0..1, unknown mode, empty or too long batches.
    """
    require_sparsity(sparsity)
    if mode not in ("sequential", "static"):
        raise InputError(f"The mode {mode!r} is not known", "general importance has two", "choose 'sequential' or 'static'")
    G = blank_scores(model)
    names = G.transposed

    def sequential(rows, hessians):
        def choose(name, W1, d, columns):
            scores = saliency(W1, d)
            as_rows(G[name], name in names)[:, columns] = scores
            return release_cut(scores, sparsity)
        return sweep_group(rows, hessians[0].mean(), choose)[0]

    def static(rows, hessians):
        H = hessians[0].mean()
        dead, diagonal = dead_inputs(H), factor(dampen(H)).diagonal()
        for name, W in rows.items():
            W[:, dead] = 0
            as_rows(G[name], name in names).copy_(saliency(W, diagonal))

    visit = sequential if mode == "sequential" else static
    walk(model, [batches], visit, {"G": G}, update=mode == "sequential", stage="general importance", progress=progress, checkpoint=checkpoint)
    return G

"""The methods D-Pruner is compared with, on the same data (METHOD section 6)."""

import hashlib

import torch
from torch import nn

from dpruner import memory
from dpruner.compensate import Compensated, compensated_walk
from dpruner.general import release_cut, saliency
from dpruner.masks import Scores, as_rows, precise, removed_rows, require_sparsity, usual_width
from dpruner.model import blank_scores, prunable_linears, transposed_names
from dpruner.partial import NOTHING, Checkpoint
from dpruner.walk import Progress, quiet, walk


def magnitude(model: nn.Module) -> Scores:
    """`|w|` of every prunable weight, float32, as stored."""
    return Scores({n: memory.kept(precise(m.weight.detach()).abs()) for n, m in prunable_linears(model).items()}, transposed_names(model))


def random(model: nn.Module, seed: int, salt: str = "") -> Scores:
    """Uniform scores, the floor of every comparison. Each weight's depend on seed, salt and its name alone, not on order or device.

    Args:
        salt: keeps the masks of two domains independent.
    """
    def draw(name, shape):
        key = hashlib.sha256(f"{seed} {salt} {name}".encode()).digest()
        return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7])))

    return Scores({n: memory.kept(draw(n, m.weight.shape).to(m.weight.device)) for n, m in prunable_linears(model).items()}, transposed_names(model))


def wanda(model: nn.Module, batches: list[torch.Tensor], sparsity: float | None = None, granularity: str = "row", *,
          progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Scores:
    """`|w| · ‖x‖₂`, the norm of each input over the calibration tokens (Sun et al., 2024).

    As in the paper, a block is pruned before it makes the inputs of the next one. So the scores belong to a sparsity and a granularity, and
    `make_masks` of them at these gives the masks of the walk. The model's weights are untouched afterwards.

    Args:
        batches: calibration, LongTensors (b, seqlen).
        sparsity: fraction removed on the way; None removes nothing, so that all inputs come from the dense model.
        granularity: as `make_masks` takes it, "row" in the paper. Under "global", whose threshold is known in the end only, rows go on the way.
    """
    require_sparsity(sparsity or 0)
    scores = blank_scores(model)
    names = scores.transposed
    hidden = usual_width([as_rows(s, n in names) for n, s in scores.items()])
    grouping = "row" if granularity == "global" else granularity

    def visit(rows, hessians):
        for name, W in rows.items():
            norms = hessians[0].total.diagonal().sqrt().to(W)   # its diagonal is Σ x²
            as_rows(scores[name], name in names).copy_(W.abs() * norms)
            if sparsity is not None:
                W.masked_fill_(removed_rows(W.abs() * norms, sparsity, grouping, hidden), 0)
        return rows

    walk(model, [batches], visit, {"score": scores}, update=sparsity is not None, stage="wanda", progress=progress, checkpoint=checkpoint)
    return scores


def sparsegpt(model: nn.Module, calibrations: list[list[torch.Tensor]], sparsity: float, *,
              progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> Compensated:
    """SparseGPT (Frantar and Alistarh, 2023): the walk of section 2, keeping its mask and its updated weights.

    Args:
        calibrations: one set of batches, or several whose Hessians are mixed.
    """
    require_sparsity(sparsity)

    def choose(name, W1, d, columns):
        return release_cut(saliency(W1, d), sparsity)

    return compensated_walk(model, calibrations, choose, stage="sparsegpt", progress=progress, checkpoint=checkpoint)

"""The methods D-Pruner is compared with, on the same data (METHOD section 6)."""

import hashlib

import torch
from torch import nn

from dpruner.compensate import Compensated, compensated_walk
from dpruner.general import release_cut, saliency
from dpruner.masks import Scores, as_rows, precise, require_sparsity
from dpruner.model import blank_scores, prunable_linears, transposed_names
from dpruner.walk import Progress, quiet, walk


def magnitude(model: nn.Module) -> Scores:
    """`|w|` of every prunable weight, float32, as stored."""
    return Scores({n: precise(m.weight.detach()).abs() for n, m in prunable_linears(model).items()}, transposed_names(model))


def random(model: nn.Module, seed: int, salt: str = "") -> Scores:
    """Uniform scores, the floor of every comparison. Each weight's depend on seed, salt and its name alone, not on order or device.

    Args:
        salt: keeps the masks of two domains independent.
    """
    def draw(name, shape):
        key = hashlib.sha256(f"{seed} {salt} {name}".encode()).digest()
        return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(key[:7])))

    return Scores({n: draw(n, m.weight.shape).to(m.weight.device) for n, m in prunable_linears(model).items()}, transposed_names(model))


def wanda(model: nn.Module, batches: list[torch.Tensor], *, progress: Progress = quiet) -> Scores:
    """`|w| · ‖x‖₂`, the norm of each input over the calibration tokens; meant for granularity "row" (Sun et al., 2024).

    Inputs come from the dense model; the weights stay as they are.
    """
    scores = blank_scores(model)
    names = scores.transposed

    def visit(rows, hessians):
        for name, W in rows.items():
            as_rows(scores[name], name in names).copy_(W.abs() * hessians[0].total.diagonal().sqrt())   # its diagonal is Σ x²

    walk(model, [batches], visit, update=False, stage="wanda", progress=progress)
    return scores


def sparsegpt(model: nn.Module, calibrations: list[list[torch.Tensor]], sparsity: float, *,
              progress: Progress = quiet) -> Compensated:
    """SparseGPT (Frantar and Alistarh, 2023): the walk of section 2, keeping its mask and its updated weights.

    Args:
        calibrations: one set of batches, or several whose Hessians are mixed.
    """
    require_sparsity(sparsity)

    def choose(name, W1, d, columns):
        return release_cut(saliency(W1, d), sparsity)

    return compensated_walk(model, calibrations, choose, stage="sparsegpt", progress=progress)

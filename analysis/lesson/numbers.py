"""What the lesson shows of one linear and of one sentence, computed by the engine's own formulas. Tensors in, numbers out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from dpruner.domain import ALPHA, stream_gradients
from dpruner.errors import InputError
from dpruner.formulas import DEFAULT_LAM, FORMULAS, balanced, relative_
from dpruner.general import SPARSITY, release_cut, saliency, sweep_group
from dpruner.generate import prompt_ids
from dpruner.hessian import Hessian, dampen, dead_inputs, factor
from dpruner.masks import Scores, as_rows, lowest, make_masks, precise
from dpruner.model import prunable_linears, stored_transposed
from dpruner.obs import sweep
from dpruner.walk import linear_inputs, stack

LAMBDAS = tuple(10.0**power for power in range(-2, 12))
SMALL = (8, 12)   # rows and columns of the block whose compensation is shown column by column


# ---- one linear


class Layer(NamedTuple):
    """The first linear of a model, and what general importance sees of it.

    Attributes:
        name: full parameter name.
        W: (out, in).
        H: (in, in), `(2/n) Σ x xᵀ` of its open-domain inputs.
        U: (in, in), upper factor of the dampened inverse.
        seen: (out, in), each weight as compensation had left it when it was scored.
        G: (out, in), `seen² / diag(U)²`.
    """

    name: str
    W: torch.Tensor
    H: torch.Tensor
    U: torch.Tensor
    seen: torch.Tensor
    G: torch.Tensor


@torch.no_grad()
def first_layer(model: nn.Module, batches: list[torch.Tensor]) -> Layer:
    """General importance of the first linear, with all that goes into it. What flows into it no pruning has touched: the walk begins there.

    Args:
        batches: open-domain calibration, LongTensors (b, seqlen).
    """
    name, module = next(iter(prunable_linears(model).items()))
    W = precise(as_rows(module.weight.detach(), stored_transposed(module))).clone()
    hessian = Hessian(W.shape[1])
    with linear_inputs({name: module}) as inputs:
        for ids in stack(batches):
            model(input_ids=ids.to(model.device), use_cache=False)
            hessian.add(inputs[name][0])
            inputs.clear()
    H, seen, G = hessian.mean(), torch.zeros_like(W), torch.zeros_like(W)

    def choose(_name, W1, d, columns):
        seen[:, columns], G[:, columns] = W1, saliency(W1, d)
        return release_cut(G[:, columns], SPARSITY)

    sweep_group({name: W}, H, choose)
    return Layer(name, W, H, factor(dampen(H)), seen, G)


class Compensation(NamedTuple):
    """A block of weights after each column.

    Attributes:
        weights: (columns + 1, rows, columns); the first is the block before anything is removed.
        removed: BoolTensor (rows, columns), what goes in the end.
        plain, moved: (columns + 1,), share of the output's mean square that is lost, by zeros alone and with compensation.
    """

    weights: np.ndarray
    removed: np.ndarray
    plain: np.ndarray
    moved: np.ndarray


def compensation(W: torch.Tensor, H: torch.Tensor, sparsity: float = 0.5) -> Compensation:
    """Remove the least important weights of a block column by column, and let the columns to the right make up for it.

    Args:
        W: (rows, columns).
        H: (columns, columns), of the inputs of these columns.
    """
    U = factor(dampen(H))
    scores = saliency(W, U.diagonal())
    gone = lowest(scores.reshape(1, -1), round(sparsity * W.numel())).view(W.shape)
    columns, total = torch.arange(W.shape[1]), output_error(W, H)
    weights, plain, moved = [], [], []
    for done in range(W.shape[1] + 1):
        so_far = gone & (columns < done)
        new, _ = sweep(W, U, lambda block, diagonal, at, so_far=so_far: so_far[:, at])
        weights.append(new)
        plain.append(output_error(W.masked_fill(so_far, 0) - W, H) / total)
        moved.append(output_error(new - W, H) / total)
    return Compensation(torch.stack(weights).numpy(), gone.numpy(), np.array(plain), np.array(moved))


def output_error(change: torch.Tensor, H: torch.Tensor) -> float:
    """Mean over tokens of ‖change · x‖², from H = (2/n) Σ x xᵀ: `½ tr(change H changeᵀ)`."""
    change, H = change.double(), H.double()
    return float((change @ H * change).sum()) / 2


def related_inputs(H: torch.Tensor, count: int) -> torch.Tensor:
    """The inputs that have most in common with the others (mean absolute correlation), int64 (count,) in their order."""
    scale = H.diagonal().clamp_min(torch.finfo(H.dtype).tiny).sqrt()
    shared = (H / torch.outer(scale, scale)).abs().fill_diagonal_(0).sum(0)
    shared[dead_inputs(H)] = -1
    return shared.topk(min(count, len(shared))).indices.sort().values


# ---- one sentence


@dataclass(frozen=True)
class Sentence:
    """A sentence and the gradient of its loss.

    Attributes:
        text, tokens: what was read, as text and as its pieces.
        loss: mean next-token loss in nats.
        gradients: {full parameter name: Tensor as stored}.
    """

    text: str
    tokens: list[str]
    loss: float
    gradients: dict[str, torch.Tensor]


def read_sentence(model: nn.Module, tokenizer, text: str) -> Sentence:
    """The gradient of the mean next-token loss of one sentence, for every prunable weight.

    Raises:
        InputError: too short or too long.
    """
    if not text.strip():
        raise InputError("There is no sentence to read", "the field is empty", "write at least two words")
    ids = prompt_ids(model, tokenizer, text)
    if len(ids) < 2:
        raise InputError("The sentence is too short", "there is no next token to predict in it", "write at least two words")
    gradients = {n: torch.zeros_like(precise(m.weight.detach())) for n, m in prunable_linears(model).items()}

    def consume(name, g, part):
        gradients[name][part] = g

    losses = stream_gradients(model, [torch.tensor([ids])], consume, stage="sentence")
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    return Sentence(text, pieces, losses[0], gradients)


def scored(formula: str, lam: float, w: torch.Tensor, g: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score of every weight of one matrix by one gradient, as `domain_importance` computes it from one batch.

    Args:
        formula: of FORMULAS.
        w, g, G: weight, gradient and general importance, all as stored.

    Returns:
        (dual, domain): with its general side, and without.
    """
    accumulator = FORMULAS[formula](w, G, lam, ALPHA)
    accumulator.add(g.clone(), slice(0, len(w)))
    domain = accumulator.domain(1)
    if formula != "balanced":
        return accumulator.dual(1), domain
    domain = relative_(Scores({"": domain}))[""]
    return balanced({"": domain}, {"": G}, lam)[""], domain


def kept_by(formula: str, lam: float, w, g, G, sparsity: float) -> torch.Tensor:
    """The mask of one matrix at one λ, BoolTensor as stored; arguments as for `scored`."""
    return make_masks({"": scored(formula, lam, w, g, G)[0]}, sparsity)[""]


def changed(formula: str, w, g, G, sparsity: float, lambdas: Sequence[float] = LAMBDAS) -> tuple[np.ndarray, np.ndarray]:
    """Decisions of one matrix that differ from those of λ = 0, and from those of the formula's own λ, at every λ; int64 (lambdas,) each."""
    usual = DEFAULT_LAM[formula]
    masks = {lam: kept_by(formula, lam, w, g, G, sparsity) for lam in {0.0, usual, *lambdas}}
    return tuple(np.array([int((masks[lam] ^ masks[other]).sum()) for lam in lambdas], dtype=np.int64) for other in (0.0, usual))


def changed_everywhere(formula: str, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor],
                       G: Mapping[str, torch.Tensor],
                       sparsity: float, progress: Callable[[int, int], None] = lambda done, total: None) -> pd.DataFrame:
    """`changed` summed over all matrices.

    Args:
        progress: called with (matrices done, matrices).

    Returns:
        Columns formula, lam, from_zero, from_usual, weights: decisions that differ from λ = 0 and from the formula's own λ, of how many.
    """
    total, size = np.zeros((2, len(LAMBDAS)), dtype=np.int64), 0
    for done, (name, w) in enumerate(weights.items()):
        progress(done, len(weights))
        total += changed(formula, w, gradients[name], G[name].to(w.device), sparsity)
        size += w.numel()
    return pd.DataFrame({"formula": formula, "lam": LAMBDAS, "from_zero": total[0], "from_usual": total[1], "weights": size})

"""What the lesson shows of one linear and of one sentence, computed by the engine's own formulas. Tensors in, numbers out."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from dpruner.domain import ALPHA, stream_gradients
from dpruner.errors import InputError
from dpruner.formulas import (DEFAULT_LAM, FORMULAS, RELEASE_COUNT, RELEASE_SCALE, Release, Taylor, balanced, inverse, means_of,
                              relative_)
from dpruner.general import SPARSITY, release_cut, saliency, sweep_group
from dpruner.hessian import Hessian, dampen, dead_inputs, factor
from dpruner.masks import Scores, as_rows, lowest, make_masks, precise
from dpruner.model import max_length, prunable_linears, stored_transposed
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
    if not any(sign.isalnum() for sign in text):
        raise InputError("There is no word in the sentence", "signs alone say nothing about a domain", "write at least two words")
    ids, limit = tokenizer(text, verbose=False).input_ids, max_length(model)
    if limit and len(ids) > limit:
        raise InputError("The sentence is too long", f"it has {len(ids):,} tokens, and the model reads {limit} at most", "shorten it")
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
    found = accumulator.scores(1)
    if formula != "balanced":
        return found["dual"], found["domain"]
    domain = relative_(Scores({"": found["domain"]}))[""]
    return balanced({"": domain}, {"": G}, lam)[""], domain


def kept_by(formula: str, lam: float, w, g, G, sparsity: float) -> torch.Tensor:
    """The mask of one matrix at one λ, BoolTensor as stored; arguments as for `scored`."""
    return make_masks({"": scored(formula, lam, w, g, G)[0]}, sparsity)[""]


def by_lambda(formula: str, w: torch.Tensor, g: torch.Tensor, G: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """The dual score of `scored`, to the bit, as a function of λ: what λ does not enter is computed once.

    Args:
        w, g, G: of one matrix, as stored.
    """
    if formula == "balanced":
        domain, share = scored(formula, 0.0, w, g, G)[0], inverse(means_of({"": G}, "matrix")[""])
        return lambda lam: torch.add(domain, G.to(domain), alpha=lam * share)
    if formula == "taylor":
        u, pull = g * w, g.square() * G
        return lambda lam: Taylor.term(torch.addcmul(u, u, pull, value=2 * lam * ALPHA**2))
    scaled, cube = g * RELEASE_SCALE, precise(w)**3
    u, pull = scaled * precise(w), scaled * G
    return lambda lam: Release.term(torch.addcmul(u, u, pull, value=lam * 2 * ALPHA**2 / RELEASE_COUNT), cube)


def changed(formula: str, w: torch.Tensor, g: torch.Tensor, G: torch.Tensor, sparsity: float,
            lambdas: Sequence[float] = LAMBDAS) -> np.ndarray:
    """Decisions of one matrix that differ from those of λ = 0 and from those of the formula's own λ, at every λ.

    Returns:
        int64 (2, lambdas).
    """
    score, count, usual = by_lambda(formula, w, g, G), round(sparsity * w.numel()), DEFAULT_LAM[formula]
    gone = {lam: lowest(score(lam).reshape(1, -1), count) for lam in {0.0, usual, *lambdas}}
    return np.array([[int((gone[lam] ^ gone[other]).sum()) for lam in lambdas] for other in (0.0, usual)], dtype=np.int64)


def changed_by_matrix(formula: str, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor],
                      G: Mapping[str, torch.Tensor], sparsity: float,
                      lambdas: Sequence[float] = LAMBDAS) -> Iterator[tuple[str, np.ndarray]]:
    """(name, `changed`) of one matrix after the other, as many at a time as there are cores; whoever stops reading stops the counting."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = {n: pool.submit(changed, formula, w, gradients[n], G[n].to(w.device), sparsity, lambdas) for n, w in weights.items()}
        try:
            for name, count in counts.items():
                yield name, count.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def changed_everywhere(formula: str, counts: Collection[np.ndarray], weights: int, lambdas: Sequence[float] = LAMBDAS) -> pd.DataFrame:
    """`changed` summed over all matrices.

    Args:
        counts: of every matrix.
        weights: of all of them.

    Returns:
        Columns formula, lam, from_zero, from_usual, weights: decisions that differ from λ = 0 and from the formula's own λ, of how many.
    """
    from_zero, from_usual = sum(counts)
    return pd.DataFrame({"formula": formula, "lam": lambdas, "from_zero": from_zero, "from_usual": from_usual, "weights": weights})

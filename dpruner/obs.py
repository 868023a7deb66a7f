"""The optimal-brain-surgeon sweep over the columns of a weight, as SparseGPT orders it. Tensors in, tensors out."""

from collections.abc import Callable

import torch

BLOCKSIZE = 128   # columns that are scored together, before any of them is compensated
_BASE = 16        # columns below which halving stops paying


def _eliminate_by_columns(T, P, U, E):
    """Column by column, in place: T (b, rows) weights, P (b, rows) 1/U_ii where removed and 0 elsewhere, U (b, b); fills E (b, rows)."""
    for i in range(T.shape[0]):
        torch.mul(T[i], P[i], out=E[i])
        if i + 1 < T.shape[0]:
            T[i + 1:].addr_(U[i, i + 1:], E[i], alpha=-1)


def _eliminate_by_solving(T, P, U, E):
    """The same numbers from one batched triangular solve, a system a row, for devices on which small kernels cost more than arithmetic.

    `e_i U_ii = p_i (w_i − Σ_{k<i} e_k U_ki)` with p = 1 where removed is the triangular system `e (diag U + p ∘ striu U) = p ∘ w`. Columns that
    keep their value have e = 0, so their diagonal may be anything but zero.
    """
    removed = (P != 0).to(T.dtype).t()                                  # (rows, b)
    systems = U.triu(1) * removed[:, None, :] + U.diagonal().diag()     # (rows, b, b)
    right = (removed * T.t())[:, None, :]
    errors = torch.linalg.solve_triangular(systems, right, upper=True, left=False)[:, 0].t()
    E.copy_(errors)
    T.sub_(U.t() @ errors)


def eliminate(T: torch.Tensor, P: torch.Tensor, U: torch.Tensor, E: torch.Tensor, base=None) -> None:
    """Remove weights of one block of columns from left to right and let the columns to their right make up for it.

    Halves the block, so that most of the work is matrix products: the right half only needs the left half's errors.

    Args:
        T: weights, transposed: (b, rows). Changed in place; the removed ones come out as rounding noise around 0.
        P: (b, rows), 1/U_ii where the weight is removed, 0 where it stays.
        U: (b, b) upper factor of the inverse Hessian, of these columns.
        E: (b, rows), filled with the errors `w / U_ii` that the rest of the matrix still has to absorb.
        base: what to do with at most 16 columns.
    """
    base = base or (_eliminate_by_columns if T.device.type == "cpu" else _eliminate_by_solving)
    if T.shape[0] <= _BASE:
        return base(T, P, U, E)
    half = T.shape[0] // 2
    eliminate(T[:half], P[:half], U[:half, :half], E[:half], base)
    T[half:].addmm_(U[:half, half:].t(), E[:half], alpha=-1)
    eliminate(T[half:], P[half:], U[half:, half:], E[half:], base)


def sweep(W: torch.Tensor, U: torch.Tensor, choose: Callable, blocksize: int = BLOCKSIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune and compensate a weight, block of columns by block (SparseGPT, algorithm 1; METHOD section 2, step 4).

    Args:
        W: (rows, in), float32; not changed. Rows do not interact, so the weights of all linears that share an input can be stacked.
        U: (in, in) upper factor of the inverse Hessian.
        choose: `choose(W1, d, columns)` gets the block's weights (rows, b) as compensation has left them so far, the diagonal of U (b,) and
            the slice of its columns; returns a BoolTensor (rows, b), True = remove.

    Returns:
        (weights (rows, in) with exact zeros where removed, BoolTensor (rows, in) True = removed).
    """
    T = W.t().clone(memory_format=torch.contiguous_format)
    removed = torch.zeros_like(T, dtype=torch.bool)
    diagonal = U.diagonal()
    for start in range(0, T.shape[0], blocksize):
        columns = slice(start, min(start + blocksize, T.shape[0]))
        gone = choose(T[columns].t(), diagonal[columns], columns).t()
        P = gone / diagonal[columns, None]
        E = torch.zeros_like(P)
        eliminate(T[columns], P, U[columns, columns], E)
        T[columns].masked_fill_(gone, 0)
        removed[columns] = gone
        T[columns.stop:].addmm_(U[columns, columns.stop:].t(), E, alpha=-1)
    return T.t().contiguous(), removed.t().contiguous()


def refine(W: torch.Tensor, target: torch.Tensor, H: torch.Tensor, kept: torch.Tensor, steps: int) -> torch.Tensor:
    """Move the kept weights on towards the least output error their mask allows: conjugate gradients on `tr((W − T) H (W − T)ᵀ)`.

    The sweep goes once from left to right, and what stands left of a removed weight never learns of it. Each row has a least-squares problem
    of its own; all of them take their steps together, preconditioned by the diagonal of H, for a matrix product a step.

    Args:
        W: (out, in), as the sweep leaves it: where the steps start.
        target: (out, in), the weights whose output is to be kept.
        H: (in, in), dampened.
        kept: BoolTensor (out, in); all other weights are 0 and stay it.
        steps: how many; the error falls with each.
    """
    kept, scale = kept.to(W.dtype), 1 / H.diagonal()
    W = W * kept
    residual = (target - W) @ H * kept
    direction = residual * scale
    height = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        curved = direction @ H * kept
        length = _share(height, (direction * curved).sum(1, keepdim=True))
        W = W + length * direction
        residual = residual - length * curved
        before, height = height, (residual.square() * scale).sum(1, keepdim=True)
        direction = residual * scale + _share(height, before) * direction
    return W


def _share(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b for b ≥ 0; 0 where b is: a row that is solved, or keeps nothing, stays where it is."""
    return torch.where(b > 0, a / torch.where(b > 0, b, torch.ones_like(b)), torch.zeros_like(b))

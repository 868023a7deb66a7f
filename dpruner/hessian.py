"""The Hessian of a layer's output error: accumulate, dampen, factor. Tensors in, tensors out."""

import torch

from dpruner.masks import precise

DAMPING = 0.01


class Hessian:
    """`H = (2/n) Σ x xᵀ` over calibration tokens, as a sum and a count so that parts can be added up (METHOD section 2, SparseGPT).

    The products are float32, their sum float64: 29 bits of room make it exact, so it does not hang on which of several processes has added what.

    Args:
        columns: width of the inputs.

    Attributes:
        total: Σ x xᵀ (in, in), float64 wherever the device has it, on the device of the inputs.
        count: tokens.
    """

    def __init__(self, columns: int):
        self.total, self.precision, self.count = torch.zeros(columns, columns, dtype=torch.float64), torch.float32, 0

    def to(self, like: torch.Tensor) -> "Hessian":
        """Itself, on the device of a tensor and with a mean in its precision."""
        self.precision = like.dtype
        self.total = self.total.to(like.device, like.dtype if like.device.type == "mps" else torch.float64)
        return self

    def add(self, x: torch.Tensor) -> None:
        """Add inputs of shape (..., in), any precision."""
        x = precise(x.detach().reshape(-1, x.shape[-1]))
        self.to(x).total += x.t() @ x
        self.count += x.shape[0]

    def mean(self) -> torch.Tensor:
        """H (in, in)."""
        return (self.total * (2 / max(self.count, 1))).to(self.precision)


def mix(hessians: list[torch.Tensor]) -> torch.Tensor:
    """Sum of Hessians (in, in), each divided by its mean diagonal, so that no calibration set outweighs another by its scale."""
    return sum(h / h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny) for h in hessians)


def dead_inputs(H: torch.Tensor) -> torch.Tensor:
    """BoolTensor (in,): inputs that were zero on every token."""
    return H.diagonal() == 0


def dampen(H: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """A copy of H (in, in) made safe to invert: 1 on the diagonal of dead inputs, then `damping · mean(diag H)` on all of it."""
    H = H.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return H


def factor(H: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor U (in, in) of the inverse: `H⁻¹ = Uᵀ U`.

    `H = V Vᵀ` with V upper triangular is a Cholesky factorisation read backwards, and `U = V⁻¹`: the inverse itself is never formed. Computed in
    float64, because the smallest eigenvalues decide, and returned in the precision of H.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    # MPS has no float64; and no name for what is not needed any more
    V = torch.linalg.cholesky(H.to("cpu" if H.device.type == "mps" else H.device, torch.float64).flip(0, 1)).flip(0, 1)
    identity = torch.eye(V.shape[0], dtype=V.dtype, device=V.device)
    return torch.linalg.solve_triangular(V, identity, upper=True).to(H)

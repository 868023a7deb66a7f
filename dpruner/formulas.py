"""The scores by name (METHOD section 4): what each adds up batch by batch, in its `sums`, and the `scores` it makes of them. Tensors in, tensors out."""

from collections.abc import Mapping

import torch

from dpruner import memory
from dpruner.errors import InputError
from dpruner.masks import Scores, precise, precision

RELEASE_SCALE = 2.0**16   # fp16 loss scale that the authors' code leaves on its gradients
RELEASE_COUNT = 1000      # constant by which it divides g²
DEFAULT_LAM = {"balanced": 1.0, "taylor": 1.0, "release": 0.1}
MOST_LAM = 1e12           # the lesson shows up to 10¹¹, at which taylor and release begin to feel it; with much more float32 overflows


def require_lam(lam: float) -> None:
    """Refuse a λ that no formula can be computed with.

    Raises:
        InputError: it is not a number from 0 to 10¹².
    """
    if not 0 <= lam <= MOST_LAM:
        raise InputError(f"λ = {lam} cannot be used", f"it weighs the general side, from 0 to {MOST_LAM:g}", "give a number such as 1")


class Fisher:
    """`mean_j g_j²`, the diagonal of the empirical Fisher."""

    regards_general = False   # whether G joins in batch by batch

    def __init__(self, w: torch.Tensor, G: torch.Tensor | None, lam: float, alpha: float):
        self.w, self.squares = w, memory.sums(w, precision(w))
        self.sums = {"squares": self.squares}

    def add(self, g: torch.Tensor, part: slice) -> None:
        self.squares[part].addcmul_(g, g)

    def scores(self, count: int) -> dict[str, torch.Tensor]:
        return {"fisher": self.squares.div_(count)}


class Balanced(Fisher):
    """`F = mean_j u_j²`, u = g·w: the expected increase of the domain loss for removing the weight; G joins in `balanced`."""

    def scores(self, count: int) -> dict[str, torch.Tensor]:
        return {"domain": self.squares.div_(count).mul_(precise(self.w).square())}


class Taylor:
    """`mean_j |u_j − ½ u_j²|`, u = g'·w, `g' = g + 2 λ α² G g h`, h the running mean of g² (the paper's equations)."""

    regards_general = True

    def __init__(self, w: torch.Tensor, G: torch.Tensor, lam: float, alpha: float):
        self.w, self.G, self.penalty, self.batches = w, G, 2 * lam * alpha**2, torch.zeros((), dtype=torch.int64)
        self.squares, self.of_both, self.of_domain = (memory.sums(w, precision(w)) for _ in range(3))
        self.sums = {"squares": self.squares, "of_both": self.of_both, "of_domain": self.of_domain, "batches": self.batches}

    def add(self, g: torch.Tensor, part: slice) -> None:
        self.batches += part.start == 0
        self.squares[part].addcmul_(g, g)
        u = g * self.w[part]
        self.of_domain[part].add_(self.term(u))
        # g' = g (1 + 2 λ α² G h), so u' is u times the same factor
        self.of_both[part].add_(self.term(u.addcmul_(u, self.squares[part] * self.G[part], value=self.penalty / self.batches.item())))

    @staticmethod
    def term(u: torch.Tensor) -> torch.Tensor:
        """What one batch adds."""
        return torch.addcmul(u, u, u, value=-0.5).abs_()

    def scores(self, count: int) -> dict[str, torch.Tensor]:
        return {"domain": self.of_domain.div_(count), "dual": self.of_both.div_(count)}


class Release:
    """`Σ_j |u_j + u_j²/2000 + w³|`, `g' = g + λ·2α²·G·g²/1000`, g multiplied by 2¹⁶: what the authors' published code adds up.

    It does so from the second step on; here every batch counts.
    """

    regards_general = True

    def __init__(self, w: torch.Tensor, G: torch.Tensor, lam: float, alpha: float):
        self.w, self.G, self.penalty = w, G, lam * 2 * alpha**2 / RELEASE_COUNT
        self.of_both, self.of_domain = (memory.sums(w, precision(w)) for _ in range(2))
        self.sums = {"of_both": self.of_both, "of_domain": self.of_domain}

    def add(self, g: torch.Tensor, part: slice) -> None:
        g = g * RELEASE_SCALE
        w = precise(self.w[part])
        u, cube = g * w, w**3
        self.of_domain[part].add_(self.term(u, cube))
        self.of_both[part].add_(self.term(u.addcmul_(u, g.mul_(self.G[part]), value=self.penalty), cube))   # g' = g (1 + penalty · G · g)

    @staticmethod
    def term(u: torch.Tensor, cube: torch.Tensor) -> torch.Tensor:
        """What one batch adds; `cube` is w³."""
        return torch.addcmul(u, u, u, value=1 / (2 * RELEASE_COUNT)).add_(cube).abs_()

    def scores(self, count: int) -> dict[str, torch.Tensor]:
        return {"domain": self.of_domain, "dual": self.of_both}


FORMULAS = {"balanced": Balanced, "taylor": Taylor, "release": Release}


def means_of(scores: Mapping[str, torch.Tensor], means: str) -> dict[str, float]:
    """Mean score by name, in float64: of each matrix, or of the whole model for every name where `means` is "model"."""
    sums = {n: float(s.sum(dtype=torch.float64)) for n, s in scores.items()}
    if means == "model":
        return dict.fromkeys(scores, sum(sums.values()) / sum(s.numel() for s in scores.values()))
    return {n: total / scores[n].numel() for n, total in sums.items()}


def inverse(mean: float) -> float:
    """1/mean; 0 where all scores are 0, so that they stay it."""
    return 1 / mean if mean > 0 else 0.0


def relative_(scores: Scores, means: str = "matrix") -> Scores:
    """Divide scores by their mean, in place."""
    average = means_of(scores, means)
    for name, s in scores.items():
        s.mul_(inverse(average[name]))
    return scores


def balanced(domain: Mapping[str, torch.Tensor], G: Mapping[str, torch.Tensor], lam: float, means: str = "matrix") -> Scores:
    """`S = F/mean(F) + λ·G/mean(G)`: scale-free, so that λ means something.

    Args:
        domain: F, {name: Tensor}, at any scale.
        G: general importance, same keys and shapes.
        means: "matrix" (of each matrix) or "model" (of all weights, for a whole-model threshold).
    """
    of_domain, of_general = means_of(domain, means), means_of(G, means)
    dual = Scores({n: memory.kept(f * inverse(of_domain[n])) for n, f in domain.items()}, getattr(domain, "transposed", ()))
    for name, s in dual.items():
        s.add_(G[name].to(s), alpha=lam * inverse(of_general[name]))
    return dual

"""Single weights written out: the numbers of one weight in its formula, as LaTeX of an `aligned`."""

import torch

from dpruner.domain import ALPHA
from dpruner.formulas import RELEASE_COUNT, RELEASE_SCALE


def tex(value: float) -> str:
    """A number of four significant digits in LaTeX; small and large ones by powers of ten."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 9999.5:
        return f"{value:.4g}"
    digits, power = f"{value:.3e}".split("e")
    return rf"{digits}\cdot 10^{{{int(power)}}}"


def signed(value: float) -> str:
    """A number as it stands inside a product: negative ones in brackets."""
    return f"({tex(value)})" if value < 0 else tex(value)


def hessian_entry(H: float, i: int, j: int) -> str:
    """One entry of H."""
    return rf"H_{{{i},{j}}} = \tfrac2n\sum_t x_{{t{i}}}\,x_{{t{j}}} = {tex(H)}"


def general(row: int, column: int, w: float, d: float, G: float) -> str:
    """General importance of one weight.

    Args:
        w: as compensation had left it.
        d: `U_jj`.
        G: its score.
    """
    return (rf"G_{{{row},{column}}} = \frac{{\hat w_{{{row},{column}}}^2}}{{U_{{{column},{column}}}^2}} = "
            rf"\frac{{{signed(w)}^2}}{{{tex(d)}^2}} = {tex(G)}")


def score(formula: str, lam: float, w: torch.Tensor, g: torch.Tensor, G: torch.Tensor, S: torch.Tensor, row: int, column: int) -> list[str]:
    """The score of one weight by one gradient, by any formula.

    Args:
        w, g, G, S: of the whole matrix: weights, gradient, general importance, and the score that came of them.
    """
    one, end = [float(t[row, column]) for t in (w, g, G)], float(S[row, column])
    if formula == "balanced":
        return balanced(*one, lam, float((g.double() * w.double()).square().mean()), float(G.double().mean()), end)
    return {"taylor": taylor, "release": release}[formula](*one, lam, end)


def balanced(w: float, g: float, G: float, lam: float, mean_F: float, mean_G: float, S: float) -> list[str]:
    """`S = F/mean(F) + λ·G/mean(G)` of one weight and one gradient."""
    u = g * w
    parts = [u**2 / mean_F if mean_F > 0 else 0.0, G / mean_G if mean_G > 0 else 0.0]
    return [rf"u = g\,w = {signed(g)}\cdot{signed(w)} = {tex(u)}, \qquad F = u^2 = {tex(u**2)}",
            rf"S = \frac{{F}}{{\bar F}} + \lambda\frac{{G}}{{\bar G}} = \frac{{{tex(u**2)}}}{{{tex(mean_F)}}} + {tex(lam)}\cdot"
            rf"\frac{{{tex(G)}}}{{{tex(mean_G)}}} = {tex(parts[0])} + {tex(lam * parts[1])} = {tex(S)}"]


def taylor(w: float, g: float, G: float, lam: float, S: float) -> list[str]:
    """`S = |u − ½u²|`, `g' = g + 2 λ α² G g h`, h = g² after one gradient."""
    pull = 2 * lam * ALPHA**2 * G * g**2
    u = g * w * (1 + pull)
    return [rf"g' = g\,(1 + 2\lambda\alpha^2 G\,g^2) = {signed(g)}\,(1 + {tex(pull)})", rf"u = g'w = {tex(u)}",
            rf"S = \left|u - \tfrac12u^2\right| = \left|{tex(u)} - {tex(u**2 / 2)}\right| = {tex(S)}"]


def release(w: float, g: float, G: float, lam: float, S: float) -> list[str]:
    """`S = |u + u²/2000 + w³|`, `g' = ĝ + λ·2α²·G·ĝ²/1000`, ĝ = 2¹⁶ g."""
    scaled = g * RELEASE_SCALE
    pull = lam * 2 * ALPHA**2 / RELEASE_COUNT * G * scaled
    u = scaled * w * (1 + pull)
    return [rf"\hat g = 2^{{16}}g = {tex(scaled)}",
            rf"g' = \hat g\,(1 + \lambda\tfrac{{2\alpha^2}}{{1000}}G\,\hat g) = {signed(scaled)}\,(1 + {signed(pull)})", rf"u = g'w = {tex(u)}",
            rf"S = \left|u + \tfrac{{u^2}}{{2000}} + w^3\right| = \bigl|{tex(u)} + {tex(u**2 / (2 * RELEASE_COUNT))} \\ &\quad + "
            rf"{signed(w**3)}\bigr| = {tex(S)}"]

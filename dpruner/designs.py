"""The questions that experiments ask: of each the runs at every value of its axis, and what their figures are compared with."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

MASKS = ("dpruner", "wanda", "magnitude", "general", "domain", "random")
BOTH = {"baseline_calibration": "mix"}   # the baselines see every text that D-Pruner sees
TUNED = "dense, tuned"   # the dense model, tuned as the pruned ones are


class Point(NamedTuple):
    """One run of an experiment.

    Attributes:
        x: where it stands on the axis.
        variant: what tells its methods from the same ones of other points at that place; "" where nothing needs to, TUNED where nothing is
            removed.
        settings: what it changes in the settings of the experiment.
        tune: how its models are tuned afterwards, as `finetune.finetuned` takes it; None leaves them.
    """

    x: str
    variant: str
    settings: dict
    tune: str | None = None

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return "-".join(part.replace(" ", "-").replace(":", "of") for part in (self.x, self.variant) if part)

    def series(self, method: str) -> str:
        """What a table calls one of its methods."""
        return TUNED if self.variant == TUNED else f"{method}, {self.variant}" if self.variant else method


@dataclasses.dataclass(frozen=True)
class Design:
    """What an experiment asks and how.

    Attributes:
        question: in words.
        axis: what the values on it are.
        values: the usual ones.
        points: value -> the runs at it.
        against: what every figure is compared with, on the same items: ("series", name), at the same value, or ("x", value), of the same
            series.
        reading: what to know when reading its figures.
    """

    question: str
    axis: str
    values: tuple
    points: Callable[[object], list[Point]]
    against: tuple[str, str]
    reading: str


def _sparsity(s) -> list[Point]:
    return [Point(str(s), "", {"sparsity": s, "methods": (*MASKS, "sparsegpt"), "compensate": None, **BOTH}),
            Point(str(s), "walk", {"sparsity": s, "methods": ("dpruner",), "compensate": "walk"})]


def _walk(s) -> list[Point]:
    walk = {"sparsity": s, "methods": ("dpruner",), "compensate": "walk"}
    return [Point(str(s), "", {"sparsity": s, "methods": ("sparsegpt",), **BOTH}),
            Point(str(s), "walk", walk), Point(str(s), "walk, even", walk | {"allot": "even"}),
            Point(str(s), "walk, not refined", walk | {"refine": 0}),
            Point(str(s), "walk of METHOD", walk | {"allot": "even", "refine": 0}),
            # SparseGPT's own score: what the steps alone give it
            Point(str(s), "walk, refined only", walk | {"allot": "even", "lam": 0.0})]


def _goal(s) -> list[Point]:
    return _walk(s)[:2]


def _seeds(seed) -> list[Point]:
    return [Point(str(seed), "", {"seed": seed, "methods": ("sparsegpt",), **BOTH}),
            Point(str(seed), "walk", {"seed": seed, "methods": ("dpruner",), "compensate": "walk"})]


def _lam(lam) -> list[Point]:
    return [Point(str(lam), "", {"lam": float(lam), "methods": ("dpruner",), "compensate": None}),
            Point(str(lam), "walk", {"lam": float(lam), "methods": ("dpruner",), "compensate": "walk"})]


def _formula(name) -> list[Point]:
    return [Point(name, variant, {"formula": name, "methods": ("dpruner",), "compensate": compensate})
            for variant, compensate in (("", None), ("after", "after"))]


def _granularity(name) -> list[Point]:
    n_of_m = {"sparsity": 1 - int(name.split(":")[0]) / int(name.split(":")[1])} if ":" in name else {}
    return [Point(name, variant, {"granularity": name, "methods": ("dpruner",), "compensate": compensate, **n_of_m})
            for variant, compensate in (("", None), ("after", "after"))]


def _calibration(nsamples) -> list[Point]:
    return [Point(str(nsamples), f"seed {seed}", {"nsamples": int(nsamples), "seed": seed, "methods": ("dpruner",), "halves": seed == 0})
            for seed in range(3)]


def _text(kind) -> list[Point]:
    return [Point(kind, "", {"baseline_calibration": kind, "methods": ("wanda", "sparsegpt")}),
            Point(kind, "walk", {"hessian": kind, "methods": ("dpruner",), "compensate": "walk"})]


def _transfer(s) -> list[Point]:
    return [Point(str(s), "", {"sparsity": s, "methods": ("dpruner",), "halves": True})]


def _finetune(how) -> list[Point]:
    tune = None if how == "none" else how
    return [Point(how, "", {"methods": ("dpruner", "sparsegpt", "magnitude"), "compensate": None, **BOTH}, tune),
            Point(how, "walk", {"methods": ("dpruner",), "compensate": "walk"}, tune),
            # no mask: nothing to compare but the tuning
            Point(how, TUNED, {"methods": ("magnitude",), "sparsity": 0.0, "compensate": None}, tune)]


TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 9))
DESIGNS = {
    "sparsity": Design("How much can go, and by which method?", "sparsity", TENTHS, _sparsity, ("series", "sparsegpt"),
                       "Baselines see the text of the domain and of the open domain, all that D-Pruner sees. Only sparsegpt and the walk "
                       "move the kept weights."),
    "goal": Design("Does the dual score in the walk beat SparseGPT, in the domain and outside it?", "sparsity",
                   (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), _goal, ("series", "sparsegpt"),
                   "Both see the same text of the domain and of the open domain."),
    "seeds": Design("Does the walk beat SparseGPT whatever calibration text is drawn?", "seed", (0, 1, 2), _seeds, ("series", "sparsegpt"),
                    "Each seed draws other calibration sequences, for both methods alike; 'all' is the mean of the seeds' losses on each "
                    "window, so its interval is narrower than a seed's. It tells of other held-out text, the columns beside it of other "
                    "calibration text."),
    "walk": Design("What makes the walk as good as it is?", "sparsity", (0.5, 0.7), _walk, ("series", "sparsegpt"),
                   "The walk has three parts: the dual score, sparsity allotted by loss, least-squares steps. 'even' is without the "
                   "second, 'not refined' without the third, 'of METHOD' the dual score alone, 'refined only' SparseGPT's own score with "
                   "the steps: what SparseGPT would gain by them."),
    "lambda": Design("What does λ change?", "λ", (0, 0.1, 0.3, 1, 3, 10), _lam, ("x", "1"),
                     "λ = 0 leaves the general side out of a mask's score. In the walk it leaves the loss's side out: SparseGPT's score "
                     "chooses inside a matrix, the loss still allots sparsity to the matrices."),
    "formulas": Design("Which formula deserves to be the default?", "formula", ("balanced", "taylor", "release"), _formula,
                       ("x", "balanced"), "'after': the same mask, with the kept weights moved afterwards."),
    "granularities": Design("Where should one threshold hold?", "granularity", ("matrix", "block", "row", "global", "2:4"), _granularity,
                            ("x", "matrix"), "'after': the same mask, with the kept weights moved afterwards. 2:4 removes half, whatever "
                            "the others remove."),
    "calibration": Design("How much text does a mask need, and how much does its choice matter?", "sequences", (4, 16, 64), _calibration,
                          ("x", "64"), "Seeds draw other sequences from the same text; where a text is short they overlap, and seeds look "
                          "more alike than texts would."),
    "text": Design("Which text should the baselines and the walk look at?", "calibration", ("general", "domain", "mix"), _text,
                   ("x", "mix"),
                   "'mix' sees both texts, twice as much. The walk's Fishers are those of both sides throughout; its Hessian changes."),
    "transfer": Design("How good is every domain's mask on every domain's text, and does similarity predict it?", "sparsity", (0.5,),
                       _transfer,
                       ("series", "own"), "Masks alone, by the dual score; the kept weights stay as they are."),
    "finetune": Design("What does tuning afterwards win back, with the mask held?", "tuned", ("none", "full"), _finetune, ("series", TUNED),
                       "Tuning also teaches the text itself, so every model is compared with the dense one after the same tuning: the same "
                       "text, steps and rates, and adapters of the same rank."),
}


def points_of(asked: dict) -> list[Point]:
    """The runs of an experiment, in their order.

    Args:
        asked: its name and values, as experiment.json holds them.
    """
    return [point for value in asked["values"] for point in DESIGNS[asked["name"]].points(value)]

"""Figures of a task from what a model made of each item: metrics, their 95 % intervals, and paired differences between two models.

Every interval is a percentile bootstrap over items (windows for perplexity). Two models are compared on the same draws of the same items, so what
makes an item hard for both does not count as noise between them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from dpruner.errors import InputError
from dpruner.evaluate import Estimate, picks

BETTER, WORSE, NOISE = "better", "worse", "inside the noise"
Statistic = Callable[[np.ndarray], np.ndarray]      # how often each item was drawn (r, n) -> a figure of each draw (r,)


class Metric(NamedTuple):
    """One way to sum up a task.

    Attributes:
        name: as tables and people call it.
        value: rows of a task -> the figure.
        drawn: rows of a task -> Statistic, the same figure of any draw of them.
        higher: whether higher is better.
        relative: whether differences are told as a share of the other's figure, as is usual where there is no natural scale.
    """

    name: str
    value: Callable[[pd.DataFrame], float]
    drawn: Callable[[pd.DataFrame], Statistic]
    higher: bool = True
    relative: bool = False


def _mean_of(column: str, name: str) -> Metric:
    def drawn(rows):
        values = rows[column].to_numpy(dtype=float)
        return lambda counts: counts @ values / counts.sum(1)

    return Metric(name, lambda rows: float(rows[column].mean()), drawn)


def macro_f1(rows: pd.DataFrame) -> float:
    """Mean over classes of F1, each class the same weight; classes that neither occur nor are chosen do not count (scikit-learn)."""
    from sklearn.metrics import f1_score   # slow to import

    return float(f1_score(rows["answer"], rows["chosen"], average="macro", zero_division=0))


def macro_f1_drawn(rows: pd.DataFrame) -> Statistic:
    """`macro_f1` of many draws at once: `2 hits / (occurrences + choices)` of each class, from counts."""
    answer, chosen = rows["answer"].to_numpy(), rows["chosen"].to_numpy()
    classes = np.union1d(answer, chosen)
    truth, choice = answer[:, None] == classes, chosen[:, None] == classes

    def statistic(counts):
        hits, both = counts @ (truth & choice).astype(float), counts @ truth.astype(float) + counts @ choice.astype(float)
        return np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0).sum(1) / (both > 0).sum(1)

    return statistic


def _perplexity_drawn(rows: pd.DataFrame) -> Statistic:
    losses, tokens = rows["loss"].to_numpy(), rows["tokens"].to_numpy(dtype=float)
    return lambda counts: np.exp(counts @ losses / (counts @ tokens))


MACRO_F1 = Metric("macro-F1", macro_f1, macro_f1_drawn)
ACCURACY = _mean_of("right", "accuracy")
ROUGE = tuple(_mean_of(column, name) for column, name in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")))
PERPLEXITY = Metric("perplexity", lambda rows: float(np.exp(rows["loss"].sum() / rows["tokens"].sum())), _perplexity_drawn, higher=False,
                    relative=True)
METRICS = {"choice": (MACRO_F1, ACCURACY), "yes-no-maybe": (MACRO_F1, ACCURACY), "entailment": (ACCURACY,), "summary": ROUGE,
           "perplexity": (PERPLEXITY,)}   # of each kind of task, the one that the field reports first


def draws(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n items is drawn, with replacement, in 2,000 draws of n; float (draws, n), some draws at a time."""
    for some in picks(n, seed):
        apart = some + n * np.arange(len(some))[:, None]
        yield np.bincount(apart.ravel(), minlength=some.size).reshape(some.shape).astype(float)


def _interval(statistic: Statistic, n: int, seed: int) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate([statistic(counts) for counts in draws(n, seed)]), (0.025, 0.975))
    return float(low), float(high)


def figure(metric: Metric, rows: pd.DataFrame, seed: int = 0) -> Estimate:
    """A metric over a task's items, with its interval.

    Where every item is right, or every one wrong, draws of them say nothing; the bound is then that of the binomial distribution
    (Clopper and Pearson): all of 16 right may be a model that is right four times in five.

    Args:
        rows: one per item, as `scoring` makes them.
        seed: of the draws.
    """
    n, value = len(rows), metric.value(rows)
    low, high = _interval(metric.drawn(rows), n, seed)
    if not metric.relative and low == high in (0.0, 1.0):
        low, high = (0.0, 1 - 0.025 ** (1 / n)) if high == 0 else (0.025 ** (1 / n), 1.0)
    return Estimate(value, low, high, n=n)


def difference(metric: Metric, rows: pd.DataFrame, others: pd.DataFrame, seed: int = 0) -> Estimate:
    """How far one model's figure is from another's, on the same items, with the interval of that difference.

    Args:
        rows, others: of the two models, one per item, in the same order.

    Returns:
        Estimate of `figure − other`, or of `figure / other − 1` for relative metrics.

    Raises:
        InputError: they are not the same items.
    """
    if len(rows) != len(others) or (rows["id"].to_numpy() != others["id"].to_numpy()).any():
        raise InputError("The two models cannot be compared", "they were not given the same items", "evaluate both on the same task")

    def between(a, b):
        return a / b - 1 if metric.relative else a - b

    one, other = metric.drawn(rows), metric.drawn(others)
    low, high = _interval(lambda counts: between(one(counts), other(counts)), len(rows), seed)
    return Estimate(between(metric.value(rows), metric.value(others)), low, high, n=len(rows))


def taken_back(rows: pd.DataFrame, others: pd.DataFrame, dense: pd.DataFrame, seed: int = 0) -> Estimate | None:
    """How much of what another pruned model loses against the dense one a model takes back: 0 is as much lost as there, 1 is nothing lost.

    Losses are log-likelihoods, on the same windows; above 1 is better than dense.

    Args:
        rows, others, dense: of the three models, one per window, in the same order.

    Returns:
        The share with its interval; None where what the other loses is inside the noise, so that there is nothing to take a share of.
    """
    mine, theirs, least = (r["loss"].to_numpy() for r in (rows, others, dense))
    if _interval(lambda counts: counts @ (theirs - least), len(rows), seed)[0] <= 0:
        return None
    low, high = _interval(lambda counts: (counts @ (theirs - mine)) / (counts @ (theirs - least)), len(rows), seed)
    return Estimate((theirs - mine).sum() / (theirs - least).sum(), low, high, n=len(rows))


def verdict(metric: Metric, difference: Estimate) -> str:
    """What a difference says: "better", "worse", or "inside the noise" where its interval holds 0, or where a single item tells of no noise."""
    if difference.n < 2 or difference.low <= 0 <= difference.high:
        return NOISE
    return BETTER if (difference > 0) == metric.higher else WORSE


def chance(rows: pd.DataFrame) -> float:
    """Accuracy of guessing: the mean over items of one over its candidates."""
    return float((1 / rows["candidates"]).mean())

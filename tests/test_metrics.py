"""Figures against counts by hand, intervals that cover what they say, differences on the same items."""

from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from dpruner.errors import InputError
from dpruner.evaluate import bootstrap_ratio
from dpruner.metrics import ACCURACY, BETTER, MACRO_F1, NOISE, PERPLEXITY, ROUGE, WORSE, chance, difference, draws, figure, verdict


def answered(answer, chosen, candidates=3) -> pd.DataFrame:
    answer, chosen = np.asarray(answer), np.asarray(chosen)
    return pd.DataFrame({"id": [str(i) for i in range(len(answer))], "answer": answer, "chosen": chosen, "right": answer == chosen,
                         "candidates": candidates})


def windows(losses, tokens) -> pd.DataFrame:
    return pd.DataFrame({"id": [str(i) for i in range(len(losses))], "loss": np.asarray(losses, dtype=float), "tokens": tokens})


def test_macro_f1_and_accuracy_are_those_of_a_count_by_hand():
    # class 0: 2 hits, 3 occur, 2 chosen: 4/5; class 1: 1 hit, 2 occur, 2 chosen: 1/2; class 2: 0 hits, 0 occur, 1 chosen: 0
    rows = answered([0, 0, 0, 1, 1], [0, 0, 1, 1, 2])
    assert figure(MACRO_F1, rows) == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)
    assert figure(ACCURACY, rows) == pytest.approx(3 / 5) and figure(ACCURACY, rows).n == 5


def test_perplexity_and_rouge_are_those_of_a_count_by_hand():
    assert figure(PERPLEXITY, windows([2.0, 4.0], [1, 2])) == pytest.approx(np.exp(2.0))
    rows = pd.DataFrame({"id": ["a", "b"], "rouge1": [0.5, 1.0], "rouge2": [0.0, 0.5], "rougeL": [0.25, 0.75]})
    assert [figure(m, rows) for m in ROUGE] == pytest.approx([0.75, 0.25, 0.5])
    assert [m.name for m in ROUGE] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]


def test_every_draw_has_the_figure_that_scikit_learn_gives_it():
    draw = np.random.default_rng(0)
    rows = answered(draw.integers(0, 4, 25), draw.integers(0, 5, 25))
    counts = next(draws(25, seed=3))[:50]
    f1, accuracy = MACRO_F1.drawn(rows)(counts), ACCURACY.drawn(rows)(counts)
    for r, drawn in enumerate(counts.astype(int)):
        assert drawn.sum() == 25
        sample = rows.loc[np.repeat(np.arange(25), drawn)]
        assert f1[r] == pytest.approx(f1_score(sample.answer, sample.chosen, average="macro"))
        assert accuracy[r] == pytest.approx(accuracy_score(sample.answer, sample.chosen))


def test_draws_are_the_same_in_parts(monkeypatch):
    sums, counts = np.random.default_rng(0).random((2, 30))
    whole, interval = np.concatenate(list(draws(30, 1))), bootstrap_ratio(sums, counts, 1)
    monkeypatch.setattr(import_module("dpruner.evaluate"), "CELLS", 900)   # whose name in the package is the function's
    parts = list(draws(30, 1))
    assert len(parts) > 50 and (np.concatenate(parts) == whole).all() and bootstrap_ratio(sums, counts, 1) == interval


def test_the_interval_of_perplexity_is_that_of_a_run():
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 60, 40)
    rows = windows(tokens * draw.normal(3, 0.5, 40), tokens)
    found = figure(PERPLEXITY, rows, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(bootstrap_ratio(rows.loss.to_numpy(), tokens.astype(float), 7))), rel=1e-6)


# ---- intervals


def covered(trials, simulate, truth) -> float:
    """The share of simulated figures whose interval holds the truth."""
    return sum((e := simulate(np.random.default_rng(t), t)).low <= truth <= e.high for t in range(trials)) / trials


def confused(draw, n, right=0.6) -> pd.DataFrame:
    """Answers of three classes of unequal frequency, right with some probability, else one of the two others."""
    answer = draw.choice(3, n, p=(0.5, 0.3, 0.2))
    wrong = (answer + draw.integers(1, 3, n)) % 3
    return answered(answer, np.where(draw.random(n) < right, answer, wrong))


# of 250 repetitions of a true 95 % all but one in 200 lie within 91 and 98.5 %; a percentile bootstrap of 80 items may be a little short of it
def test_intervals_of_accuracy_cover_the_truth_as_often_as_they_say():
    assert 0.90 <= covered(250, lambda draw, t: figure(ACCURACY, confused(draw, 80), t), 0.6) <= 0.99


def test_intervals_of_macro_f1_cover_the_truth_as_often_as_they_say():
    population = confused(np.random.default_rng(10**6), 400_000)
    truth = f1_score(population.answer, population.chosen, average="macro")
    found = covered(250, lambda draw, t: figure(MACRO_F1, confused(draw, 80), t), truth)
    assert 0.89 <= found <= 0.99


def test_intervals_of_a_mean_score_cover_the_truth_as_often_as_they_say():
    def simulate(draw, t):
        return figure(ROUGE[0], pd.DataFrame({"id": range(80), "rouge1": draw.beta(2, 5, 80)}), t)
    assert 0.90 <= covered(250, simulate, 2 / 7) <= 0.99


def test_intervals_of_paired_differences_cover_the_truth_and_are_narrower_than_those_of_each():
    # how hard an item is decides most of both models' answers; the second model is right 8 points less often
    def pair(draw):
        hard = draw.random(100)
        answer = draw.integers(0, 2, 100)
        first = np.where(hard < 0.7, answer, 1 - answer)
        second = np.where(hard + 0.16 * (draw.random(100) < 0.5) < 0.7, answer, 1 - answer)
        return answered(answer, first), answered(answer, second)

    assert 0.90 <= covered(250, lambda draw, t: difference(ACCURACY, *pair(draw), t), 0.08) <= 0.99
    rows, others = pair(np.random.default_rng(0))
    gap, one = difference(ACCURACY, rows, others), figure(ACCURACY, rows)
    assert gap.high - gap.low < 0.8 * (one.high - one.low) and (gap.low > 0) == (verdict(ACCURACY, gap) == BETTER)


def test_where_all_items_agree_the_interval_is_the_exact_one_and_not_a_point():
    rows = answered([0, 1] * 10, [0, 1] * 10)
    for metric in (ACCURACY, MACRO_F1):
        found = figure(metric, rows)
        assert found == found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 20)) and 0.83 < found.low < 0.84
    found = figure(ACCURACY, answered([0, 1] * 10, [1, 0] * 10))
    assert found == found.low == 0 and found.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert figure(ACCURACY, answered([0], [0])).low == pytest.approx(0.025)


# ---- two models


def test_a_model_does_not_differ_from_itself():
    rows = answered([0, 1, 2, 0], [0, 2, 2, 1])
    for metric in (ACCURACY, MACRO_F1):
        gap = difference(metric, rows, rows)
        assert (gap, gap.low, gap.high, gap.n) == (0, 0, 0, 4) and verdict(metric, gap) == NOISE
    texts = windows([3.0, 4.0], [2, 2])
    assert difference(PERPLEXITY, texts, texts) == 0


def test_the_verdict_knows_which_way_is_better():
    draw = np.random.default_rng(0)
    losses = draw.normal(3, 0.3, 60) * 10
    worse = difference(PERPLEXITY, windows(losses * 1.1, [10] * 60), windows(losses, [10] * 60))
    assert worse == pytest.approx(np.exp(0.1 * losses.sum() / 600) - 1) and verdict(PERPLEXITY, worse) == WORSE
    assert verdict(PERPLEXITY, difference(PERPLEXITY, windows(losses, [10] * 60), windows(losses * 1.1, [10] * 60))) == BETTER
    right, wrong = answered([0] * 30 + [1] * 30, [0] * 30 + [1] * 30), answered([0] * 30 + [1] * 30, [1] * 30 + [1] * 30)
    assert difference(ACCURACY, right, wrong) == 0.5
    assert verdict(ACCURACY, difference(ACCURACY, right, wrong)) == BETTER and verdict(ACCURACY, difference(ACCURACY, wrong, right)) == WORSE


def test_a_single_item_is_no_evidence():
    for metric, one, other in ((ACCURACY, answered([0], [0]), answered([0], [1])), (PERPLEXITY, windows([3.0], [2]), windows([3.1], [2]))):
        assert verdict(metric, difference(metric, one, other)) == NOISE


def test_answers_to_other_items_are_not_compared():
    rows = answered([0, 1], [0, 1])
    for others in (rows.iloc[:1], rows.iloc[::-1]):
        with pytest.raises(InputError, match="not given the same items"):
            difference(ACCURACY, rows, others)


def test_chance_is_one_over_the_candidates_of_each_item():
    assert chance(answered([0, 1, 2], [0, 1, 2], candidates=[2, 4, 4])) == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)

"""Perplexity against a count by hand, its windows, and its interval."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from families import POSITIONS, tiny, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import dpruner
from dpruner.errors import InputError
from dpruner.evaluate import Estimate, bootstrap_ratio, perplexity, windows

TEXTS = ["The court finds for the plaintiff.", "a", "Take two of these a day, with water; and call me if it gets any worse.", "", "no."]


@torch.no_grad()
def by_hand(model, tokenizer, texts, seqlen, stride):
    """One token at a time: the first window that reaches a token predicts it, from all that the window holds before it."""
    losses = []
    for text in texts:
        ids = tokenizer(text).input_ids
        for t in range(1, len(ids)):
            window = max(0, math.ceil((t + 1 - seqlen) / stride))
            context = ids[min(window * stride, t - 1):t]
            losses.append(-model(input_ids=torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[ids[t]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("seqlen, stride", [(16, 8), (16, 1), (16, 15), (128, 64)])
def test_perplexity_is_that_of_a_count_by_hand(family, seqlen, stride):
    model, tokenizer = tiny(family), tiny_tokenizer()
    expected, tokens = by_hand(model, tokenizer, TEXTS, seqlen, stride)
    found = perplexity(model, tokenizer, TEXTS, seqlen, stride)
    assert found == pytest.approx(expected, rel=1e-5) and found.tokens == tokens


def test_windows_side_by_side_predict_their_first_token_too():
    # a stride of the whole window leaves no token before the first; the window then reaches back by one
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    found = perplexity(model, tokenizer, TEXTS, 16, 16)
    assert found.tokens == sum(max(0, len(t) - 1) for t in TEXTS)
    assert found == perplexity(model, tokenizer, TEXTS, 16, 15)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_batch_size_changes_perplexity_by_rounding_only(batch_size):
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    one, other = (perplexity(model, tokenizer, TEXTS, 16, 8, batch_size=b) for b in (64, batch_size))
    assert one == pytest.approx(other, rel=1e-5) and one.n == other.n
    assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-5)


def test_an_untrained_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, tiny_tokenizer(), TEXTS, 16, 8) == pytest.approx(97, rel=1e-5)


def test_the_default_window_is_the_longest_the_model_takes_with_half_of_it_new():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    text = ["word " * 60]
    assert perplexity(model, tokenizer, text) == perplexity(model, tokenizer, text, POSITIONS, POSITIONS // 2)


def test_perplexity_leaves_the_model_and_its_gradients_alone():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    perplexity(model, tiny_tokenizer(), TEXTS, 16, 8)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_progress_counts_windows_from_none_to_all():
    seen = []
    found = perplexity(tiny("llama"), tiny_tokenizer(), TEXTS, 16, 8, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen[0] == ("perplexity", 0, found.n) and seen[-1] == ("perplexity", found.n, found.n)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@given(length=st.integers(0, 200), seqlen=st.integers(2, 40), data=st.data())
def test_windows_cover_every_token_but_the_first_exactly_once(length, seqlen, data):
    stride = data.draw(st.integers(1, seqlen))
    spans = windows(length, seqlen, stride)
    assert [t for start, stop, new in spans for t in range(new, stop)] == list(range(1, length))
    for start, stop, new in spans:
        assert 0 <= start < new < stop <= length and stop - start <= seqlen   # every new token has one before it in its window
    for (start, *_), (later, *_) in zip(spans, spans[1:], strict=False):
        assert later - start == min(stride, seqlen - 1)


@pytest.mark.parametrize("texts, seqlen, stride, word", [
    ([], None, None, "text"), (["", "a"], None, None, "text"), (TEXTS, 129, None, "128"), (TEXTS, 1, None, "2 to 128"),
    (TEXTS, 16, 0, "stride"),
    (TEXTS, 16, 17, "stride"),
])
def test_what_cannot_be_evaluated_is_refused(texts, seqlen, stride, word):
    with pytest.raises(InputError, match=word):
        perplexity(tiny("llama"), tiny_tokenizer(), texts, seqlen, stride)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    for drawing in (lambda: perplexity(tiny("llama"), tiny_tokenizer(), TEXTS, 16, seed=seed), lambda: dpruner.evaluate("no run", seed=seed)):
        with pytest.raises(InputError, match=f"The seed {seed} cannot be used"):
            drawing()


def test_a_model_without_a_limit_takes_longer_windows_than_the_usual_ones():
    assert perplexity(tiny("bloom"), tiny_tokenizer(), ["word " * 20], seqlen=4096).n == 1


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # ratios of sums over 60 pieces of unequal size; 300 repetitions of a true 95 % lie within 91.5 and 98.5 % but for one time in 200
    draw = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        counts = draw.integers(5, 60, 60).astype(float)
        sums = counts * draw.normal(3.0, 0.5, 60)
        low, high = bootstrap_ratio(sums, counts, seed=trial)
        hits += low <= 3.0 <= high
    assert 0.915 <= hits / 300 <= 0.985


def test_the_interval_depends_on_the_seed_alone_and_is_a_point_where_all_pieces_agree():
    sums, counts = np.array([2.0, 9.0, 4.0]), np.array([1.0, 3.0, 2.0])
    assert bootstrap_ratio(sums, counts, 7) == bootstrap_ratio(sums, counts, 7)
    assert bootstrap_ratio(2.5 * counts, counts) == pytest.approx((2.5, 2.5))


def test_an_estimate_is_a_float_that_remembers_its_interval():
    e = Estimate(12.5, 11.0, 14.0, n=8, tokens=100)
    assert isinstance(e, float) and e == 12.5 and e + 1 == 13.5 and max(e, 3.0) is e and f"{e:.2f}" == "12.50" and json.dumps(e) == "12.5"
    assert "11" in repr(e) and "14" in repr(e) and "8" in repr(e)
    for twin in (pickle.loads(pickle.dumps(e)), copy.copy(e), copy.deepcopy(e)):
        assert (twin, twin.low, twin.high, twin.n, twin.tokens) == (12.5, 11.0, 14.0, 8, 100)


def test_the_interval_holds_the_estimate_and_narrows_with_more_text(starter):
    from dpruner import load_texts
    model, tokenizer = starter
    texts = load_texts("healthcare", "heldout", limit=3)
    few, many = perplexity(model, tokenizer, texts[:1], 64), perplexity(model, tokenizer, texts, 64)
    assert few.low <= few <= few.high and many.low <= many <= many.high and many.n > few.n
    assert (many.high - many.low) / many < (few.high - few.low) / few

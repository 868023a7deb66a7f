"""What models make of items: against one pass a candidate, one prompt a generation; a model that knows scores 1, one that guesses is at chance."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from families import EOS, FAMILIES, MOE, POSITIONS, tiny, tiny_tokenizer
from torch import nn

from dpruner import scoring
from dpruner.errors import InputError
from dpruner.evaluate import perplexity
from dpruner.generate import generate, read
from dpruner.metrics import ACCURACY, MACRO_F1, PERPLEXITY, ROUGE, figure
from dpruner.scoring import answered, candidate_ids, continued, log_likelihoods, summary_ids, summary_tokens
from dpruner.tasks import Item, Task, from_rows, text_task

TOKENIZER = tiny_tokenizer()
WORDS = ["rain", "a river in spring", "no", "the law of the land", "tea"]


def exam(count: int, choices: int = 4, seed: int = 0) -> Task:
    """Items whose answers are drawn, so that no model can know them but by chance."""
    draw = np.random.default_rng(seed)
    rows = [{"context": f"Passage {i}" + " on and on" * int(draw.integers(0, 4)), "question": f"Which of {i * 7}?",
             "choices": [f"{WORDS[k]} {draw.integers(100)}" for k in draw.permutation(len(WORDS))[:choices]],
             "answer": int(draw.integers(choices))} for i in range(count)]
    return from_rows("exam", rows)[0]


def rows_of(model, task, **options) -> pd.DataFrame:
    return pd.concat([rows for _, rows in answered(model, TOKENIZER, task, **options)], ignore_index=True)


class Knowing(nn.Module):
    """A model that has learnt some texts by heart and continues each as it goes on; what it has never seen could be anything.

    Args:
        texts: lists of ids, the first that fits is followed.
    """

    def __init__(self, texts: list[list[int]], positions: int = 10_000):
        super().__init__()
        self.after, self.device = {}, torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions))
        for ids in texts:
            for i in range(1, len(ids)):
                self.after.setdefault(tuple(ids[:i]), ids[i])

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        mask = torch.ones_like(seen) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, 97)
        for row in range(len(seen)):
            for back in range(input_ids.shape[1]):
                stop = seen.shape[1] - back
                known = self.after.get(tuple(seen[row, :stop][mask[row, :stop] == 1].tolist()))
                if known is not None:
                    logits[row, input_ids.shape[1] - 1 - back, known] = 20.0
        return SimpleNamespace(logits=logits, past_key_values=seen)


# ---- candidates


@pytest.mark.parametrize("family", FAMILIES + MOE)
def test_likelihoods_are_those_of_one_pass_each(family):
    model, task = tiny(family), exam(6)
    rows = rows_of(model, task)
    for row, item in zip(rows.itertuples(), task.items, strict=True):
        prompt = TOKENIZER(item.prompt).input_ids
        expected = [np.mean(read(model, prompt, TOKENIZER(c).input_ids)) for c in item.candidates]
        assert row.scores == pytest.approx(expected, abs=1e-4)
        assert (row.chosen, row.right, row.candidates) == (np.argmax(expected), np.argmax(expected) == item.answer, 4)
        assert (row.id, row.answer, row.shortened) == (item.id, item.answer, False)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_padding_changes_likelihoods_by_rounding_only(family, batch_size):
    model, task = tiny(family), exam(10)
    one, other = rows_of(model, task), rows_of(model, task, batch_size=batch_size)
    np.testing.assert_allclose(np.stack(one.scores), np.stack(other.scores), atol=1e-5)
    assert one.chosen.equals(other.chosen)


def test_candidates_of_one_token_share_one_pass(monkeypatch):
    model, passes = tiny("llama"), []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    ids = TOKENIZER("Is it?").input_ids
    found = log_likelihoods(model, [([*ids, token], len(ids)) for token in (5, 6, 7)])
    handle.remove()
    assert passes == [1]
    assert found == pytest.approx([read(model, ids, [token])[0] for token in (5, 6, 7)], abs=1e-5)


def test_a_model_that_knows_the_answers_scores_1_and_one_that_knows_them_wrong_0():
    task = exam(20)
    for kept, score in ((True, 1), (False, 0)):
        texts = [TOKENIZER(i.prompt + i.candidates[i.answer if kept else (i.answer + 1) % 4]).input_ids for i in task.items]
        rows = rows_of(Knowing(texts), task)
        assert figure(ACCURACY, rows) == score and figure(MACRO_F1, rows) == score


def test_a_model_that_guesses_is_at_chance():
    task = exam(400)
    found = figure(ACCURACY, rows_of(tiny("llama"), task))
    assert abs(found - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400) and found.low < 0.25 < found.high


def test_a_long_candidate_is_not_punished_for_its_length():
    """The mean over tokens decides: a model for which all tokens are alike finds all candidates alike, and takes the first."""
    rows = rows_of(Knowing([]), exam(5))
    np.testing.assert_allclose(np.stack(rows.scores), -math.log(97), rtol=1e-6)
    assert (rows.chosen == 0).all()


def test_a_prompt_that_is_too_long_loses_its_beginning_for_all_candidates():
    item = Item("x", "b" * 200 + "The end of the passage.", "\nWhich?", (" one", " the other one"), 0)
    found, shortened = candidate_ids(tiny("llama"), TOKENIZER, item)
    assert shortened and max(len(ids) for ids, _ in found) == POSITIONS + 1   # the last one is only predicted
    (first, given), (second, given_too) = found
    assert given == given_too and first[:given] == second[:given]
    assert TOKENIZER.decode(first).endswith("bbThe end of the passage.\nWhich? one")
    assert not candidate_ids(tiny("bloom"), TOKENIZER, item)[1]   # no limit
    rows = rows_of(tiny("llama"), Task("long", "choice", (item,)))
    assert rows.shortened.tolist() == [True]


def test_an_opening_token_stays_where_a_prompt_loses_its_beginning(starter):
    model, tokenizer = starter
    found, shortened = candidate_ids(model, tokenizer, Item("x", "word " * 900, "Which?", (" one", " two"), 0))
    assert shortened and all(ids[0] == tokenizer.bos_token_id and len(ids) <= 513 for ids, _ in found)
    assert tokenizer.bos_token_id not in found[0][0][1:]


def test_candidates_longer_than_the_model_lose_their_end():
    item = Item("x", "Context. " * 9, "Which?", (" " + "a" * 300, " b"), 1)
    found, shortened = candidate_ids(tiny("llama"), TOKENIZER, item)
    assert shortened and [len(ids) - given for ids, given in found] == [POSITIONS // 2, 2] and max(len(ids) for ids, _ in found) == POSITIONS + 1
    assert np.isfinite(rows_of(tiny("llama"), Task("long", "choice", (item,))).scores[0]).all()


def test_tokens_that_span_the_border_count_as_the_candidates(starter):
    model, tokenizer = starter
    item = Item("x", "The court h", "", ("olds", "as"), 0)
    prompt = tokenizer(item.prompt).input_ids
    found, _ = candidate_ids(model, tokenizer, item)
    for (ids, given), candidate in zip(found, item.candidates, strict=True):
        assert ids == tokenizer(item.prompt + candidate).input_ids and ids[:given] == prompt[:given] and given < len(ids)


def test_a_likelihood_that_is_no_number_is_refused():
    model = tiny("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="The item 0 cannot be scored"):
        rows_of(model, exam(1))


# ---- summaries


@pytest.mark.parametrize("family", FAMILIES + MOE)
def test_prompts_together_are_continued_as_each_alone(family):
    model, texts = tiny(family), ["The law", "Take two of these a day, with water.", "x", "The court finds for"]
    made = continued(model, [TOKENIZER(t).input_ids for t in texts], 12)
    for text, ids in zip(texts, made, strict=True):
        assert ids == [t.id for t in generate(model, TOKENIZER, text, max_new_tokens=12, stop=False)], text


def test_continuations_end_where_the_model_ends_them():
    prompts = [TOKENIZER(t).input_ids for t in ("one", "another one")]
    model = Knowing([prompts[0] + [10, 11, EOS, 12], prompts[1] + [20, 21, 22, 23, EOS]])
    assert continued(model, prompts, 10, frozenset({EOS})) == [[10, 11], [20, 21, 22, 23]]
    assert continued(model, prompts, 2, frozenset({EOS})) == [[10, 11], [20, 21]]


BILLS = from_rows("bills", [{"source": f"Bill {i}: the Mayor shall pay.", "summary": text} for i, text in enumerate(["The Mayor pays the cats.", "A bill."])])[0]


def test_a_model_that_knows_the_summaries_has_rouge_of_1():
    texts = [TOKENIZER(i.prompt + " " + i.reference).input_ids + [EOS] for i in BILLS.items]
    rows = rows_of(Knowing(texts), BILLS)
    assert rows.text.tolist() == [i.reference for i in BILLS.items]
    assert [figure(m, rows) for m in ROUGE] == [1, 1, 1]


def test_rouge_is_that_of_a_count_by_hand_and_a_summary_ends_at_its_first_blank_line():
    made = "\nThe Mayor pays a cat.\n\nThe dog."   # against "The Mayor pays the cats.": 4 of 5 words each way, 2 of 4 pairs, "the mayor pays cat" in order
    texts = [TOKENIZER(BILLS.items[0].prompt + made).input_ids + [EOS]]
    task = Task("bills", "summary", (Item("0", BILLS.items[0].context, "\nSummary:", reference="The Mayor pays the cats." + " " * 40),))
    (row,) = rows_of(Knowing(texts), task).itertuples()
    assert row.text == "The Mayor pays a cat."
    assert (row.rouge1, row.rouge2, row.rougeL) == pytest.approx((4 / 5, 2 / 4, 4 / 5))   # stems: cat = cats


def test_a_summary_has_room_for_the_longest_reference_and_no_more_than_128_tokens():
    assert summary_tokens(TOKENIZER, BILLS.items) == len(" The Mayor pays the cats.")
    assert summary_tokens(TOKENIZER, [Item("0", "x", reference="y" * 500)]) == 128


def test_a_document_that_is_too_long_loses_its_end():
    item = Item("0", "The beginning. " + "b" * 300, "\nSummary:", reference="x" * 20)
    ids, shortened = summary_ids(tiny("llama"), TOKENIZER, item, 20)
    text = TOKENIZER.decode(ids)
    assert shortened and len(ids) == POSITIONS - 20 and text.startswith("The beginning. bb") and text.endswith("b\nSummary:")
    rows = rows_of(tiny("llama"), Task("bills", "summary", (item,)))
    assert rows.shortened.tolist() == [True]
    with pytest.raises(InputError, match="The item 0 cannot be given"):
        summary_ids(tiny("llama"), TOKENIZER, item, 125)


# ---- texts


def test_the_losses_of_texts_make_the_perplexity_of_a_run():
    model, texts = tiny("llama"), ["The court finds for the plaintiff. " * 9, "", "Take two of these a day.", "n"] * 12
    rows = rows_of(model, text_task("t", texts), seqlen=32)
    found, expected = figure(PERPLEXITY, rows), perplexity(model, TOKENIZER, texts, 32)
    assert found == pytest.approx(expected, rel=1e-6) and (found.n, rows.tokens.sum()) == (expected.n, expected.tokens)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert rows.id[:3].tolist() == ["0:0", "0:1", "0:2"] and rows.id.is_unique


# ---- in groups


def test_items_go_in_groups_that_can_be_taken_up_again_with_the_same_bits(monkeypatch):
    monkeypatch.setattr(scoring, "GROUP", 4)
    model, task, seen = tiny("llama"), exam(10), []
    steps = list(answered(model, TOKENIZER, task, progress=lambda *step: seen.append(step)))
    assert [done for done, _ in steps] == [4, 8, 10] and seen == [("exam", 0, 10), ("exam", 4, 10), ("exam", 8, 10), ("exam", 10, 10)]
    later = list(answered(model, TOKENIZER, task, start=4))
    for (done, rows), (done_again, again) in zip(steps[1:], later, strict=True):
        assert done == done_again
        pd.testing.assert_frame_equal(rows, again, check_exact=True)
    assert list(answered(model, TOKENIZER, task, start=10)) == []

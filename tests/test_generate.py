"""Generation against a slow, obvious twin: no cache, the whole text through the model for every token."""

import math

import pytest
import torch
from families import EOS, FAMILIES, MOE, POSITIONS, tiny, tiny_tokenizer

from dpruner import InputError, make_masks, pruned
from dpruner.generate import end_tokens, generate, prompt_ids, read, tokens_per_second
from dpruner.model import blank_scores, fingerprint

PROMPT = "The law of the land"


@torch.no_grad()
def slow(model, ids, count):
    """(token, log-probability) of every greedy step, each from the whole text."""
    found = []
    for _ in range(count):
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(0)
        found.append((int(log_probs.argmax()), float(log_probs.max())))
        ids = [*ids, found[-1][0]]
    return found


@pytest.mark.parametrize("family", FAMILIES + MOE)
def test_the_cache_changes_nothing(family):
    model, tokenizer = tiny(family), tiny_tokenizer()
    made = list(generate(model, tokenizer, PROMPT, max_new_tokens=12, stop=False))
    expected = slow(model, tokenizer(PROMPT).input_ids, 12)
    assert [t.id for t in made] == [i for i, _ in expected]
    assert [t.log_prob for t in made] == pytest.approx([p for _, p in expected], abs=1e-4)
    assert read(model, tokenizer(PROMPT).input_ids, [t.id for t in made]) == pytest.approx([t.log_prob for t in made], abs=1e-4)


@pytest.fixture(scope="module")
def llama_model():
    return tiny("llama"), tiny_tokenizer()


def test_it_stops_at_the_end_token_and_says_so(llama_model):
    model, tokenizer = llama_model
    free = [t.id for t in generate(model, tokenizer, PROMPT, max_new_tokens=8, stop=False)]
    model.generation_config.eos_token_id = [EOS, free[3]]
    try:
        assert end_tokens(model, tokenizer) == {EOS, free[3]}
        made = list(generate(model, tokenizer, PROMPT, max_new_tokens=8))
    finally:
        model.generation_config.eos_token_id = EOS
    until = free.index(free[3]) + 1
    assert [t.id for t in made] == free[:until] and [t.end for t in made] == [False] * (until - 1) + [True] and made[-1].text == ""


def test_sampling_repeats_with_its_seed_and_follows_the_probabilities(llama_model):
    model, tokenizer = llama_model

    def drawn(seed, count=6, **settings):
        settings = {"temperature": 1.0, **settings}
        return [t.id for t in generate(model, tokenizer, PROMPT, max_new_tokens=count, seed=seed, stop=False, **settings)]

    assert drawn(1) == drawn(1) and drawn(1) != drawn(2)
    greedy = [t.id for t in generate(model, tokenizer, PROMPT, max_new_tokens=6, stop=False)]
    assert drawn(1, top_p=1e-9) == greedy and drawn(1, temperature=1e-4) == greedy
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([tokenizer(PROMPT).input_ids])).logits[0, -1].double().softmax(0)
    nucleus = chances.sort(descending=True)
    inside = set(nucleus.indices[:int((nucleus.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    firsts = [drawn(seed, 1)[0] for seed in range(600)]
    best = int(chances.argmax())
    share, spread = firsts.count(best) / 600, math.sqrt(float(chances[best] * (1 - chances[best])) / 600)
    assert abs(share - float(chances[best])) < 4 * spread
    assert {drawn(seed, 1, top_p=0.5)[0] for seed in range(100)} <= inside < set(firsts)


def test_log_probabilities_are_the_models_own_at_any_temperature(llama_model):
    model, tokenizer = llama_model
    made = list(generate(model, tokenizer, PROMPT, max_new_tokens=5, temperature=2.0, top_p=0.9, seed=3, stop=False))
    assert [t.log_prob for t in made] == pytest.approx(read(model, tokenizer(PROMPT).input_ids, [t.id for t in made]), abs=1e-4)


def test_models_that_agree_draw_the_same_text(llama_model):
    """Two models that differ a little part late: independent draws would part at once."""
    model, tokenizer = llama_model
    scores = blank_scores(model)
    scores.update({n: p.detach().abs() for n, p in model.named_parameters() if n in scores})

    def text(seed):
        return [t.id for t in generate(model, tokenizer, PROMPT, max_new_tokens=1, temperature=1.0, seed=seed, stop=False)]

    dense = [text(seed) for seed in range(40)]
    before = fingerprint(model)
    with pruned(model, make_masks(scores, 0.05)):
        same = sum(text(seed) == dense[seed] for seed in range(40))
    assert same >= 36 and fingerprint(model) == before


def test_it_never_goes_past_the_models_positions(llama_model):
    model, tokenizer = llama_model
    assert len(list(generate(model, tokenizer, "x" * (POSITIONS - 3), max_new_tokens=50, stop=False))) == 3
    with pytest.raises(InputError, match=f"{POSITIONS} tokens is too long: the model takes {POSITIONS} tokens"):
        generate(model, tokenizer, "x" * POSITIONS)


@pytest.mark.parametrize(("settings", "words"), [
    ({"max_new_tokens": 0}, "0 new tokens"), ({"max_new_tokens": 2.5}, "2.5 new tokens"), ({"temperature": -1}, "temperature -1"),
    ({"temperature": float("nan")}, "temperature nan"), ({"top_p": 0}, "top_p = 0"), ({"top_p": 1.1}, "top_p = 1.1"),
    ({"seed": -1}, "seed -1")])
def test_settings_out_of_range_are_refused_before_the_first_token(llama_model, settings, words):
    with pytest.raises(InputError, match=words):
        generate(*llama_model, PROMPT, **settings)


def test_an_empty_prompt_begins_with_what_opens_a_text(llama_model, starter):
    model, tokenizer = llama_model
    assert prompt_ids(model, tokenizer, "") == [tokenizer.bos_token_id] == prompt_ids(*starter, "")
    bare = tiny_tokenizer()
    bare.bos_token = None
    with pytest.raises(InputError, match="The prompt is empty: this model has no token that opens a text; write at least one word"):
        generate(model, bare, "")


def test_the_pieces_join_to_the_decoded_text(starter):
    model, tokenizer = starter
    prompt = "The price of coffee — 3 €"
    made = list(generate(model, tokenizer, prompt, max_new_tokens=60, temperature=1.5, seed=5))   # hot: bytes of rare characters come up
    ids = [*tokenizer(prompt).input_ids, *(t.id for t in made)]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert prompt + "".join(t.text for t in made) == whole


def test_characters_that_span_tokens_come_out_whole(starter):
    from dpruner.generate import _Reader
    _, tokenizer = starter
    text = "naïve 漢字 costs 5 € 🙂 ok"
    ids = tokenizer(text).input_ids
    reader = _Reader(tokenizer, ids[:1])
    pieces = [reader.add(i, last=i == ids[-1]) for i in ids[1:]]
    assert "".join(pieces) == text and "" in pieces and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_the_starter_writes_what_its_readme_says(starter):
    model, tokenizer = starter
    text = "".join(t.text for t in generate(model, tokenizer, "The Mayor shall have the authority to", max_new_tokens=12))
    assert text.startswith(" administer oaths and witnesses. The Mayor")


def test_speed_is_tokens_over_time(llama_model, monkeypatch):
    ticks = iter([10.0, 12.0])
    monkeypatch.setattr("dpruner.generate.time.perf_counter", lambda: next(ticks))
    assert tokens_per_second(*llama_model, PROMPT, count=8) == 4.0

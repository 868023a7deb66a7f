"""The starter: its recipe trains, repeats itself to the bit and refuses clearly; the shipped model has learnt its domains."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpruner import starter
from dpruner.starter import train

TINY = ["--hidden-size", "32", "--blocks", "1", "--vocab-size", "300", "--seqlen", "32", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def corpus(tmp_path):
    """A file of 100 short documents over few words, so that a tiny model learns them in a few steps."""
    draw, words = random.Random(0), "the court finds that this patient owes a price for the old law of rest".split()
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=40))}) + "\n" for _ in range(100)))
    return path


def run(corpus, out, *more):
    return train.main(["--corpus", f"words={corpus}", "--out", str(out), *TINY, *more])


def refusal(capsys):
    """What was said on the way out: one sentence on one line."""
    said = capsys.readouterr().err.strip()
    assert said and "\n" not in said and said.endswith("."), said
    return said


def test_trains_and_loads_anywhere(corpus, tmp_path):
    out = tmp_path / "made"
    assert run(corpus, out, "--steps", "30", "--learning-rate", "0.01") == 0

    record = json.loads((out / "training.json").read_text())
    assert record["loss"]["last"] < 0.8 * record["loss"]["first"]
    assert record["heldout_perplexity"]["words"] < 150
    assert record["tokens_seen"] == 30 * 8 * 32
    assert str(tmp_path) not in (out / "training.json").read_text() and record["arguments"]["corpus"] == {"words": "words.jsonl"}

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer) <= 300
    ids = tokenizer("the court finds – ünïcode ✓", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and torch.isfinite(model(input_ids=ids).logits).all()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "the court finds – ünïcode ✓"


def test_same_steps_and_seed_give_the_same_bits(corpus, tmp_path):
    for name, seed in (("one", "7"), ("two", "7"), ("other", "8")):
        assert run(corpus, tmp_path / name, "--steps", "3", "--seed", seed) == 0

    def content(name, file):
        return (tmp_path / name / file).read_bytes()
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert content("one", file) == content("two", file)
    assert content("one", "model.safetensors") != content("other", "model.safetensors")


def test_minutes_and_a_given_tokenizer_and_heldout_file(corpus, tmp_path):
    heldout = tmp_path / "later.jsonl"
    heldout.write_text(corpus.read_text())
    assert run(corpus, tmp_path / "made", "--minutes", "0.01", "--tokenizer", str(starter.PATH), "--heldout", f"words={heldout}") == 0
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["corpora"]["words"]["texts"] == 100   # nothing is set aside where a held-out file is given
    assert record["steps"] >= 1 and record["arguments"]["tokenizer"] == "model"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "made")) == len(AutoTokenizer.from_pretrained(starter.PATH))


def test_an_existing_folder_is_refused_and_left_alone(corpus, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert run(corpus, out, "--steps", "1") == 1
    assert "mine" in refusal(capsys) and [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_filled(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(corpus, tmp_path / "empty", "--steps", "1") == 0
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_missing_corpus_is_refused(tmp_path, capsys):
    assert run(tmp_path / "nowhere.jsonl", tmp_path / "out", "--steps", "1") == 1
    assert "nowhere.jsonl" in refusal(capsys) and not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, word", [
    (["--steps", "0"], "--steps"), (["--minutes", "soon"], "--minutes"), (["--steps", "1", "--minutes", "1"], "--minutes"),
    (["--repeat", "finance=3"], "finance"), (["--cap", "words"], "NAME=value"), (["--corpus", "words=again.txt"], "twice"),
    (["--heads", "3"], "heads"), (["--vocab-size", "100"], "vocab-size"), (["--seqlen", "100000", "--steps", "1"], "--seqlen"),
    (["--device", "abacus"], "abacus"), (["--tokenizer", "nowhere"], "nowhere"),
])
def test_bad_arguments_are_one_sentence(corpus, tmp_path, capsys, arguments, word):
    assert run(corpus, tmp_path / "out", *arguments) == 1
    assert word in refusal(capsys) and [p.name for p in tmp_path.iterdir()] == ["words.jsonl"]


def test_stopping_saves_nothing(corpus, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "follow", interrupted)
    assert run(corpus, tmp_path / "out", "--steps", "1") == 1
    assert "nothing was saved" in refusal(capsys) and [p.name for p in tmp_path.iterdir()] == ["words.jsonl"]


def test_the_schedule_warms_up_and_cools_down():
    rates = [train.learning_rate(done, peak=1.0) for done in (0.0, 0.025, 0.05, 0.5, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 0.994, 0.51, 0.02], abs=2e-3)
    assert list(train.schedule(4, None)) == [0.25, 0.5, 0.75, 1.0]


def test_the_mixture_and_the_cap():
    assert train.mixture([300, 100], [1, 3]).tolist() == [0.5, 0.5]
    assert train.capped(["aaa", "bbb", "ccc"], 4) == ["aaa", "bbb"] and train.capped(["a", "b"], float("inf")) == ["a", "b"]


def test_perplexity_agrees_with_its_slow_twin():
    torch.manual_seed(0)
    model = train.new_model(AutoTokenizer.from_pretrained(starter.PATH), seqlen=8, hidden_size=16, blocks=1, heads=1, intermediate_size=16)
    # 19 windows fill one batch and part of another, and 3 tokens are left over
    stream = torch.randint(0, 8192, (8 * 19 + 3,), dtype=torch.int32)
    losses = []
    for window in stream[:8 * 19].long().view(19, 8):
        chances = model(input_ids=window[None]).logits[0].log_softmax(-1)
        losses += [-chances[i, window[i + 1]].item() for i in range(7)]
    assert train.perplexity(model, stream, 8) == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)


def test_the_shipped_model_is_small_and_in_bfloat16():
    assert sum(file.stat().st_size for file in starter.PATH.iterdir()) <= 32e6
    with safe_open(starter.PATH / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}


@pytest.mark.parametrize("domain", ["general", "healthcare", "legal"])
def test_the_shipped_model_knows_its_domains(domain):
    files = sorted((starter.CORPORA / domain / "heldout").glob("*.txt"))
    if not files:
        pytest.skip(f"no built-in {domain} corpus here")
    tokenizer, model = AutoTokenizer.from_pretrained(starter.PATH), AutoModelForCausalLM.from_pretrained(starter.PATH, dtype=torch.float32)
    stream = train.encode([file.read_text(encoding="utf-8") for file in files], tokenizer)
    assert train.perplexity(model, stream, 256) <= len(tokenizer) / 20

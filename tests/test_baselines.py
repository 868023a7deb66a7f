"""Wanda and SparseGPT against twins that follow their papers, on every calibration; what SparseGPT moved is what is judged and exported."""

import oracle
import pytest
import torch
from families import FAMILIES, tiny, tiny_batches

from dpruner import RunConfig, baselines, load_calibration, load_model, load_texts, make_masks, perplexity, pipeline, pruned
from dpruner.compensate import HESSIANS, compensation_sets
from dpruner.errors import InputError
from dpruner.evaluations import evaluate
from dpruner.export import export
from dpruner.generate import generate
from dpruner.model import decoder_blocks, fingerprint, prunable_linears
from dpruner.loading import quiet_libraries
from dpruner.variants import load_original, variant

GENERAL, DOMAIN = tiny_batches(16, seed=1), tiny_batches(12, seed=2)   # more tokens than any linear has inputs
SEVERAL = [f for f in FAMILIES if f in ("llama", "gpt2", "gemma3_text", "falcon", "mpt", "qwen3")]

every_calibration = pytest.mark.parametrize("which", HESSIANS)


def told(model):
    """What the slow twin wants to be told about a model."""
    return model, decoder_blocks(model)[1], prunable_linears(model)


def assert_same_masks(kept, removed):
    assert set(kept) == set(removed)
    for name in kept:
        assert torch.equal(kept[name], ~removed[name]), name


def assert_close(ours, theirs, tolerance):
    """Every value equal to `tolerance` of its own and its matrix's mean size."""
    assert set(ours) == set(theirs)
    for name, mine in ours.items():
        expected = theirs[name].double()
        worst = ((mine.double() - expected).abs() / (expected.abs().mean() + expected.abs())).max()
        assert worst <= tolerance, f"{name}: {worst:.2g}"


@every_calibration
@pytest.mark.parametrize("family", SEVERAL)
def test_sparsegpt_is_that_of_its_paper(family, which):
    model = tiny(family).double()
    before, sets = fingerprint(model), compensation_sets(GENERAL, DOMAIN, which)
    expected = oracle.sparsegpt_walk(*told(model), sets, 0.6)
    ours = baselines.sparsegpt(model, sets, 0.6)
    assert_same_masks(ours.masks, expected.removed)
    assert_close(ours.weights, expected.weights, 1e-8)
    assert fingerprint(model) == before


@every_calibration
@pytest.mark.parametrize("family", SEVERAL)
def test_wanda_is_that_of_its_paper(family, which):
    model = tiny(family).double()
    before, sets = fingerprint(model), compensation_sets(GENERAL, DOMAIN, which)
    expected = oracle.wanda_walk(*told(model), sets, 0.6)
    scores = baselines.wanda(model, sum(sets, []), 0.6)
    assert_close(scores, expected.scores, 1e-8)
    assert_same_masks(make_masks(scores, 0.6, "row"), expected.removed)
    assert fingerprint(model) == before


@pytest.mark.parametrize("granularity", ["matrix", "2:4"])
def test_wanda_prunes_on_the_way_as_it_will_in_the_end(granularity):
    model = tiny("mistral").double()
    expected = oracle.wanda_walk(*told(model), [GENERAL], 0.5, granularity)
    scores = baselines.wanda(model, GENERAL, 0.5, granularity)
    assert_close(scores, expected.scores, 1e-8)
    assert_same_masks(make_masks(scores, 0.5, granularity), expected.removed)


def test_where_128_does_not_divide_wanda_takes_the_groups_of_the_masks():
    model = tiny("llama").double()
    scores = baselines.wanda(model, GENERAL, 0.5, "block")
    with pruned(model, {n: m for n, m in make_masks(scores, 0.5, "block").items() if ".layers.0." in n}):
        inputs = oracle.linear_inputs(model, decoder_blocks(model)[1][1], {n: m for n, m in prunable_linears(model).items() if ".layers.1." in n},
                                      GENERAL)
    for name, seen in inputs.items():
        torch.testing.assert_close(scores[name], oracle.wanda(prunable_linears(model)[name].weight, seen))


def test_what_wanda_prunes_is_what_the_next_block_sees():
    model = tiny("llama").double()
    dense, half, none = (baselines.wanda(model, GENERAL, s) for s in (None, 0.5, 0.0))
    for name in dense:
        first = ".layers.0." in name
        assert torch.equal(dense[name], half[name]) == first, name   # nothing comes before the first block
        assert torch.allclose(dense[name], none[name], rtol=1e-10), name


def test_a_sparsity_that_cannot_be_is_refused():
    for call in (lambda: baselines.wanda(tiny("llama"), GENERAL, 1.5), lambda: baselines.sparsegpt(tiny("llama"), [GENERAL], 1.5)):
        with pytest.raises(InputError, match="sparsity 1.5"):
            call()


# ---- through a run: what is stored, judged, generated with and exported


@pytest.fixture(scope="module", params=HESSIANS)
def finished(request, llama, tmp_path_factory):
    """(which text the baselines calibrated on, a run of both in float32)."""
    root = tmp_path_factory.mktemp(request.param)
    config = RunConfig(model=str(llama), domains=("legal",), methods=("wanda", "sparsegpt"), baseline_calibration=request.param, nsamples=12,
                       seqlen=16, sparsity=0.6, halves=False, general_mode="static", eval_documents=1, eval_seqlen=64, device="cpu")
    return request.param, pipeline.run(config, runs=root / "runs", cache=root / "cache")


def loaded(folder):
    with quiet_libraries():
        return load_model(str(folder), device="cpu")


def test_a_run_stores_the_masks_and_weights_of_the_papers(finished):
    which, run = finished
    model, tokenizer = loaded(run.config["model"])
    model.double()
    sets = compensation_sets(*(load_calibration(d, tokenizer, 12, 16) for d in ("general", "legal")), which)
    expected = oracle.wanda_walk(*told(model), sets, 0.6)
    assert_same_masks(run.masks("wanda", "legal"), expected.removed)
    assert run.weights("wanda", "legal") is None
    expected = oracle.sparsegpt_walk(*told(model), sets, 0.6)
    assert_same_masks(run.masks("sparsegpt", "legal"), expected.removed)
    assert_close(run.weights("sparsegpt", "legal"), expected.weights, 1e-4)


def test_sparsegpt_is_judged_generated_with_and_exported_with_the_weights_it_moved(finished, tmp_path):
    _, run = finished
    model, tokenizer = loaded(run.config["model"])
    texts, prompt = load_texts("legal", "heldout", limit=1), "The court"
    with pruned(model, run.masks("sparsegpt", "legal")):
        mask_alone = perplexity(model, tokenizer, texts, 64)
    with torch.no_grad():
        for name, weight in run.weights("sparsegpt", "legal").items():
            model.get_parameter(name).copy_(weight)
    moved = perplexity(model, tokenizer, texts, 64)
    written = [t.id for t in generate(model, tokenizer, prompt, max_new_tokens=8, stop=False)]
    assert abs(mask_alone / moved - 1) > 0.02   # else this test could not tell them apart

    metrics = run.metrics().set_index(["method", "text", "metric"]).value
    assert metrics["sparsegpt", "legal", "perplexity"] == pytest.approx(moved, rel=1e-6)

    table = evaluate(run, methods=["sparsegpt"]).set_index(["method", "task"]).value
    assert table["sparsegpt", "legal-perplexity"] == pytest.approx(moved, rel=1e-5)

    found, tokenizer = load_original(run)
    with variant(found, run, "sparsegpt", "legal"):
        assert [t.id for t in generate(found, tokenizer, prompt, max_new_tokens=8, stop=False)] == written

    model, tokenizer = loaded(export(run, "sparsegpt", "legal", tmp_path / "out"))
    assert perplexity(model, tokenizer, texts, 64) == pytest.approx(moved, rel=1e-6)
    assert [t.id for t in generate(model, tokenizer, prompt, max_new_tokens=8, stop=False)] == written

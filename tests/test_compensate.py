"""What carries the dual walk further: the sparsity of each matrix, and the kept weights' last steps, against their slow twins."""

import oracle
import pytest
import torch
from families import tiny, tiny_batches

from dpruner import RunConfig, compensate, load_calibration, load_model, run
from dpruner.compensate import allotted, compensate_walk, mixed_fisher
from dpruner.domain import fisher_diagonal
from dpruner.hessian import Hessian, dampen, factor
from dpruner.masks import lowest, sparsity_of
from dpruner.model import count_weights, fingerprint, prunable_linears
from dpruner.obs import refine, sweep

GENERAL, DOMAIN = tiny_batches(16, seed=1), tiny_batches(3, seed=2)


@pytest.fixture(scope="module")
def judged():
    """(tiny model, Fishers of both sides)."""
    model = tiny("llama").double()
    return model, [fisher_diagonal(model, batches) for batches in (DOMAIN, GENERAL)]


def output_error(W, target, H) -> float:
    return float(((W - target) @ H * (W - target)).sum())


@pytest.fixture
def swept():
    """(weights as the sweep leaves them, what they should be, H, what is kept) of a matrix of 24 outputs and 40 inputs, float64."""
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (24, 400))
    counted = Hessian(40)
    counted.add(x @ torch.randn(40, 40, generator=generator, dtype=torch.float64))
    H = dampen(counted.mean())
    new, gone = sweep(W, factor(H), lambda W1, d, columns: lowest((W1.square() / d.square()).reshape(1, -1), W1.numel() * 6 // 10).view(W1.shape), 16)
    return new, W, H, ~gone


# ---- the last steps


def test_steps_lead_to_the_least_squares_of_the_mask(swept):
    new, target, H, kept = swept
    best = oracle.least_squares(target, H, kept)
    errors = [output_error(refine(new, target, H, kept, steps), target, H) for steps in (0, 1, 2, 5, 10, 20)]
    assert errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(output_error(new, target, H))
    assert output_error(best, target, H) <= errors[-1]
    torch.testing.assert_close(refine(new, target, H, kept, 200), best, rtol=1e-6, atol=1e-6)
    gained = (errors[0] - errors[4]) / (errors[0] - output_error(best, target, H))
    assert gained > 0.8   # ten steps are most of the way


def test_what_was_removed_stays_zero_and_what_has_no_choice_stays(swept):
    new, target, H, kept = swept
    assert (refine(new, target, H, kept, 10)[~kept] == 0).all()
    everything = refine(target, target, H, torch.ones_like(kept), 10)
    assert torch.equal(everything, target)
    assert torch.equal(refine(new, target, H, torch.zeros_like(kept), 10), torch.zeros_like(new))


def test_rows_do_not_hear_of_each_other(swept):
    new, target, H, kept = swept
    together = refine(new, target, H, kept, 7)
    for i in range(len(new)):
        torch.testing.assert_close(refine(new[i:i + 1], target[i:i + 1], H, kept[i:i + 1], 7), together[i:i + 1], rtol=1e-9, atol=1e-9)


def test_in_the_walk_the_masks_of_the_first_block_are_the_same_and_its_output_is_closer(judged):
    model, fishers = judged
    before, fisher = fingerprint(model), mixed_fisher(fishers)
    plain, refined = (compensate_walk(model, [GENERAL, DOMAIN], fisher, 0.6, refined=steps) for steps in (0, 10))
    assert fingerprint(model) == before
    for name, mask in refined.masks.items():
        assert (refined.weights[name][~mask] == 0).all() and not torch.equal(refined.weights[name], plain.weights[name])
        if ".layers.0." in name:   # what comes after is chosen on other inputs
            assert torch.equal(mask, plain.masks[name])


# ---- sparsity of each matrix


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("sparsity, strength", [(0.5, 0.5), (0.6, 1.0), (0.7, 0.25), (0.5, 0.0)])
def test_sparsities_are_those_of_the_slow_twin(judged, sides, sparsity, strength):
    model, fishers = judged
    weights = {n: m.weight.detach() for n, m in prunable_linears(model).items()}
    expected = oracle.allotted(weights, fishers[:sides], sparsity, strength)
    ours = allotted(model, fishers[:sides], sparsity, strength)
    assert ours == pytest.approx(expected, abs=2e-4)   # scores that lie within the last bit of float32 of the threshold
    assert (max(ours.values()) - min(ours.values()) > 0.01) == (strength > 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.3, 0.8, 0.9, 0.96, 0.968, 0.99, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_mean_is_what_was_asked_for_and_no_matrix_is_emptied(judged, sparsity, strength):
    model, fishers = judged
    sizes = {n: m.weight.numel() for n, m in prunable_linears(model).items()}
    found = allotted(model, fishers, sparsity, strength)
    assert sum(found[n] * size for n, size in sizes.items()) / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= s <= max(0.97, sparsity) for s in found.values())


@pytest.mark.parametrize("factor", [0.01, 1, 100])   # by which the loss needs one matrix more
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_no_exchange_between_two_matrices_lowers_the_predicted_loss(judged, sparsity, factor):
    """So it is at strength 1, where counts are exact but for ties in float32 and rounding: one weight of each matrix. Half of the way is half of it."""
    model, fishers = judged
    weights = {n: m.weight.detach() for n, m in prunable_linears(model).items()}
    needed = list(weights)[3]
    fishers = [{n: f * (factor if n == needed else 1) for n, f in fisher.items()} for fisher in fishers]
    totals = [sum(float((f[n] * w**2).sum()) for n, w in weights.items()) for f in fishers]
    losses = {n: sum(f[n] * w**2 / total for f, total in zip(fishers, totals, strict=True)).flatten().sort().values for n, w in weights.items()}
    found = allotted(model, fishers, sparsity, strength=1.0)
    gone = {n: round(found[n] * loss.numel()) for n, loss in losses.items()}
    assert all(0 < s < 0.97 for s in found.values())
    dearest = max(loss[gone[n] - 2] for n, loss in losses.items() if gone[n] > 1)
    assert dearest <= min(loss[gone[n] + 1] for n, loss in losses.items() if gone[n] + 1 < len(loss))
    half = allotted(model, fishers, sparsity, strength=0.5)
    assert half == pytest.approx({n: (s + sparsity) / 2 for n, s in found.items()}, abs=1e-9)


def test_the_walk_removes_what_was_allotted(judged):
    model, fishers = judged
    wanted = allotted(model, fishers, 0.6)
    found = compensate_walk(model, [GENERAL, DOMAIN], mixed_fisher(fishers), wanted)
    for name, mask in found.masks.items():
        gone = ~mask
        assert [int(b.sum()) for b in gone.split(128, 1)] == [round(wanted[name] * b.numel()) for b in gone.split(128, 1)]
    assert sparsity_of(found.masks) == pytest.approx(0.6, abs=len(wanted) / count_weights(model)[0])


@pytest.mark.parametrize("nsamples, enough", [(5, 2), (5, 3)])
def test_a_walk_takes_the_gradients_of_every_other_sequence_where_that_is_enough(nsamples, enough, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(compensate, "FISHER_ENOUGH", enough)
    config = RunConfig(model=str(llama), domains=("legal",), compensate="walk", nsamples=nsamples, seqlen=16, evaluate=False, sides=False, halves=False,
                       device="cpu")
    made = run(config, runs=tmp_path / "runs", cache=tmp_path / "cache").weights("dpruner", "legal")
    model, tokenizer = load_model(str(llama), device="cpu")
    legal, general = (load_calibration(name, tokenizer, nsamples, 16, 0) for name in ("legal", "general"))
    fishers = [fisher_diagonal(model, [batches[0], batches[2], batches[4]] if enough == 2 else batches) for batches in (legal, general)]
    expected = compensate_walk(model, [general, legal], mixed_fisher(fishers), allotted(model, fishers, 0.5), refined=config.refine).weights
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())

"""Every formula on every architecture, against the slow twin in `oracle`."""

import oracle
import pytest
import torch
from families import FAMILIES, MOE, tiny, tiny_batches

from dpruner import baselines
from dpruner.compensate import compensate_after, compensate_walk, compensation_sets, mixed_fisher
from dpruner.domain import FineTune, domain_importance, fisher_diagonal
from dpruner.errors import InputError
from dpruner.formulas import FORMULAS, balanced
from dpruner.general import general_importance
from dpruner.masks import make_masks
from dpruner.model import decoder_blocks, fingerprint, prunable_linears, skipped_weights, stored_transposed

GENERAL = tiny_batches(16, seed=1)   # more tokens than any linear has inputs: a Hessian of full rank
DOMAIN = tiny_batches(3, seed=2)
every_family = pytest.mark.parametrize("family", FAMILIES)


EXACT = {"dtype": torch.float64}


class Parts:
    """A tiny model, and what the slow twin wants to be told about it."""

    def __init__(self, family, dtype=torch.float64):
        self.model = tiny(family).to(dtype)   # formulas are compared in float64, where no two scores tie by rounding
        self.blocks = decoder_blocks(self.model)[1]
        self.linears = prunable_linears(self.model)
        self.told = (self.model, self.blocks, self.linears)


@pytest.fixture(params=FAMILIES)
def parts(request):
    """Parts of every family in turn; its weights and what asks for gradients must be as before after the test."""
    parts = Parts(request.param)
    before = fingerprint(parts.model), [p.requires_grad for p in parts.model.parameters()]
    yield parts
    assert (fingerprint(parts.model), [p.requires_grad for p in parts.model.parameters()]) == before
    assert all(p.grad is None for p in parts.model.parameters())
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in parts.model.modules())


@pytest.fixture
def llama():
    return Parts("llama")


def assert_close(ours, theirs, tolerance=1e-8):
    """Same names and shapes, and every value equal to `tolerance` of its own and its matrix's mean size."""
    assert set(ours) == set(theirs)
    for name, mine in ours.items():
        expected = theirs[name].double()
        assert mine.shape == expected.shape
        worst = ((mine.double() - expected).abs() / (expected.abs().mean() + expected.abs())).max()
        assert worst <= tolerance, f"{name}: {worst:.2g}"


def assert_same_masks(kept, removed):
    assert set(kept) == set(removed)
    for name in kept:
        assert torch.equal(kept[name], ~removed[name]), name


def test_every_linear_inside_the_blocks_is_found_and_nothing_else(parts):
    inside = {id(m) for block in parts.blocks for m in block.modules()}
    assert parts.linears and all(id(m) in inside for m in parts.linears.values())
    matrices = {n for n, p in parts.model.named_parameters() if p.ndim == 2 and ".bias" not in n and any(
        p is q for b in parts.blocks for q in b.parameters())}
    assert set(parts.linears) == matrices
    assert not skipped_weights(parts.model)


@pytest.mark.parametrize("mode", ["sequential", "static"])
def test_general_importance_is_that_of_the_slow_twin(parts, mode):
    expected = oracle.general_importance(*parts.told, GENERAL, sparsity=0.52, mode=mode, **EXACT)
    assert_close(general_importance(parts.model, GENERAL, sparsity=0.52, mode=mode), expected)


@pytest.mark.parametrize("formula", FORMULAS)
def test_domain_scores_are_those_of_the_slow_twin(parts, formula):
    G = general_importance(parts.model, GENERAL, mode="static")
    # λ α² large enough for the penalty of "taylor" and "release" to be seen at all
    settings = {"formula": formula, "lam": 0.7, "alpha": 3.0}
    expected = oracle.domain_scores(*parts.told[::2], DOMAIN, G, **settings)
    ours = domain_importance(parts.model, DOMAIN, G, **settings)
    assert_close(ours.dual, expected.dual)
    assert_close(ours.domain, expected.domain)
    assert ours.general == G
    assert any(not torch.equal(ours.dual[n], ours.domain[n]) for n in ours.dual)
    assert len(ours.losses) == len(DOMAIN)


def test_fisher_is_that_of_the_slow_twin(parts):
    assert_close(fisher_diagonal(parts.model, DOMAIN), oracle.fisher(*parts.told[::2], DOMAIN))


def test_sparsegpt_is_that_of_the_slow_twin(parts):
    expected = oracle.general_importance(*parts.told, GENERAL, sparsity=0.6, details=True, **EXACT)
    ours = baselines.sparsegpt(parts.model, [GENERAL], 0.6)
    assert_same_masks(ours.masks, expected.removed)
    assert_close(ours.weights, expected.weights)


@pytest.mark.parametrize("kind", ["general", "domain", "mix"])
def test_compensation_after_is_that_of_the_slow_twin(parts, kind):
    masks = make_masks(baselines.magnitude(parts.model), 0.5)
    expected = oracle.compensate_after(*parts.told, masks, GENERAL, DOMAIN, which=kind, **EXACT)
    ours = compensate_after(parts.model, compensation_sets(GENERAL, DOMAIN, kind), masks)
    assert_same_masks(ours.masks, expected.removed)
    assert all(torch.equal(ours.masks[n], masks[n]) for n in masks)
    assert_close(ours.weights, expected.weights)


@pytest.mark.parametrize("which", ["domain", "both"])
def test_the_dual_walk_is_that_of_the_slow_twin(parts, which):
    of_domain, of_general = (oracle.fisher(*parts.told[::2], b) for b in (DOMAIN, GENERAL))
    twin = oracle.fisher_both(of_domain, of_general) if which == "both" else of_domain
    fishers = [fisher_diagonal(parts.model, b) for b in ((DOMAIN, GENERAL) if which == "both" else (DOMAIN,))]
    fisher = mixed_fisher(fishers) if which == "both" else fishers[0]
    expected = oracle.dual_walk(*parts.told, GENERAL, DOMAIN, twin, 0.5, lam=0.8, **EXACT)
    ours = compensate_walk(parts.model, [GENERAL, DOMAIN], fisher, 0.5, 0.8)
    assert_same_masks(ours.masks, expected.removed)
    assert_close(ours.weights, expected.weights)


def test_wanda_is_that_of_the_slow_twin(parts):
    expected = {}
    for block in parts.blocks:
        inside = oracle.linears_of(block, parts.linears)
        inputs = oracle.linear_inputs(parts.model, block, inside, GENERAL)
        for name, module in inside.items():
            expected[name] = oracle.as_stored(oracle.wanda(oracle.as_matrix(module.weight, module), inputs[name]), module)
    assert_close(baselines.wanda(parts.model, GENERAL), expected)


@every_family
def test_general_importance_is_the_same_bits_however_it_is_batched(family):
    model = tiny(family)
    one, eight = (general_importance(model, batches) for batches in (GENERAL, [torch.cat(GENERAL[:8]), torch.cat(GENERAL[8:])]))
    assert all(torch.equal(one[n], eight[n]) for n in one)


def test_the_same_call_gives_the_same_bits(llama):
    def scores():
        G = general_importance(llama.model, GENERAL)
        return G, domain_importance(llama.model, DOMAIN, G).dual

    for first, second in zip(scores(), scores(), strict=True):
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_balanced_means_over_the_model_are_those_of_the_slow_twin(llama):
    G = general_importance(llama.model, GENERAL, mode="static")
    expected = oracle.domain_scores(*llama.told[::2], DOMAIN, G, lam=2.0, means="model")
    ours = domain_importance(llama.model, DOMAIN, G, lam=2.0, means="model")
    assert_close(ours.dual, expected.dual)
    assert_close(ours.domain, expected.domain)


def test_a_slider_for_lambda_needs_no_second_pass(llama):
    G = general_importance(llama.model, GENERAL, mode="static")
    one, three = (domain_importance(llama.model, DOMAIN, G, lam=lam) for lam in (1.0, 3.0))
    assert_close(balanced(one.domain, G, 3.0), three.dual, tolerance=1e-5)
    assert_close(balanced(one.domain, G, 0.0), one.domain, tolerance=1e-5)


def test_lambda_has_the_default_of_its_formula(llama):
    G = general_importance(llama.model, GENERAL, mode="static")
    for formula, lam in (("balanced", 1.0), ("taylor", 1.0), ("release", 0.1)):
        plain, named = (domain_importance(llama.model, DOMAIN, G, formula, value).dual for value in (None, lam))
        assert all(torch.equal(plain[n], named[n]) for n in plain)


def test_a_domain_pass_is_one_forward_and_one_backward_per_batch(llama):
    G = general_importance(llama.model, GENERAL, mode="static")
    calls = {"forward": 0, "backward": 0}
    head = llama.model.lm_head
    handles = [head.register_forward_hook(lambda *_: calls.update(forward=calls["forward"] + 1)),
               head.register_full_backward_hook(lambda *_: calls.update(backward=calls["backward"] + 1))]
    domain_importance(llama.model, DOMAIN, G)
    for handle in handles:
        handle.remove()
    assert calls == {"forward": len(DOMAIN), "backward": len(DOMAIN)}


def test_never_more_than_one_gradient_is_alive(llama):
    from dpruner.domain import stream_gradients
    alive = []
    stream_gradients(llama.model, DOMAIN, lambda name, g, part: alive.append(sum(p.grad is not None for p in llama.model.parameters())), stage="test")
    assert len(alive) == len(DOMAIN) * len(llama.linears)
    assert max(alive) == 0


def slow_fine_tuning(parts, batches, tune):
    """Plain SGD with norm clipping and the schedule written out; yields (gradients, weights) of every step before its update."""
    parameters = dict(parts.model.named_parameters())
    original = {n: p.detach().clone() for n, p in parameters.items()}
    steps = tune.epochs * len(batches)
    rise = max(1, round(tune.warmup * steps))
    for step in range(steps):
        logits = parts.model(input_ids=batches[step % len(batches)]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batches[step % len(batches)][:, 1:].flatten())
        grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        yield {n: grads[n] for n in parts.linears}, {n: parameters[n].detach().clone() for n in parts.linears}
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        rate = tune.lr * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))
        for n, p in parameters.items():
            p.data -= rate * min(1.0, tune.clip / (norm.item() + 1e-6)) * grads[n]
    for n, p in parameters.items():
        p.data.copy_(original[n])


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_fine_tuning_while_scoring_is_plain_sgd_with_clipping_and_leaves_the_weights(clip):
    parts = Parts("qwen2")   # tied embeddings: their gradient is complete only at the very end of backward
    for p in parts.model.parameters():
        p.requires_grad_(True)
    before = fingerprint(parts.model)
    tune = FineTune(lr=0.05, epochs=2, batch_size=2, clip=clip, seqlen=12)
    batches = [torch.cat(DOMAIN[:2])[:, :12], DOMAIN[2][:, :12]]
    taken = list(slow_fine_tuning(parts, batches, tune))
    assert fingerprint(parts.model) == before
    G = general_importance(parts.model, GENERAL, mode="static")

    ours = domain_importance(parts.model, DOMAIN, G, formula="release", lam=0.0, finetune=tune)
    expected = {n: sum(((g[n] * 2**16 * w[n]) + (g[n] * 2**16 * w[n]).square() / 2000 + w[n]**3).abs() for g, w in taken) for n in parts.linears}
    assert_close(ours.domain, expected, tolerance=1e-3)

    ours = domain_importance(parts.model, DOMAIN, G, formula="balanced", lam=0.0, finetune=tune)
    fisher = {n: sum(g[n].square() for g, _ in taken) * parts.linears[n].weight.detach().square() for n in parts.linears}
    assert_close(ours.dual, {n: f / f.mean() for n, f in fisher.items()}, tolerance=1e-3)
    assert fingerprint(parts.model) == before
    assert len(ours.losses) == 4


def test_the_learning_rate_rises_then_falls():
    tune = FineTune(lr=1.0, warmup=0.1)
    rates = [tune.rate(step, 20) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(1 / 18)
    assert all(a >= b for a, b in zip(rates[1:], rates[2:], strict=False))


@pytest.mark.parametrize("family", MOE)
def test_mixtures_of_experts_prune_what_is_linear_and_name_the_rest(family):
    parts = Parts(family, torch.float32)   # the grouped products of the experts know no float64
    skipped = skipped_weights(parts.model)
    assert any("expert" in name for name in skipped)
    assert not set(skipped) & set(parts.linears)
    G = general_importance(parts.model, GENERAL)
    assert_close(G, oracle.general_importance(*parts.told, GENERAL), tolerance=1e-4)
    assert_close(domain_importance(parts.model, DOMAIN, G).dual, oracle.domain_scores(*parts.told[::2], DOMAIN, G).dual, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_half_precision_gives_nearly_the_scores_of_float32(family, dtype):
    exact, half = tiny(family), tiny(family).to(dtype)
    scores = []
    for model in (exact, half):
        G = general_importance(model, GENERAL, mode="static")
        S = domain_importance(model, DOMAIN, G)
        scores.append(S)
        assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in (*G.values(), *S.dual.values()))
    kept = [make_masks(s.dual, 0.5) for s in scores]
    agree = [float((kept[0][n] == kept[1][n]).float().mean()) for n in kept[0]]
    assert min(agree) > 0.9


def test_dead_inputs_score_nothing(llama):
    block = llama.blocks[1]
    block.post_attention_layernorm.weight.data[[3, 7]] = 0   # two inputs of gate and up are always zero
    for mode in ("sequential", "static"):
        G = general_importance(llama.model, GENERAL, mode=mode)
        gate = G["model.layers.1.mlp.gate_proj.weight"]
        assert gate[:, [3, 7]].eq(0).all() and gate[:, [2, 4]].gt(0).all()
        assert_close(G, oracle.general_importance(*llama.told, GENERAL, mode=mode, **EXACT))


def test_a_raising_walk_leaves_the_weights(llama):
    before = fingerprint(llama.model)

    def stop(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        general_importance(llama.model, GENERAL, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        domain_importance(llama.model, DOMAIN, general_importance(llama.model, GENERAL), finetune=FineTune(batch_size=1),
                          progress=stop)
    assert fingerprint(llama.model) == before
    assert not any("forward" in m.__dict__ for m in llama.model.modules())


def test_transposed_weights_are_known_by_their_scores():
    model = tiny("gpt2")
    G = general_importance(model, GENERAL, mode="static")
    assert G.transposed == {n for n, m in prunable_linears(model).items() if stored_transposed(m)} == set(G)


@pytest.mark.parametrize(("change", "said"), [
    ({"formula": "newton"}, "formula"), ({"lam": -1.0}, "λ"), ({"lam": float("nan")}, "λ"), ({"lam": 1e13}, "λ"), ({"G": {}}, "does not fit"), ({"batches": []}, "empty"),
    ({"batches": [torch.zeros(1, 200, dtype=torch.long)]}, "at most 128")])
def test_bad_input_to_a_domain_pass_is_one_sentence(llama, change, said):
    arguments = {"batches": DOMAIN, "G": general_importance(llama.model, GENERAL, mode="static"), **change}
    with pytest.raises(InputError, match=said):
        domain_importance(llama.model, **arguments)


@pytest.mark.parametrize(("change", "said"), [
    ({"sparsity": 1.5}, "sparsity"), ({"mode": "fast"}, "mode"), ({"batches": []}, "empty"),
    ({"batches": [torch.zeros(1, 200, dtype=torch.long)]}, "at most 128")])
def test_bad_input_to_general_importance_is_one_sentence(llama, change, said):
    with pytest.raises(InputError, match=said):
        general_importance(llama.model, **{"batches": GENERAL, **change})


def test_a_loss_that_is_no_number_is_refused(llama):
    llama.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="loss of calibration batch 1"):
        fisher_diagonal(llama.model, DOMAIN)
    assert all(p.grad is None for p in llama.model.parameters())


@pytest.mark.parametrize("pruned_by", [general_importance, lambda model, batches: baselines.sparsegpt(model, [batches], 0.5), baselines.wanda])
def test_text_on_which_the_model_overflows_is_refused(llama, pruned_by):
    llama.blocks[0].mlp.up_proj.weight.data.mul_(3e4)
    with pytest.raises(InputError, match="What flows into .* is not finite"):
        pruned_by(llama.model.half(), GENERAL)


@pytest.mark.parametrize(("length", "said"), [(1, "no next token"), (0, "no next token")])
def test_sequences_without_a_next_token_are_refused(llama, length, said):
    with pytest.raises(InputError, match=said):
        fisher_diagonal(llama.model, [*DOMAIN, torch.zeros(1, length, dtype=torch.long)])


def test_a_walk_refuses_sequences_of_nothing(llama):
    with pytest.raises(InputError, match="Sequences of 0 tokens"):
        general_importance(llama.model, [torch.zeros(1, 0, dtype=torch.long)])


def test_a_weight_that_two_blocks_share_belongs_to_the_first(llama):
    first, second = (block.mlp.up_proj for block in llama.blocks[:2])
    second.weight = first.weight
    G = general_importance(llama.model, GENERAL)
    S = domain_importance(llama.model, DOMAIN, G)
    kept = baselines.sparsegpt(llama.model, [GENERAL], 0.5).masks
    names = set(llama.linears) - {"model.layers.1.mlp.up_proj.weight"}
    assert set(G) == set(S.dual) == set(kept) == set(prunable_linears(llama.model)) == names


def test_of_a_linear_that_no_text_reaches_all_inputs_count_alike():
    """Some models take the weight of a linear without calling it (Mamba), and of experts some may get no token."""
    parts = Parts("llama")
    name, spare = "model.layers.1.mlp.spare.weight", torch.nn.Linear(36, 20, dtype=torch.float64)
    parts.blocks[1].mlp.spare = spare
    for mode in ("sequential", "static"):
        G = general_importance(parts.model, GENERAL, sparsity=0, mode=mode)[name]
        torch.testing.assert_close(G / G.mean(), spare.weight.square() / spare.weight.square().mean())
    weights = baselines.wanda(parts.model, GENERAL)[name]
    torch.testing.assert_close(weights / weights.mean(), spare.weight.abs() / spare.weight.abs().mean())
    found = baselines.sparsegpt(parts.model, [GENERAL, DOMAIN], 0.5)
    assert torch.equal(found.weights[name], spare.weight * found.masks[name])
    assert spare.weight[found.masks[name]].abs().min() > spare.weight[~found.masks[name]].abs().max()
    assert all(0.4 < mask.float().mean() < 0.6 for mask in found.masks.values())

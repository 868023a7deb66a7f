"""Pure tensor work against brute force: Hessian, factor, sweep, masks, ranks, packing."""

import numpy as np
import oracle
import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dpruner.baselines import magnitude, random
from dpruner.errors import InputError
from dpruner.general import release_cut, sweep_group
from dpruner.hessian import Hessian, dampen, dead_inputs, factor, mix
from dpruner.masks import (Scores, jaccard, jaccard_floor, kth_lowest, lowest, make_masks, pack, pruned, rank_bins, sparsity_of, unpack)
from dpruner.model import fingerprint, prunable_linears
from dpruner.obs import _eliminate_by_columns, _eliminate_by_solving, eliminate, sweep


def random_hessian(columns, seed=0, tokens=None):
    x = torch.randn(tokens or 4 * columns, columns, generator=torch.Generator().manual_seed(seed))
    x = x @ torch.randn(columns, columns, generator=torch.Generator().manual_seed(seed + 1)) / columns**0.5
    H = Hessian(columns)
    H.add(x)
    return H.mean()


def test_hessian_is_a_sum_and_a_count_of_any_batches():
    x = torch.randn(3, 5, 7).bfloat16().float()
    H = Hessian(7)
    for part in (x[:1], x[1:].bfloat16()):
        H.add(part)
    assert torch.allclose(H.mean(), oracle.hessian([x]), atol=1e-6)
    assert H.count == 15


def test_factor_is_the_upper_cholesky_factor_of_the_inverse():
    for columns in (1, 5, 130):
        H = dampen(random_hessian(columns, tokens=max(2, columns // 2)))   # fewer tokens than columns: only the dampening keeps it regular
        U = factor(H)
        assert torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
        assert torch.allclose(U.double(), oracle.upper_factor(H), rtol=1e-5, atol=1e-6)


def test_dampening_counts_dead_inputs_as_one():
    H = torch.diag(torch.tensor([4.0, 0.0, 1.0]))
    assert dead_inputs(H).tolist() == [False, True, False]
    assert torch.allclose(dampen(H), torch.diag(torch.tensor([4.02, 1.02, 1.02])))
    assert H[1, 1] == 0


def test_mixing_gives_each_calibration_the_same_say():
    a, b = random_hessian(6, 1), random_hessian(6, 2)
    assert torch.allclose(mix([a, b]), mix([1000 * a, b]), rtol=1e-4)
    assert torch.allclose(mix([a, b]).double(), oracle.mixed_hessian(a, b).double(), rtol=1e-5)


@pytest.mark.parametrize("columns", [3, 16, 37, 128, 150])
@pytest.mark.parametrize("base", [_eliminate_by_columns, _eliminate_by_solving])
def test_both_eliminations_equal_least_squares_by_brute_force(columns, base):
    generator = torch.Generator().manual_seed(columns)
    H = dampen(random_hessian(columns, columns))
    U = factor(H)
    W = torch.randn(4, columns, generator=generator)
    removed = torch.rand(4, columns, generator=generator) < 0.5
    T, E = W.t().contiguous(), torch.zeros(columns, 4)
    eliminate(T, removed.t() / U.diagonal()[:, None], U, E, base)
    expected = torch.stack([oracle.brute_force_columns(w, H, r) for w, r in zip(W, removed, strict=True)])
    assert torch.allclose(T.t().masked_fill(removed, 0).double(), expected, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 40), blocksize=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_the_sweep_equals_the_column_loop_whatever_the_blocks(rows, columns, blocksize, seed):
    generator = torch.Generator().manual_seed(seed)
    U = factor(dampen(random_hessian(columns, seed)))
    W = torch.randn(rows, columns, generator=generator)
    gone = torch.rand(rows, columns, generator=generator) < 0.6
    before = W.clone()
    new, removed = sweep(W, U, lambda W1, d, at: gone[:, at], blocksize)
    expected, _, _ = oracle.prune_columns(W, U.double(), lambda W1, d, start: (None, gone[:, start:start + W1.shape[1]]), blocksize)
    assert torch.equal(W, before) and torch.equal(removed, gone) and new[gone].eq(0).all()
    assert torch.allclose(new.double(), expected, atol=1e-3 * float(expected.abs().max() + 1))


def test_stacked_linears_are_swept_as_if_alone():
    H = random_hessian(30)
    rows = {"a": torch.randn(5, 30), "b": torch.randn(9, 30)}
    together = sweep_group(rows, H, lambda name, W1, d, at: release_cut(W1.square() / d.square(), 0.5))
    for name, W in rows.items():
        alone = sweep_group({name: W}, H, lambda name, W1, d, at: release_cut(W1.square() / d.square(), 0.5))
        assert torch.equal(alone[1][name], together[1][name])
        assert torch.allclose(alone[0][name], together[0][name], atol=1e-5)


def test_the_release_cut_counts_from_zero():
    scores = torch.arange(10.0).view(2, 5)
    assert release_cut(scores, 0.5).sum() == 6     # sorted[5] = 5, and everything up to it
    assert release_cut(scores, 0.0).sum() == 0
    assert release_cut(scores, 1.0).all()
    assert release_cut(torch.ones(2, 5), 0.1).all()   # ties go together


# ---- masks

GRANULARITIES = ["matrix", "row", "block", "global", "2:4", "1:3", "4:8"]


def ties(rows, columns, seed):
    """Scores of few distinct values: nearly every threshold falls on a tie."""
    return torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 5), sparsity=st.floats(0, 1), seed=st.integers(0, 10**6),
       granularity=st.sampled_from(GRANULARITIES), transposed=st.booleans())
def test_masks_are_those_of_plain_sorting_ties_and_all(rows, columns, sparsity, seed, granularity, transposed):
    columns *= 24   # what every n:m here divides
    scores = {"a": ties(rows, columns, seed), "b": ties(rows + 1, columns, seed + 1)}
    if granularity == "global":
        expected = oracle.global_masks(scores, sparsity)
    else:
        groups = [list(map(int, part)) for part in np.array_split(np.arange(columns), max(1, -(-columns // 128)))]
        expected = {n: oracle.mask(s, sparsity, granularity, groups) for n, s in scores.items()}
    stored = {n: s.t().contiguous() if transposed else s for n, s in scores.items()}
    ours = make_masks(Scores(stored, stored if transposed else ()), None if ":" in granularity else sparsity, granularity)
    for name, mask in expected.items():
        assert torch.equal(ours[name].t() if transposed else ours[name], mask)


@pytest.mark.parametrize("shape", [(6, 256), (5, 384), (7, 320), (3, 864)])
def test_blocks_are_128_columns_or_as_many_as_the_hidden_size_has(shape):
    hidden = 320 if shape[1] in (320, 864) else 256
    scores = {"x": torch.rand(shape), **{f"h{i}": torch.rand(4, hidden) for i in range(3)}}
    kept = make_masks(scores, 0.3, "block")["x"]
    widths = [128] * (shape[1] // 128) if shape[1] % 128 == 0 else [len(p) for p in np.array_split(np.arange(shape[1]), 3)]
    for part in kept.split(widths, dim=1):
        assert (~part).sum() == round(0.3 * part.numel())


def test_what_n_of_m_leaves_over_is_a_group_of_its_own():
    kept = make_masks({"x": torch.rand(3, 10)}, granularity="2:4")["x"]
    assert kept.sum(1).tolist() == [5, 5, 5]


@pytest.mark.parametrize("granularity", ["matrix", "row", "block", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_or_everything_can_go(granularity, sparsity):
    masks = make_masks({"x": torch.rand(4, 9), "y": torch.zeros(2, 9)}, sparsity, granularity)
    assert sparsity_of(masks) == sparsity


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.data())
def test_counting_finds_the_kth_lowest_of_any_floats(values, data):
    k = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    key, below = kth_lowest([tensor[:cut], tensor[cut:]], k)
    wanted = tensor.sort().values[k - 1]
    assert below == int((tensor < wanted).sum())
    assert key == kth_lowest([wanted.view(1)], 1)[0]


def test_lowest_takes_exactly_that_many_the_first_of_equals():
    chosen = lowest(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("values", [np.random.default_rng(0).normal(size=40_000), np.random.default_rng(1).normal(size=40_000).round(1),
                                    np.linspace(-1, 1, 20_001), np.zeros(20_000), np.random.default_rng(2).normal(size=30_000) ** 9,
                                    np.where(np.arange(20_000) % 27, 0, 1e9)], ids=["normal", "ties", "in order", "equal", "long tails", "misleading"])
@pytest.mark.parametrize("share", [0.0001, 0.03, 0.5, 0.97, 1])
def test_of_many_the_lowest_are_those_of_sorting(values, share):
    """A sample chooses where to look; also one that misleads: every value that it sees is 1e9, or there is one value only."""
    values, count = values.astype(np.float32), max(1, round(share * len(values)))
    expected = np.zeros(len(values), dtype=bool)
    expected[values.argsort(kind="stable")[:count]] = True
    assert np.array_equal(lowest(torch.from_numpy(values)[None], count)[0].numpy(), expected)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"sparsity": 1.5}, "from 0 to 1"), ({"sparsity": -0.1}, "from 0 to 1"), ({"sparsity": float("nan")}, "from 0 to 1"), ({}, "No sparsity"),
    ({"sparsity": 0.5, "granularity": "column"}, "granularity"), ({"sparsity": 0.5, "granularity": "4:2"}, "granularity"),
    ({"sparsity": 0.3, "granularity": "2:4"}, "contradict"), ({"granularity": "0:4"}, "granularity")])
def test_bad_masks_are_one_sentence(arguments, said):
    with pytest.raises(InputError, match=said):
        make_masks({"x": torch.rand(4, 8)}, **arguments)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="x cannot be ranked"):
        make_masks({"x": torch.tensor([[1.0, float("nan")]])}, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pruned_model_comes_back_bit_for_bit_also_when_the_body_raises(family):
    model = tiny(family)
    weight = next(iter(prunable_linears(model).values())).weight
    weight.data.view(-1)[:3] = torch.tensor([-0.0, 1e-42, 3e38])   # a sign and a subnormal that arithmetic would lose
    before = fingerprint(model)
    masks = make_masks(magnitude(model), 0.7)
    with pruned(model, masks):
        for name, m in prunable_linears(model).items():
            assert m.weight[~masks[name]].eq(0).all() and torch.equal(m.weight.ne(0), masks[name])
    assert fingerprint(model) == before
    moved = {n: m.weight + 1 for n, m in prunable_linears(model).items()}
    with pytest.raises(ZeroDivisionError), pruned(model, masks, moved):
        for name, m in prunable_linears(model).items():
            assert torch.equal(m.weight, moved[name] * masks[name])
        raise ZeroDivisionError
    assert fingerprint(model) == before


def test_masks_of_another_model_are_refused_and_nothing_changes():
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(InputError, match="do not fit"), pruned(model, {"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.bool)}):
        pass
    assert fingerprint(model) == before


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_packed_masks_are_numpys_bits_and_come_back(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpack(pack(mask), mask.shape), mask)
    for r in range(rows):
        byte = sum(int(mask[r, i]) << i for i in range(min(8, columns)))
        assert pack(mask)[r, 0] == byte


@pytest.mark.parametrize("transposed", [False, True])
def test_rank_bins_are_the_masks_of_every_sparsity(transposed):
    scores = ties(16, 48, 3).t().contiguous() if transposed else ties(16, 48, 3)
    bins = rank_bins(scores, transposed)
    assert bins.dtype == torch.uint8 and bins.shape == scores.shape
    for of_256 in (0, 1, 64, 128, 250, 256):
        kept = make_masks(Scores({"x": scores}, ["x"] if transposed else ()), of_256 / 256)["x"]
        assert torch.equal(bins.int() >= of_256, kept)


def test_jaccard_and_its_floor():
    a, b = ({"x": torch.tensor(bits, dtype=torch.bool)} for bits in ([[1, 1, 0, 0]], [[1, 0, 1, 0]]))
    assert jaccard(a, b) == pytest.approx(1 / 3) and jaccard(a, a) == 1
    assert jaccard_floor(a, b) == pytest.approx(1 / 3)
    model = tiny("llama")
    one, other = (make_masks(random(model, 0, salt), 0.3) for salt in ("a", "b"))
    assert jaccard(one, other) == pytest.approx(jaccard_floor(one, other), abs=0.01)
    assert jaccard_floor(one, other) == pytest.approx(0.7 / 1.3, abs=1e-3)


def test_random_scores_depend_on_seed_salt_and_name_alone():
    model = tiny("llama")
    a, again, other = random(model, 1, "a"), random(model, 1, "a"), random(model, 2, "a")
    assert all(torch.equal(a[n], again[n]) and not torch.equal(a[n], other[n]) for n in a)

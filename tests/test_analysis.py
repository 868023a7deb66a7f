"""Numbers and figures of the analysis against brute force on small masks and ranks."""

import ast
import base64
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import scipy.stats
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import alike, chart, comparisons, figures, generation, glance, matrices, overlap, similarity, sparsity, tiles
from dpruner.errors import InputError
from dpruner.evaluate import bootstrap_ratio
from dpruner.masks import jaccard, jaccard_floor, make_masks, rank_bins, ranked
from dpruner.model import heads_of, transposed_names
from dpruner.stats import matrix_stats
from dpruner.store import write_masks, write_tensors

LIMIT = 2_000_000   # bytes of JSON a figure may have
BLOCKS, MODULES = 3, ("attn.q", "attn.o", "mlp.up")


def names(blocks=BLOCKS, modules=MODULES):
    return [f"model.layers.{b}.{m}.weight" for b in range(blocks) for m in modules]


def random_ranks(shape, seed=0):
    """Ranks of random scores, spread over all bins as evenly as they go."""
    return rank_bins(torch.rand(shape, generator=torch.Generator().manual_seed(seed))).numpy()


def resembling(ranks, seed, noise=0.3):
    """Ranks of scores that resemble others."""
    generator = torch.Generator().manual_seed(seed)
    return rank_bins(torch.from_numpy(ranks).float() / 256 + noise * torch.rand(ranks.shape, generator=generator)).numpy()


def random_masks(seed=0, share=0.5, shape=(6, 13), blocks=BLOCKS):
    """Masks of a little model whose rows are no whole bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(shape, generator=generator) < share for n in names(blocks)}


@pytest.fixture
def mask_files(tmp_path):
    """{label: (file, masks)} of three masks, two of them alike."""
    found = {}
    for i, label in enumerate("abc"):
        masks = random_masks(i)
        if label == "c":
            generator = torch.Generator().manual_seed(9)
            masks = {n: m ^ (torch.rand(m.shape, generator=generator) < 0.1) for n, m in found["a"][1].items()}
        write_masks(tmp_path / f"{label}.safetensors", masks)
        found[label] = tmp_path / f"{label}.safetensors", masks
    return found


# ---- the layers of the project


@pytest.mark.parametrize("path", sorted(Path(sparsity.__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_analysis_knows_nothing_of_pages(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {i for i in imported if i.split(".")[0] in ("streamlit", "app", "tests")}


# ---- names, groups, files


def test_a_name_gives_its_block_and_its_module():
    assert matrices.split_name("model.layers.3.mlp.up_proj.weight") == (3, "mlp.up_proj")
    assert matrices.split_name("transformer.h.0.attn.c_attn.weight") == (0, "attn.c_attn")
    assert matrices.split_name("model.layers.12.moe.experts.7.w1.weight") == (12, "moe.experts.7.w1")
    assert matrices.split_name("h.1.fc") == (1, "fc")
    for name in ("lm_head.weight", "layers.3", "layers.3.weight", ""):
        with pytest.raises(InputError):
            matrices.split_name(name)


def test_blocks_stand_in_the_order_of_their_numbers_and_sums_add_up():
    found = ["l.10.b.weight", "l.2.b.weight", "l.2.a.weight", "l.10.a.weight"]
    assert matrices.in_order(found) == ["l.2.b.weight", "l.2.a.weight", "l.10.b.weight", "l.10.a.weight"]
    values = {n: np.array([2**k, 1]) for k, n in enumerate(found)}
    assert {g: v.tolist() for g, v in matrices.summed(values, "block").items()} == {2: [6, 2], 10: [9, 2]}
    assert {g: v.tolist() for g, v in matrices.summed(values, "module").items()} == {"b": [3, 2], "a": [12, 2]}
    assert {g: v.tolist() for g, v in matrices.summed(values, "model").items()} == {"model": [15, 4]}
    assert list(matrices.summed(values, "matrix")) == matrices.in_order(found)
    with pytest.raises(InputError):
        matrices.summed(values, "head")


def test_a_table_of_matrices_becomes_layers_by_modules():
    table = matrices.places(["l.1.b.weight", "l.0.a.weight", "l.0.b.weight"]).assign(value=[1.0, 2.0, 3.0])
    wide = matrices.layers_by_modules(table, "value")
    assert list(wide.index) == [0, 1] and list(wide.columns) == ["b", "a"]
    assert wide.loc[1, "b"] == 1 and wide.loc[0, "a"] == 2 and math.isnan(wide.loc[1, "a"])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), data=st.data(), transposed=st.booleans())
def test_a_rectangle_of_a_file_is_that_of_the_whole(tmp_path_factory, rows, columns, data, transposed):
    folder, name = tmp_path_factory.mktemp("tiles"), names()[0]
    stored = (columns, rows) if transposed else (rows, columns)
    mask = torch.rand(stored, generator=torch.Generator().manual_seed(rows)) < 0.5
    ranks = torch.from_numpy(random_ranks(stored))
    write_masks(folder / "m.safetensors", {name: mask})
    write_tensors(folder / "r.safetensors", {name: ranks})
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    r, c = slice(top, data.draw(st.integers(top + 1, rows))), slice(left, data.draw(st.integers(left + 1, columns)))
    whole_mask, whole_ranks = (x.numpy().T if transposed else x.numpy() for x in (mask, ranks))
    assert np.array_equal(matrices.read_mask(folder / "m.safetensors", name, r, c, transposed), whole_mask[r, c])
    assert np.array_equal(matrices.read_ranks(folder / "r.safetensors", name, r, c, transposed), whole_ranks[r, c])


def test_files_that_cannot_be_read_or_compared_are_refused_in_a_sentence(tmp_path, mask_files):
    path, _ = mask_files["a"]
    write_tensors(tmp_path / "ranks.safetensors", {names()[0]: torch.zeros(2, 2, dtype=torch.uint8)})
    write_tensors(tmp_path / "floats.safetensors", {names()[0]: torch.zeros(2, 2)})
    write_tensors(tmp_path / "short.safetensors", {names()[0]: torch.zeros(2, 1, dtype=torch.uint8)},
                  {"shapes": json.dumps({names()[0]: [2, 9]})})
    write_masks(tmp_path / "other.safetensors", random_masks(blocks=2))
    (tmp_path / "noise.safetensors").write_bytes(b"not a tensor in sight")
    for call in (lambda: similarity.count_masks({"a": tmp_path / "ranks.safetensors"}),
                 lambda: similarity.count_masks({"a": tmp_path / "short.safetensors"}),
                 lambda: similarity.count_masks({"a": path, "b": tmp_path / "other.safetensors"}),
                 lambda: similarity.count_masks({"a": tmp_path / "noise.safetensors"}),
                 lambda: similarity.count_masks({"a": tmp_path / "missing.safetensors"}),
                 lambda: similarity.count_ranks({"a": tmp_path / "floats.safetensors"}, 0.5),
                 lambda: list(matrices.stream([path, tmp_path / "other.safetensors"])),
                 lambda: matrices.read_mask(path, "l.0.nothing.weight"),
                 lambda: matrices.read_mask(path, names()[0], columns=slice(5, 5)),
                 lambda: overlap.joint_histogram(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)),
                 lambda: overlap.joint_histogram(np.zeros((2, 2)), np.zeros((2, 2)))):
        with pytest.raises(InputError):
            call()


# ---- parts


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 80), columns=st.integers(1, 12), size=st.sampled_from([1, 2, 3]), axis=st.sampled_from(["row", "column"]),
       transposed=st.booleans(), k=st.integers(0, 256))
def test_parts_are_counted_as_by_hand(rows, columns, size, axis, transposed, k):
    rows, columns = rows * size, columns * size
    ranks = random_ranks((rows, columns), seed=rows)
    stored = np.ascontiguousarray(ranks.T) if transposed else ranks
    lines = ranks if axis == "row" else ranks.T
    parts = [lines[i:i + size] for i in range(0, len(lines), size)]
    kept = [int((p.astype(int) >= k).sum()) for p in parts]
    assert sparsity.kept_parts(stored, k / 256, axis, size, transposed).tolist() == kept
    table = sparsity.part_table(stored, k / 256, axis, size, transposed)
    assert table["kept"].tolist() == kept and (table["weights"] == parts[0].size).all()
    assert np.allclose(table["mean_rank"], [(p + 0.5).mean() / 256 for p in parts])


def test_the_mask_of_ranks_is_the_mask_of_scores():
    scores = torch.rand(32, 48, generator=torch.Generator().manual_seed(0))
    for s in (0, 0.25, 0.5, 193 / 256, 1):
        kept = make_masks({"x": scores}, s)["x"]
        assert torch.equal(torch.from_numpy(sparsity.at_least(rank_bins(scores), sparsity.threshold(s))), kept)
    for wrong in (-0.1, 1.1, 50):
        with pytest.raises(InputError):
            sparsity.threshold(wrong)
    for axis, size in (("head", 1), ("row", 5), ("row", 0)):
        with pytest.raises(InputError):
            sparsity.part_counts(kept, axis, size)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:scipy")   # its kurtosis of a certain outcome, which nobody asked for
@pytest.mark.parametrize("size, kept, weights", [(60, 20, 12), (60, 0, 12), (60, 60, 12), (48, 24, 48), (5000, 4990, 100),
                                                 (10**7, 5 * 10**6, 4096)])
def test_chance_is_the_hypergeometric_distribution(size, kept, weights):
    found, exact = sparsity.chance(size, kept, weights), scipy.stats.hypergeom(size, kept, weights)
    assert np.allclose(found.cdf, exact.cdf(found.kept), atol=1e-6)
    assert found.sd == pytest.approx(exact.std(), abs=1e-9)
    assert found.losing_more(0.5) == pytest.approx(exact.cdf(math.ceil(weights * 0.5) - 1), abs=1e-6)
    assert found.quantile(np.array([0.5]))[0] == pytest.approx(exact.ppf(0.5), abs=1)


def test_spread_tells_chance_from_choice():
    generator = np.random.default_rng(0)
    parts, weights, keep = 40, 30, 600
    shown = []
    for _ in range(300):
        flags = np.zeros(parts * weights, dtype=bool)
        flags[generator.permutation(flags.size)[:keep]] = True
        shown.append(sparsity.spread(flags.reshape(parts, weights).sum(1), weights, more_than=0.6))
    mean = pd.DataFrame(shown).mean()
    assert math.sqrt(np.mean([s["sd"]**2 for s in shown])) == pytest.approx(mean["sd_random"], rel=0.01)
    assert mean["gini"] == pytest.approx(mean["gini_random"], rel=0.02)
    assert mean["losing_more"] == pytest.approx(mean["losing_more_random"], rel=0.05)
    whole = sparsity.spread(np.repeat([weights, 0], parts // 2), weights)   # half the parts kept whole, half removed whole
    assert whole["sd"] == 0.5 and whole["gini"] == 0.5 and whole["losing_more"] == 0.5 and whole["more_than"] == 0.75
    assert whole["sd_ratio"] > 5 and whole["losing_more_random"] < 0.01
    even = sparsity.spread(np.full(parts, 15), weights)
    assert even["sd"] == even["gini"] == even["losing_more"] == 0
    nothing = sparsity.spread(np.zeros(parts, dtype=int), weights)
    assert nothing["sd"] == nothing["gini"] == 0 and math.isnan(nothing["sd_ratio"])
    assert sparsity.spread(np.array([96]), 320, more_than=0.7)["losing_more"] == 0   # exactly 70 % is not more than 70 %


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_gini_is_half_the_relative_mean_difference(values):
    mean = sum(values) / len(values)
    brute = sum(abs(a - b) for a in values for b in values) / (2 * len(values)**2 * mean) if mean else 0
    assert sparsity.gini(np.array(values)) == pytest.approx(brute, abs=1e-12)


def test_a_runs_tables_and_its_ranks_tell_the_same(small, llama):
    import dpruner
    stats, run = small.run.stats(), small.run
    model, _ = dpruner.load_model(str(llama), device="cpu")
    heads = heads_of(model)
    assert run.record["model"]["heads"] == {name: list(where) for name, where in heads.items()}
    path = run.path("ranks", "magnitude", "legal")
    one = stats[(stats["method"] == "magnitude") & (stats["domain"] == "legal")]
    for part in ("row", "column", "head"):
        table = sparsity.stats_spread(one, part).set_index("matrix")
        from_ranks = sparsity.rank_spread(matrices.rank_matrices(path), 0.5, part, heads).set_index("matrix").loc[table.index]
        assert (table["parts"] == from_ranks["parts"]).all() and (table["weights"] == from_ranks["weights"]).all()
        assert np.abs(table["sd"] - from_ranks["sd"]).max() < 1 / 36   # sizes that 256 does not divide: one weight more or less a matrix
    with pytest.raises(InputError):
        sparsity.stats_spread(stats)
    shapes = matrices.mask_shapes(run.path("masks", "magnitude", "legal"))
    assert list(shapes) == list(dict.fromkeys(stats["matrix"])) and run.record["model"]["transposed"] == []
    assert set(matrices.rank_shapes(path).items()) == set(shapes.items())


def test_heads_of_weights_stored_the_other_way_are_counted_as_the_tables_count_them():
    model = tiny("gpt2")
    parameters = {n: p for n, p in model.named_parameters() if n in transposed_names(model)}
    masks = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for n, p in parameters.items()}
    stats = matrix_stats(model, masks)
    heads = heads_of(model)
    assert heads
    for name, (axis, size) in heads.items():
        kept = sparsity.part_counts(masks[name], axis, size, name in transposed_names(model))
        assert kept.tolist() == stats[(stats["matrix"] == name) & (stats["part"] == "head")]["kept"].tolist()


# ---- one threshold for the whole model


@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_whole_model_threshold_is_that_of_all_scores_together(target):
    generator = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(40, 50 + 10 * i, generator=generator) ** 2 * (1 + i) for i, n in enumerate(names())}
    edges = {n: ranked(s)[1] for n, s in scores.items()}
    found = sparsity.whole_model_kept(edges, {n: s.numel() for n, s in scores.items()}, target).set_index("matrix")
    for name, mask in make_masks(scores, target, "global").items():
        assert found["kept_share"][name] == pytest.approx(float(mask.float().mean()), abs=1 / 256)
    assert found["kept"].sum() == pytest.approx((1 - target) * found["weights"].sum())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=257, max_size=257), min_size=1, max_size=3), st.floats(0, 1))
def test_ties_at_the_whole_model_threshold_are_shared_out(rows, target):
    edges = {n: np.sort(r).astype(float) for n, r in zip(names(), rows, strict=False)}
    found = sparsity.whole_model_kept(edges, dict.fromkeys(edges, 1000), target)
    assert found["kept"].sum() == pytest.approx((1 - target) * 1000 * len(edges), abs=1e-6)
    assert found["kept_share"].between(-1e-12, 1 + 1e-12).all()


def test_counts_that_are_taken_away_are_whole_or_say_what_they_are():
    scores = {n: torch.rand(40, 50, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names())}
    found = sparsity.whole_model_kept({n: ranked(s)[1] for n, s in scores.items()}, {n: 2000 for n in scores}, 0.37)
    taken = figures.whole_model_chart(found, 0.37).table
    assert "kept" not in taken and pd.api.types.is_integer_dtype(taken["kept_estimated"]) and np.abs(taken["kept_estimated"] - found["kept"]).max() <= 0.5
    counted = found.assign(kept=found["kept"].round().astype(int))
    assert figures.whole_model_chart(counted, 0.37).table["kept"].equals(counted["kept"])
    curve = pd.DataFrame({"lam": [0.0, 1.0, 2.0], "changed": [0.0, 3.4, 7.6], "share": [0.0, 0.1, 0.2]})
    assert figures.lambda_curve(curve, 1.0, 0.1, "a matrix").table["changed_estimated"].tolist() == [0, 3, 8]


def test_edges_that_are_none_are_refused():
    for wrong in (np.zeros(256), np.arange(257.0)[::-1], np.full(257, np.nan)):
        with pytest.raises(InputError):
            sparsity.whole_model_kept({names()[0]: wrong}, {names()[0]: 10}, 0.5)
    assert len(sparsity.whole_model_kept({}, {}, 0.5)) == 0


# ---- overlap of two rankings


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), a=st.integers(0, 256), b=st.integers(0, 256), c=st.integers(0, 256))
def test_the_joint_histogram_knows_all_overlaps(rows, columns, a, b, c):
    one, third = random_ranks((rows, columns), 1), random_ranks((rows, columns), 3)
    two = resembling(one, 2)
    histogram = overlap.joint_histogram(torch.from_numpy(one), two)
    brute = np.zeros((256, 256), dtype=int)
    for x, y in zip(one.reshape(-1), two.reshape(-1), strict=True):
        brute[x, y] += 1
    assert np.array_equal(histogram, brute)
    A, B, C = one.astype(int) >= a, two.astype(int) >= b, third.astype(int) >= c
    found = overlap.regions(histogram, a / 256, b / 256)
    assert (found.both, found.only_a, found.only_b, found.neither) == ((A & B).sum(), (A & ~B).sum(), (B & ~A).sum(), (~A & ~B).sum())
    assert found.changed == (A ^ B).sum() and found.weights == one.size
    assert found.jaccard == pytest.approx((A & B).sum() / (A | B).sum() if (A | B).any() else 1)
    kept = overlap.kept_of_regions(overlap.region_histogram(one, two, third, a / 256, b / 256), c / 256).set_index("region")
    for region, inside in {"both": A & B, "only A": A & ~B, "only B": B & ~A, "neither": ~A & ~B}.items():
        assert kept["weights"][region] == inside.sum() and kept["kept"][region] == (inside & C).sum()
    assert np.array_equal(overlap.region_codes(A, B), A + 2 * B)
    box = overlap.brushed(one, two, (a // 2, a), (b // 2, b))
    assert box.sum() == histogram[a // 2:a + 1, b // 2:b + 1].sum()


def test_the_curve_of_overlap_is_that_of_the_masks_at_each_sparsity():
    one = random_ranks((32, 64), 1)
    two = resembling(one, 2)
    found = overlap.curve(overlap.joint_histogram(one, two)).set_index("sparsity")
    assert len(found) == 256
    for k in (0, 1, 100, 128, 255):
        A, B = one >= k, two >= k
        row = found.loc[k / 256]
        assert row["jaccard"] == pytest.approx((A & B).sum() / (A | B).sum())
        assert row["overlap"] == pytest.approx((A & B).sum() / A.sum())
        assert row["floor"] == pytest.approx(similarity.analytic_floor(A.mean(), B.mean()))
        assert row["overlap_floor"] == pytest.approx(A.mean())
    assert math.isnan(found["corrected"][0.0]) and (found["corrected"][0.1:0.9] > 0.1).all()
    assert (overlap.curve(overlap.joint_histogram(one, one))["jaccard"] == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 5))
def test_rank_correlation_is_spearmans(size, seed):
    one = random_ranks((size,), seed)
    two = resembling(one, seed + 1)
    histogram = overlap.joint_histogram(one, two)
    assert overlap.spearman(histogram) == pytest.approx(scipy.stats.spearmanr(one, two).statistic, abs=1e-9)
    assert overlap.spearman(overlap.joint_histogram(one, one)) == pytest.approx(1)
    assert overlap.spearman(overlap.joint_histogram(one, 255 - one)) == pytest.approx(-1)


def test_binned_rank_correlation_is_that_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(100, 100, generator=generator)
    b = a + torch.rand(100, 100, generator=generator)
    found = overlap.spearman(overlap.joint_histogram(rank_bins(a), rank_bins(b)))
    assert found == pytest.approx(scipy.stats.spearmanr(a.reshape(-1), b.reshape(-1)).statistic, abs=1e-4)
    assert math.isnan(overlap.spearman(overlap.joint_histogram(np.zeros(5, np.uint8), np.arange(5, dtype=np.uint8))))


def test_overlap_of_every_matrix_and_of_their_sums(tmp_path):
    one = {n: torch.from_numpy(random_ranks((16, 32), i)) for i, n in enumerate(names())}
    two = {n: torch.from_numpy(resembling(r.numpy(), 7)) for n, r in one.items()}
    for label, ranks in (("a", one), ("b", two)):
        write_tensors(tmp_path / f"{label}.safetensors", ranks)
    histograms = dict(overlap.joint_histograms(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    table = overlap.overlap_table(histograms, 0.5).set_index("matrix")
    assert set(table.index) == set(names())
    for name, row in table.iterrows():
        A, B = one[name] >= 128, two[name] >= 128
        assert row["both"] == int((A & B).sum()) and row["changed"] == pytest.approx(float((A ^ B).float().mean()))
        assert row["floor"] == pytest.approx(1 / 3)
    whole = overlap.regions(matrices.summed(histograms, "model")["model"], 0.5, 0.5)
    assert whole.both == table["both"].sum() and whole.weights == 512 * len(names())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_a_matrix_at_a_glance_is_the_mean_of_its_rectangles(rows, columns, cells):
    flags = random_masks(rows, shape=(rows, columns))[names()[0]].numpy()
    shares, row_edges, column_edges = glance.cell_shares(flags, cells)
    assert shares.shape == (min(rows, cells), min(columns, cells)) and row_edges[-1] == rows and column_edges[-1] == columns
    for i, j in np.ndindex(shares.shape):
        assert shares[i, j] == pytest.approx(flags[row_edges[i]:row_edges[i + 1], column_edges[j]:column_edges[j + 1]].mean())


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (300, 9), (70, 131)])
@pytest.mark.parametrize("flipped", [False, True])
def test_two_masks_at_a_glance(tmp_path, shape, flipped):
    name, tensors = names()[0], [torch.from_numpy(random_ranks(shape, i)) for i in range(2)]
    kept = [[r >= 128 for r in tensors], [r >= 96 for r in tensors]]
    for i, ranks in enumerate(tensors):
        write_tensors(tmp_path / f"ranks{i}.safetensors", {name: ranks})
        write_masks(tmp_path / f"masks{i}.safetensors", {name: kept[0][i]})
    for files, at, masks in (("masks", None, kept[0]), ("ranks", 96 / 256, kept[1])):
        a, b = (m.numpy().T if flipped else m.numpy() for m in masks)
        found = glance.read_glance([tmp_path / f"{files}{i}.safetensors" for i in range(2)], name, at, flipped)
        assert found.regions == overlap.region_counts(a, b)
        for counts, flags in zip((*found.kept, found.differ), (a, b, a ^ b), strict=True):
            for i, j in np.ndindex(counts.shape):
                assert counts[i, j] == flags[found.rows[i]:found.rows[i + 1], found.columns[j]:found.columns[j + 1]].sum()
            assert np.array_equal(found.shares(counts)[0], glance.cell_shares(flags)[0])


# ---- similarity of masks


def test_streamed_counts_are_those_of_the_masks(mask_files):
    masks = {label: m for label, (_, m) in mask_files.items()}
    counts = similarity.count_masks({label: path for label, (path, _) in mask_files.items()})
    dense = similarity.count_dense(masks)
    at = {n: i for i, n in enumerate(counts.names)}
    assert counts.labels == dense.labels == ("a", "b", "c") and set(counts.names) == set(names())
    assert np.array_equal(counts.both, dense.both) and np.array_equal(counts.weights, dense.weights)
    for n, (i, a), (j, b) in itertools.product(names(), enumerate("abc"), enumerate("abc")):
        assert counts.both[at[n], i, j] == int((masks[a][n] & masks[b][n]).sum())
    assert (counts.weights == 6 * 13).all()
    fewer = counts.only(["c", "a"])
    assert fewer.labels == ("c", "a") and np.array_equal(fewer.both[:, 0, 1], counts.both[:, 2, 0])


def test_halves_compare_domains_on_equal_terms():
    masks = {f"{d}~{n}": random_masks(10 * i + n) for i, d in enumerate("abc") for n in (1, 2)}
    counts = similarity.count_dense(masks)

    def shared(one, other, chosen):
        a, b = (torch.cat([masks[m][n].reshape(-1) for n in chosen]) for m in (one, other))
        return float((a & b).sum() / (a | b).sum())

    for group, members in matrices.groups(names(), "module").items():
        found = similarity.halves(counts, by="module")[group]
        for (i, a), (j, b) in itertools.product(enumerate("abc"), repeat=2):
            assert found.same[i, j] == pytest.approx((shared(f"{a}~1", f"{a}~2", members) + shared(f"{b}~1", f"{b}~2", members)) / 2)
            assert i == j or found.other[i, j] == pytest.approx(
                np.mean([shared(f"{a}~{n}", f"{b}~{m}", members) for n, m in itertools.product((1, 2), repeat=2)]))
    whole = similarity.halves(counts)["model"]
    for (i, a), (j, b) in itertools.combinations(enumerate("abc"), 2):
        assert whole.least_same[i, j] == pytest.approx(min(shared(f"{d}~1", f"{d}~2", names()) for d in (a, b)))
        assert whole.most_other[i, j] == pytest.approx(max(shared(f"{a}~{n}", f"{b}~{m}", names()) for n, m in itertools.product((1, 2), repeat=2)))


def test_domains_that_differ_are_told_from_domains_that_do_not():
    base = {n: torch.rand(24, 32, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names())}

    def half(domain, n, shift):   # every half is noisy; a domain adds something of its own that both of its halves have
        own, noise = ({m: torch.rand(24, 32, generator=torch.Generator().manual_seed(1000 * seed + i)) for i, m in enumerate(names())}
                      for seed in (domain + 1, 10 * domain + n + 5))
        return make_masks({m: base[m] + shift * own[m] + 0.5 * noise[m] for m in names()}, 0.5, "matrix")

    apart, together = (similarity.halves(similarity.count_dense({f"{d}~{n}": half(d, n, shift) for d in range(3) for n in (1, 2)}))["model"]
                       for shift in (0.5, 0))
    of = np.triu_indices(3, 1)
    assert (apart.least_same > apart.most_other)[of].all() and not (together.least_same > together.most_other)[of].all()
    assert np.abs(together.same - together.other)[of].max() < 0.02 < (apart.same - apart.other)[of].min()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (9, 64), (3, 65), (40, 127)])
def test_bits_behind_the_end_of_a_row_count_for_nothing(tmp_path, shape):
    full = {n: torch.ones(shape, dtype=torch.bool) for n in names()}
    odd = {n: torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.3 for i, n in enumerate(names())}
    write_masks(tmp_path / "full.safetensors", full)
    write_masks(tmp_path / "odd.safetensors", odd)
    counts = similarity.count_masks({"full": tmp_path / "full.safetensors", "odd": tmp_path / "odd.safetensors"})
    size = math.prod(shape)
    assert (counts.kept[:, 0] == size).all()
    expected = {n: int(m.sum()) for n, m in odd.items()}
    assert {n: int(c) for n, c in zip(counts.names, counts.both[:, 0, 1], strict=True)} == expected


def test_masks_longer_than_a_piece_are_counted_whole():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 256, 8 * similarity.WORDS * 2 + 5, dtype=np.uint8) for _ in range(2))
    counts = similarity._common_bits([a, b])
    assert counts[0, 1] == counts[1, 0] == np.unpackbits(a & b).sum() and counts[1, 1] == np.unpackbits(b).sum()


def test_counts_of_ranks_are_those_of_their_masks(tmp_path):
    ranks = {label: {n: torch.from_numpy(random_ranks((16, 24), 10 * i + k)) for k, n in enumerate(names())}
             for i, label in enumerate("ab")}
    for label, r in ranks.items():
        write_tensors(tmp_path / f"{label}.safetensors", r)
    for s in (0.0, 0.4, 0.5, 1.0):
        counts = similarity.count_ranks({label: tmp_path / f"{label}.safetensors" for label in ranks}, s)
        dense = similarity.count_dense({label: {n: sparsity.at_least(r[n], sparsity.threshold(s)) for n in counts.names}
                                        for label, r in ranks.items()})
        assert np.array_equal(counts.both, dense.both)


def test_measures_are_those_of_sets(mask_files):
    masks = [m for _, m in mask_files.values()]
    counts = similarity.count_dense(dict(zip("abc", masks, strict=True)))
    flat = [np.concatenate([m[n].numpy().reshape(-1) for n in counts.names]) for m in masks]
    for i, j in itertools.product(range(3), repeat=2):
        a, b = flat[i], flat[j]
        both = (a & b).sum()
        expected = {"jaccard": both / (a | b).sum(), "cosine": both / math.sqrt(a.sum() * b.sum()), "overlap": both / min(a.sum(), b.sum())}
        for measure, value in expected.items():
            assert similarity.similarity(counts, measure)["model"][i, j] == pytest.approx(value)
        assert similarity.similarity(counts)["model"][i, j] == pytest.approx(jaccard(masks[i], masks[j]))
        floor = similarity.floor(counts)["model"][i, j]
        assert floor == pytest.approx(jaccard_floor(masks[i], masks[j]))
        corrected = (expected["jaccard"] - floor) / (1 - floor)
        assert similarity.similarity(counts, "corrected")["model"][i, j] == pytest.approx(corrected if i != j else 1)
    for measure, by in itertools.product(similarity.MEASURES, matrices.GROUPINGS):
        for matrix in similarity.similarity(counts, measure, by).values():
            assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all()
    assert list(similarity.similarity(counts, by="block")) == [0, 1, 2] and set(similarity.similarity(counts, by="module")) == set(MODULES)
    second = similarity.similarity(counts, by="block")[1][0, 1]
    block = [{n: m[n] for n in names() if ".1." in n} for m in masks]
    assert second == pytest.approx(jaccard(block[0], block[1]))
    for wrong in (lambda: similarity.similarity(counts, "dice"), lambda: similarity.floor(counts, "dice"),
                  lambda: similarity.similarity(counts, by="head"), lambda: similarity.analytic_floor(1.2)):
        with pytest.raises(InputError):
            wrong()


def test_masks_that_keep_nothing_or_everything_have_a_similarity():
    shape = (4, 9)
    masks = {label: {n: torch.full(shape, full) for n in names()} for label, full in (("none", False), ("none too", False), ("all", True))}
    counts = similarity.count_dense(masks)
    for measure in similarity.MEASURES:
        matrix = similarity.similarity(counts, measure)["model"]
        assert (np.diag(matrix) == 1).all() and matrix[0, 1] == 1 and matrix[0, 2] == 0


@pytest.mark.parametrize("kept_a, kept_b", [(0.5, 0.5), (0.3, 0.3), (0.2, 0.7)])
def test_the_floor_is_what_random_masks_share(kept_a, kept_b):
    generator = np.random.default_rng(1)
    shape, found, counted = (40, 50), [], []
    for _ in range(60):
        a, b = ({n: np.zeros(shape, dtype=bool) for n in names()} for _ in range(2))
        for masks, share in ((a, kept_a), (b, kept_b)):
            for m in masks.values():
                m.reshape(-1)[generator.permutation(m.size)[:round(share * m.size)]] = True
        counts = similarity.count_dense({"a": a, "b": b})
        found.append(similarity.similarity(counts)["model"][0, 1])
        counted.append({m: (similarity.similarity(counts, m)["model"][0, 1], similarity.floor(counts, m)["model"][0, 1])
                        for m in similarity.MEASURES})
    assert np.mean(found) == pytest.approx(similarity.analytic_floor(kept_a, kept_b), abs=0.002)
    for measure in similarity.MEASURES:
        shown, floor = np.mean([c[measure] for c in counted], axis=0)
        assert shown == pytest.approx(floor, abs=0.003)
    assert similarity.analytic_floor(0.5) == pytest.approx(1 / 3)


def test_pairs_carry_their_intervals(mask_files):
    counts = similarity.count_masks({label: path for label, (path, _) in mask_files.items()})
    table = similarity.pairs(counts)
    assert table[["a", "b"]].values.tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
    both, kept = counts.both, counts.kept
    for row, (i, j) in zip(table.itertuples(), [(0, 1), (0, 2), (1, 2)], strict=True):
        either = kept[:, i] + kept[:, j] - both[:, i, j]
        assert (row.low, row.high) == pytest.approx(bootstrap_ratio(both[:, i, j], either))
        assert row.low < row.jaccard < row.high and row.changed == (either - both[:, i, j]).sum()
    assert table.equals(similarity.pairs(counts))
    assert similarity.pairs(counts, "matrix")["low"].isna().all()   # a single matrix says nothing about others
    assert len(similarity.pairs(counts, "block")) == 9 and len(similarity.pairs(counts.only(["a"]))) == 0


def test_order_and_map_are_deterministic_and_tell_groups_apart():
    generator = np.random.default_rng(0)
    groups = np.array([0, 1, 0, 1, 0, 1])
    noise = generator.uniform(0, 0.05, (6, 6))
    matrix = np.where(groups[:, None] == groups, 0.9, 0.4) - (noise + noise.T) / 2
    np.fill_diagonal(matrix, 1)
    at = similarity.order(matrix)
    assert sorted(at) == list(range(6)) and np.abs(np.diff(groups[at])).sum() == 1
    assert np.array_equal(at, similarity.order(matrix.copy()))
    points, shown = similarity.embed(matrix)
    assert np.array_equal(points, similarity.embed(matrix.copy())[0]) and 0 < shown <= 1
    assert all(points[np.abs(points[:, k]).argmax(), k] > 0 for k in (0, 1))
    assert len(set(np.sign(points[groups == 0, 0]))) == 1 and points[0, 0] * points[1, 0] < 0
    assert similarity.order(np.eye(1)).tolist() == [0] and similarity.order(np.eye(2)).tolist() == [0, 1]


def test_a_map_of_points_in_the_plane_has_their_distances():
    truth = np.random.default_rng(2).uniform(0, 0.4, (7, 2))
    distances = np.hypot(*(truth[:, None] - truth[None]).transpose(2, 0, 1))
    points, shown = similarity.embed(1 - distances)
    assert shown == pytest.approx(1)
    assert np.allclose(np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)), distances, atol=1e-9)
    for equal in (np.ones((4, 4)), np.eye(1)):
        points, shown = similarity.embed(equal)
        assert not points.any() and shown == 1
    table, _ = similarity.domain_points(np.eye(2), ["x", "y"])
    assert table["label"].tolist() == ["x", "y"] and table["x"].abs().tolist() == pytest.approx([0.5, 0.5])


# ---- generated texts


@given(st.lists(st.integers(0, 4), max_size=15), st.lists(st.integers(0, 4), max_size=15))
def test_an_alignment_covers_both_texts(a, b):
    found = generation.align(a, b)
    assert found.identical == (a == b) == bool(found.equal_a.all() and found.equal_b.all())
    covered_a, covered_b = [], []
    for kind, start_a, stop_a, start_b, stop_b in found.segments:
        covered_a += a[start_a:stop_a]
        covered_b += b[start_b:stop_b]
        assert (a[start_a:stop_a] == b[start_b:stop_b]) == (kind == "equal")
        assert found.equal_a[start_a:stop_a].all() == (kind == "equal") or start_a == stop_a
    assert covered_a == a and covered_b == b
    assert [t for t, e in zip(a, found.equal_a, strict=True) if e] == [t for t, e in zip(b, found.equal_b, strict=True) if e]
    if found.parts_at is not None:
        assert a[:found.parts_at] == b[:found.parts_at] and a[found.parts_at:found.parts_at + 1] != b[found.parts_at:found.parts_at + 1]


def test_surprisal_and_perplexity():
    logits, ids = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), [0, 6, 3, 3, 1]
    found = torch.log_softmax(logits, -1)[range(5), ids].numpy()
    assert np.allclose(generation.surprisal(np.log([0.5, 0.25, 1.0])), [1, 2, 0])
    assert generation.surprisal([-math.inf])[0] == math.inf
    loss = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)))
    assert generation.perplexity(found) == pytest.approx(math.exp(loss), rel=1e-5)
    assert generation.perplexity(np.log([0.25] * 3)) == pytest.approx(4) and math.isnan(generation.perplexity([]))
    with pytest.raises(InputError):
        generation.token_table(["a"], [-1.0, -2.0])
    assert generation.align(torch.tensor([1, 2]), [1, 2]).identical


# ---- figures: each with what it draws, read back from it


def layer_table(seed=0):
    table = matrices.places(names())
    return table.assign(value=np.random.default_rng(seed).uniform(0, 1, len(table)))


def spread_table():
    ranks = {n: resembling(np.sort(random_ranks((16, 32), i), axis=0), i) for i, n in enumerate(names())}
    return sparsity.rank_spread(ranks.items(), 0.5)


def histogram(seed=0):
    one = random_ranks((64, 64), seed)
    return overlap.joint_histogram(one, resembling(one, seed + 1))


def some_counts():
    masks = {label: random_masks(i) for i, label in enumerate(("legal", "health", "code"))}
    return similarity.count_dense(masks | {"legal too": {n: m | (torch.arange(13) < 3) for n, m in masks["legal"].items()}})


def cut(n, same, other):
    """What masks of half the text share, the same for every pair."""
    return similarity.Halves(*(np.full((n, n), value) for value in (same, other, same, other)))


def some_pairs():
    return similarity.pairs(some_counts())


def some_quality(x="method"):
    rows = [("dense", "legal", text, "perplexity", value, value - 1, value + 1, 64) for text, value in (("legal", 20.0), ("general", 70.0))]
    rows += [(m, "legal", text, "perplexity", value * k, value * k - 1, value * k + 1, 64)
             for m, k in (("dpruner", 1.1), ("random", 30)) for text, value in (("legal", 20.0), ("general", 70.0))]
    table = pd.DataFrame(rows, columns=["method", "domain", "text", "metric", "value", "low", "high", "n"])
    return table if x == "method" else table[table["text"] == "legal"].assign(sparsity=[0.0, 0.5, 0.6])


def some_tokens():
    return generation.token_table([" the", " court", "\n", "<b>", ""], np.log([0.9, 0.01, 0.5, 0.001, 0.3]),
                                  [True, True, False, True, True])


def some_bytes():
    return pd.DataFrame([("dense", "dense", 50_000_000), ("legal", "dense", 50_000_000), ("legal", "packed", 26_000_000)],
                        columns=["name", "kind", "bytes"])


def tile(**more):
    a, b = (random_masks(i, shape=(20, 33))[names()[0]].numpy() for i in (0, 1))
    return tiles.mask_tile(a, b, ("general", "domain"), "a matrix", (100, 200), **more)


CHARTS = {
    "layers": lambda: figures.layer_heatmap(layer_table(), "value", title="T", quantity="q", how="H", chosen=(1, "attn.o")),
    "layers around a middle": lambda: figures.layer_heatmap(layer_table(), "value", title="T", quantity="q", how="H", middle=0.5,
                                                            share=True),
    "spread": lambda: figures.spread_heatmap(spread_table()),
    "losing more": lambda: figures.spread_heatmap(spread_table(), "losing_more"),
    "gini": lambda: figures.spread_heatmap(spread_table(), "gini"),
    "profile": lambda: figures.profile(sparsity.part_table(np.sort(random_ranks((16, 32)), axis=0), 0.5), "row", "a matrix"),
    "whole model": lambda: figures.whole_model_chart(
        layer_table().rename(columns={"value": "kept_share"}).assign(kept=5.0, weights=10), 0.5),
    "overlap by layer": lambda: figures.overlap_heatmap(
        overlap.overlap_table({n: histogram(i) for i, n in enumerate(names())}, 0.5), "general", "domain"),
    "overlap curves": lambda: figures.overlap_curves({"all": overlap.curve(histogram())}, "general", "domain", 0.5),
    "plane": lambda: figures.plane(histogram(), 0.5, 0.6, "general", "domain", "a matrix"),
    "tile": tile,
    "tile with values": lambda: tile(values={"w": np.arange(660.0).reshape(20, 33), "rank": np.zeros((20, 33))}),
    "tile of one mask": lambda: tiles.mask_tile(random_masks()[names()[0]], None, ("general",), "a matrix"),
    "overview": lambda: tiles.mask_overview(*glance.cell_shares(random_masks(shape=(64, 80))[names()[0]].numpy(), 8), title="T",
                                            quantity="q", how="H", frame=(0, 7, 0, 9)),
    "similarity": lambda: alike.similarity_heatmap(similarity.similarity(some_counts())["model"], some_counts().labels, 1 / 3, cut(4, 0.95, 0.9)),
    "similarity by module": lambda: alike.similarity_grid(
        similarity.similarity(some_counts(), by="module"), some_counts().labels, "module"),
    "pairs": lambda: alike.pair_dots(some_pairs().assign(ceiling=0.95, halves=0.9)),
    "corrected pairs": lambda: alike.pair_dots(some_pairs(), measure="corrected"),
    "pairs with their own ceilings": lambda: alike.pair_dots(some_pairs().assign(ceiling=[0.9, 0.95, np.nan, 0.9, 0.92, np.nan], halves=[0.8, 0.9, np.nan, 0.8, 0.8, np.nan])),
    "map": lambda: alike.domain_map(*similarity.domain_points(similarity.similarity(some_counts())["model"], some_counts().labels)),
    "quality by method": lambda: comparisons.quality(some_quality()),
    "quality by sparsity": lambda: comparisons.quality(some_quality("sparsity"), "sparsity", "method"),
    "tokens": lambda: comparisons.token_strip(some_tokens(), "dense"),
    "bytes": lambda: comparisons.bytes_bars(some_bytes()),
}


@pytest.mark.parametrize("make", CHARTS.values(), ids=CHARTS)
def test_every_chart_is_complete_and_looks_right_in_light_and_dark(make):
    found = make()
    assert isinstance(found, chart.Chart) and isinstance(found.figure, go.Figure) and len(found.table)
    assert all(len(text) > 0 for text in (found.title, found.how)) and any(c.isdigit() for c in found.alt)
    assert not {"nan", "None"} & set(found.alt.replace(",", " ").split())
    text = found.figure.to_json()
    assert len(text) < LIMIT
    layout = json.loads(text)["layout"]
    template = layout["template"]["layout"]
    assert template["paper_bgcolor"] == template["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert "paper_bgcolor" not in layout and "plot_bgcolor" not in layout and "font" not in layout
    for colour in ('"black"', '"white"', "#000", "#fff", "#FFF"):
        assert colour not in text
    titled = found.titled()
    assert titled.layout.title.text and not found.figure.layout.title.text
    assert titled.layout.height > (found.figure.layout.height or template["height"])
    assert found.table.to_csv()
    assert make().figure.to_json() == text   # the same data, the same figure


def targets(found):
    """What hover and click carry: the customdata of the invisible markers."""
    return [trace.customdata for trace in found.figure.data if trace.type == "scatter" and trace.marker.opacity == 0]


def test_heatmaps_of_layers_show_their_table_and_say_what_is_clicked():
    table = layer_table().drop(index=4)   # a block may lack a module
    found = figures.layer_heatmap(table, "value", title="T", quantity="q", how="H")
    z = found.figure.data[0].z
    wide = matrices.layers_by_modules(table, "value")
    assert np.array_equal(z, wide.T.to_numpy(), equal_nan=True) and found.figure.data[0].hoverinfo == "skip"
    clicked = targets(found)[0]
    assert {(b, m): v for b, m, v in clicked} == {(r.block, r.module): r.value for r in table.itertuples()}
    low = table.loc[table["value"].idxmin()]
    assert f"{low['value']:.3g} in layer {low['block']}, {low['module']}" in found.alt


def test_the_profile_is_sorted_and_its_band_holds_random_masks():
    generator = np.random.default_rng(4)
    kept = generator.multivariate_hypergeometric([50] * 200, 5000)
    parts = pd.DataFrame({"index": np.arange(200), "weights": 50, "kept": kept})
    found = figures.profile(parts, "row", "a matrix")
    line = found.figure.data[-1]
    assert np.array_equal(line.y, np.sort(kept)[::-1] / 50)
    assert all(kept[i] == k and k / w == y for (i, k, w), y in zip(line.customdata, line.y, strict=True))
    inside = found.table["kept_share"].between(found.table["random_low"], found.table["random_high"])
    assert inside.mean() > 0.9
    long = figures.profile(pd.DataFrame({"index": range(11008), "weights": 4096, "kept": np.arange(11008) % 4097}), "row", "a matrix")
    assert len(long.figure.data[-1].y) <= figures.PROFILE_POINTS and len(long.table) == 11008
    assert long.figure.data[-1].y[0] == 1 and long.figure.data[-1].y[-1] == 0


def test_curves_and_whole_model_lines_are_their_tables():
    curve = overlap.curve(histogram())
    found = figures.overlap_curves({"x": curve}, "a", "b", 0.5)
    assert np.array_equal(found.figure.data[0].y, curve["jaccard"]) and np.array_equal(found.figure.data[1].y, curve["floor"])
    table = layer_table().rename(columns={"value": "kept_share"}).assign(kept=5.0, weights=10)
    lines = {t.name: t for t in figures.whole_model_chart(table, 0.5).figure.data}
    for module, rows in table.groupby("module"):
        assert np.array_equal(lines[module].y, rows["kept_share"]) and [c[0] for c in lines[module].customdata] == rows["block"].tolist()
    assert (lines["whole model"].y == 0.5).all()
    experts = [f"l.0.moe.{i}.weight" for i in range(12)]
    many = figures.whole_model_chart(matrices.places(experts).assign(kept_share=np.linspace(0, 1, 12), kept=1.0, weights=2), 0.5)
    assert many.figure.data[0].type == "heatmap" and many.figure.data[0].zmid == 0.5


def test_the_plane_shows_every_weight_and_names_the_regions():
    counts = histogram()
    found = figures.plane(counts, 0.5, 0.75, "general", "domain", "a matrix")
    heat = found.figure.data[0]
    assert np.shape(heat.z) == (128, 128) and np.sum(heat.customdata) == counts.sum() == found.table["weights"].sum()
    assert heat.customdata[5][7] == counts[14:16, 10:12].sum()   # y is the second ranking
    logs, drawn = np.asarray(heat.z), np.asarray(heat.customdata)
    seen = np.isfinite(logs)
    assert np.allclose(10**logs[seen], drawn[seen], rtol=1e-5) and np.array_equal(seen, drawn > 0)
    regions = overlap.regions(counts, 0.5, 0.75)
    texts = " ".join(a.text for a in found.figure.layout.annotations)
    for count in (regions.both, regions.only_a, regions.only_b, regions.neither):
        assert f"{count:,}" in texts and f"{count:,}" in found.alt
    boxes = targets(found)[0]
    assert sum(int(counts[a:b + 1, c:d + 1].sum()) for a, b, c, d in boxes) == counts.sum()


def pixels(found):
    """Palette indices and palette of a tile's picture."""
    data = base64.b64decode(found.figure.data[0].source.split(",")[1])
    parts, at = {}, 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        kind, body = data[at + 4:at + 8], data[at + 8:at + 8 + length]
        assert int.from_bytes(data[at + 8 + length:at + 12 + length], "big") == zlib.crc32(kind + body)
        parts[kind], at = body, at + 12 + length
    width, height = (int.from_bytes(parts[b"IHDR"][i:i + 4], "big") for i in (0, 4))
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, width + 1)
    return rows[:, 1:], parts


def test_a_tile_is_its_masks_pixel_for_pixel():
    a, b = (random_masks(i, shape=(20, 33))[names()[0]].numpy() for i in (0, 1))
    values = {"w": np.arange(660.0).reshape(20, 33), "rank": np.full((20, 33), 7)}
    found = tiles.mask_tile(a, b, ("general", "domain"), "a matrix", (100, 200), values)
    codes, parts = pixels(found)
    assert np.array_equal(codes, overlap.region_codes(a, b)) and parts[b"tRNS"][overlap.NEITHER] == 0
    image = found.figure.data[0]
    assert (image.y0, image.x0) == (100, 200) and image.customdata[3][4][0] == values["w"][3, 4] and image.customdata[3][4][1] == 7
    named = np.array(["neither", "only general", "only domain", "both"])[codes]
    assert [list(row) for row in image.text] == named.tolist()
    assert {t.name for t in found.figure.data[1:]} >= {f"both ({(a & b).sum():,})", f"only general ({(a & ~b).sum():,})"}
    row = found.table.iloc[3 * 33 + 4]
    assert (row["row"], row["column"], row["w"]) == (103, 204, values["w"][3, 4])
    assert (row["kept by general"], row["kept by domain"]) == (a[3, 4], b[3, 4])
    alone, _ = pixels(tiles.mask_tile(a, None, ("general",), "a matrix"))
    assert np.array_equal(alone > 0, a)
    for shape, more in (((513, 4), {}), ((129, 4), {"values": {"w": np.zeros((129, 4))}}), ((0, 4), {})):
        with pytest.raises(InputError):
            tiles.mask_tile(np.zeros(shape, bool), np.zeros(shape, bool), ("a", "b"), "a matrix", **more)


def test_an_overview_says_which_rectangle_is_clicked():
    flags = random_masks(shape=(50, 70))[names()[0]].numpy()
    shares, rows, columns = glance.cell_shares(flags, 6)
    found = tiles.mask_overview(shares, rows, columns, title="T", quantity="q", how="H")
    assert np.allclose(found.figure.data[0].z, shares, atol=1e-7)
    for top, bottom, left, right, share in targets(found)[0]:
        assert flags[int(top):int(bottom) + 1, int(left):int(right) + 1].mean() == pytest.approx(share)


def test_similarity_figures_show_the_matrix_its_floor_and_its_ceiling():
    counts = some_counts()
    matrix, labels = similarity.similarity(counts)["model"], counts.labels
    found = alike.similarity_heatmap(matrix, labels, similarity.floor(counts)["model"], cut(4, 0.95, 0.9))
    shown = {(a, b): v for a, b, v, *_ in targets(found)[0]}
    assert shown == {(a, b): matrix[i, j] for i, a in enumerate(labels) for j, b in enumerate(labels)}
    at = similarity.order(matrix)
    assert np.array_equal(found.figure.data[0].z, matrix[np.ix_(at, at)])
    assert list(found.figure.layout.xaxis.ticktext) == [labels[i] for i in at]
    lines = sorted(s.y0 for s in found.figure.layout.shapes)
    assert lines == pytest.approx([found.table["floor"].mean(), 0.9, 0.95])
    assert set(found.table["ceiling"]) == {0.95} and set(found.table["halves"]) == {0.9} and "0.950, of two 0.900" in found.alt
    assert sorted(found.figure.data[-1].y) == pytest.approx(sorted(found.table["jaccard"]))
    own = [np.full(matrix.shape, np.nan) for _ in range(2)]
    for side, value in zip(own, (0.9, 0.8), strict=True):
        side[0, 1] = side[1, 0] = value
    shapes = alike.similarity_heatmap(matrix, labels, 1 / 3, similarity.Halves(*own, *own)).figure.layout.shapes
    assert sorted(s.y0 for s in shapes) == pytest.approx([1 / 3, 0.8, 0.9])

    modules = similarity.similarity(counts, by="module")
    grid = alike.similarity_grid(modules, labels, "module")
    shown = {(g, a, b): v for carried in targets(grid) for g, a, b, v in carried}
    assert shown == {(g, a, b): m[i, j] for g, m in modules.items() for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j}

    pairs = some_pairs()
    dots = alike.pair_dots(pairs.assign(ceiling=0.95, halves=pairs["jaccard"] - 0.02))
    marks, open_marks = dots.figure.data[-1], dots.figure.data[-2]
    assert np.allclose(open_marks.x, marks.x - 0.02) and list(open_marks.y) == list(marks.y) and open_marks.marker.symbol == "circle-open"
    assert np.array_equal(marks.x, np.sort(pairs["jaccard"])) and np.allclose(marks.x + marks.error_x.array, dots.table["high"])
    assert np.allclose(marks.x - marks.error_x.arrayminus, dots.table["low"])
    floors = next(t for t in dots.figure.data if t.name == "random masks")   # these masks keep different shares: each pair has its own
    assert np.array_equal(floors.x, dots.table["floor"])
    assert [s.x0 for s in dots.figure.layout.shapes] == pytest.approx([0.95])
    shared = alike.pair_dots(pairs.assign(floor=1 / 3, ceiling=0.95))
    assert [s.x0 for s in shared.figure.layout.shapes] == pytest.approx([1 / 3, 0.95])


def test_maps_tokens_qualities_and_sizes_show_their_tables():
    points, shown = similarity.domain_points(similarity.similarity(some_counts())["model"], some_counts().labels)
    found = alike.domain_map(points.assign(group=["a", "a", "b", "b"]), shown)
    drawn = {label: (x, y) for t in found.figure.data for (label,), x, y in zip(t.customdata, t.x, t.y, strict=True)}
    assert drawn == {r.label: (r.x, r.y) for r in points.itertuples()}
    crowd = pd.DataFrame({"label": list("abc"), "x": [0.0, 0.001, 1.0], "y": [0.0, 0.0, 0.0]})
    assert list(alike.domain_map(crowd, 1.0).figure.data[0].text) == ["a and 1 more", "", "c"]

    tokens = some_tokens()
    strip = comparisons.token_strip(tokens, "dense").figure.data[0]
    assert list(strip.text) == [" the", " court", "⏎", "&lt;b&gt;", "∅"] and np.allclose(strip.marker.color, tokens["surprisal"])
    assert list(strip.marker.line.width) == [1, 1, 3, 1, 1]
    assert np.array_equal(strip.base[1:], np.cumsum(strip.x)[:-1]) and (strip.y == 0).all()
    long = comparisons.token_strip(generation.token_table(["word "] * 200, [-1.0] * 200), "dense").figure.data[0]
    assert (np.asarray(long.base) + long.x <= comparisons.LINE_CHARACTERS).all() and max(long.y) > 5

    table = some_quality()
    drawn = {t.name: t for t in comparisons.quality(table).figure.data}
    legal = table[(table["text"] == "legal") & (table["method"] != "dense")]
    assert np.array_equal(drawn["legal"].y, legal["value"]) and (drawn["legal"].error_y.array == 1).all()
    assert (drawn["dense, general"].y == 70).all()
    along = {t.name: t for t in comparisons.quality(some_quality("sparsity"), "sparsity", "method").figure.data}
    assert along["random"].x.tolist() == [0.6] and (along["dense"].y == 20).all()

    bars = comparisons.bytes_bars(some_bytes())
    assert sorted(tuple(c) for t in bars.figure.data for c in t.customdata) == sorted(some_bytes().itertuples(index=False, name=None))


def test_what_cannot_be_informative_is_not_drawn():
    equal = layer_table().assign(value=0.5)
    assert figures.layer_heatmap(equal, "value", title="T", quantity="q", how="H") is None
    assert figures.layer_heatmap(layer_table().head(1), "value", title="T", quantity="q", how="H") is None
    assert figures.whole_model_chart(equal.rename(columns={"value": "kept_share"}).assign(kept=5.0, weights=10), 0.5) is None
    assert figures.profile(pd.DataFrame({"index": range(5), "weights": 4, "kept": 2}), "row", "a matrix") is None
    same = overlap.joint_histogram(random_ranks((8, 8)), random_ranks((8, 8)))
    assert figures.overlap_curves({"x": overlap.curve(same)}, "a", "b") is None and figures.overlap_curves({}, "a", "b") is None
    assert figures.overlap_heatmap(overlap.overlap_table(dict.fromkeys(names(), same), 0.5), "a", "b") is None
    assert figures.plane(np.zeros((256, 256), int), 0.5, 0.5, "a", "b", "a matrix") is None
    assert tiles.mask_overview(np.full((4, 4), 0.5), np.arange(5), np.arange(5), title="T", quantity="q", how="H") is None
    assert alike.similarity_heatmap(np.ones((3, 3)), list("abc"), 1 / 3) is None
    assert alike.similarity_heatmap(np.eye(1), ["a"], 1 / 3) is None
    assert alike.similarity_grid({"x": np.ones((3, 3)), "y": np.ones((3, 3))}, list("abc"), "module") is None
    assert alike.pair_dots(some_pairs().assign(jaccard=1.0)) is None and alike.pair_dots(some_pairs().head(0)) is None
    assert alike.domain_map(*similarity.domain_points(np.ones((4, 4)), "abcd")) is None
    assert alike.domain_map(*similarity.domain_points(np.eye(2), "ab")) is None
    assert comparisons.quality(some_quality().head(2)) is None
    assert comparisons.token_strip(generation.token_table([], []), "x") is None
    assert comparisons.bytes_bars(some_bytes().head(0)) is None


def test_a_users_words_are_words_and_no_markup():
    table = some_pairs().assign(a="<b>x</b> & co")
    text = alike.pair_dots(table.assign(ceiling=0.95)).figure.data[-1].y[0]
    assert text.startswith("&lt;b&gt;x&lt;/b&gt; &amp; co")
    assert chart.listed(["a"]) == "a" and chart.listed("abc") == "a, b and c" and chart.listed(range(12)).endswith("and 4 more")
    assert chart.percent(math.nan) == "unknown" and chart.percent(1 / 3) == "33.3 %" and chart.number(12345.0) == "12,345"
    assert (chart.signed(-4.94), chart.signed(-0.04), chart.signed(0.0123, 3)) == ("−4.9", "0.0", "+0.012"), "a true minus, and none before nothing"


def test_matrices_of_a_large_model_fit_into_a_page():
    """4096 × 11008, a matrix of a model of 7 billion weights."""
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (4096, 11008), dtype=np.uint8)
    b = a ^ np.uint8(16)
    counts = overlap.joint_histogram(a, b)
    assert counts.sum() == a.size
    found = [figures.profile(sparsity.part_table(a, 0.5, axis), axis, "a matrix") for axis in ("row", "column")]
    found += [figures.plane(counts, 0.5, 0.5, "general", "domain", "a matrix"),
              tiles.mask_overview(*glance.cell_shares((a >= 136) ^ (b >= 136)), title="T", quantity="q", how="H"),
              tiles.mask_tile(a[:512, :512] >= 128, b[:512, :512] >= 100, ("general", "domain"), "a matrix"),
              tiles.mask_tile(a[:128, :128] >= 128, b[:128, :128] >= 100, ("general", "domain"), "a matrix",
                              values={f"value {i}": generator.normal(size=(128, 128)) for i in range(8)})]
    for one in found:
        assert len(one.figure.to_json()) < LIMIT
    masks = {f"method {i} for domain {j}": {n: generator.random((4, 8)) < 0.5 for n in names(32)} for i in range(4) for j in range(4)}
    many = similarity.count_dense(masks)
    grid = alike.similarity_grid(similarity.similarity(many, by="block"), many.labels, "layer")
    assert len(grid.figure.to_json()) < LIMIT

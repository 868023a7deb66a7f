"""The page Overlap: its numbers against counting by hand, the brush, both thresholds; what it says where something is missing."""

import json

import numpy as np
import pages
import pytest
import torch
from pages import cells, figure, shown, words
from scipy.stats import spearmanr

from analysis import overlap, weighing
from analysis.matrices import split_name
from dpruner import make_masks, store
from dpruner.formulas import balanced
from dpruner.masks import Scores, ranked
from dpruner.store import Run

MATRIX = "model.layers.1.mlp.up_proj.weight"


def opened(domain="legal", block=1, module="mlp.up_proj", **session):
    return pages.opened("overlap", domain=domain, block=block, module=module, **session)


def sides(run: Run, *which: str) -> list[dict[str, np.ndarray]]:
    return [{n: r.numpy() for n, r in run.ranks(side, "legal").items()} for side in which]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("percent", [50, 75])
def test_the_overlap_is_what_counting_by_hand_finds(run, percent):
    page = opened(sparsity=percent)
    assert not page.exception and not page.error
    general, domain = ({n: r >= 256 * percent / 100 for n, r in side.items()} for side in sides(run, "general", "domain"))
    assert cells(figure(page, "overlap-map")) == pytest.approx({split_name(n): jaccard(general[n], domain[n]) for n in general})
    both, either = (sum(int(f(general[n], domain[n]).sum()) for n in general) for f in (np.logical_and, np.logical_or))
    metrics = {m.label: (m.value, m.delta) for m in page.metric}
    floor = {50: 1 / 3, 75: 1 / 7}[percent]
    assert metrics["Jaccard similarity, whole model"] == (f"{both / either:.3f}", f"random masks: {floor:.3f}")
    whole = figure(page, "overlap-curves")["data"][0]
    at = shown(whole["x"]).tolist().index(percent / 100)
    assert shown(whole["y"])[at] == pytest.approx(both / either)


def test_the_rank_correlation_is_spearmans(run):
    found = cells(figure(opened(overlap_measure="spearman"), "overlap-map"))
    general, domain = sides(run, "general", "domain")
    expected = {split_name(n): spearmanr(general[n].ravel(), domain[n].ravel()).statistic for n in general}
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_regions_follow_their_own_thresholds(run):
    page = opened(overlap_general=25, overlap_domain=75)
    general, domain, dual = (side[MATRIX] for side in sides(run, "general", "domain", "dpruner"))
    a, b = general >= 64, domain >= 192
    said = " ".join(note["text"] for note in figure(page, "overlap-plane")["layout"]["annotations"])
    for name, region in (("both", a & b), ("only general importance", a & ~b), ("only domain importance", b & ~a), ("neither", ~a & ~b)):
        assert f"{name}<br>{region.sum():,} ({region.mean():.1%})" in said
    kept = dual >= 128   # the sidebar's sparsity is the run's, 50 %
    bars = figure(page, "overlap-regions")["data"][0]
    assert shown(bars["x"]) == pytest.approx([kept[r].mean() if r.any() else np.nan for r in (a & b, a & ~b, b & ~a, ~a & ~b)], nan_ok=True)


def test_the_thresholds_follow_the_sparsity(run):
    page = opened(overlap_general=20)
    assert page.slider(key="overlap-general").value == 20 and page.slider(key="overlap-domain").value == 50
    page.slider(key="sparsity").set_value(60).run()
    assert page.slider(key="overlap-general").value == page.slider(key="overlap-domain").value == 60


def test_the_brush_shows_where_its_weights_sit(run):
    page = opened()
    assert "Draw a box" in words(page)
    page.slider(key="overlap-from-general").set_value((0, 50))
    page.slider(key="overlap-from-domain").set_value((75, 100)).run()
    general, domain = (side[MATRIX] for side in sides(run, "general", "domain"))
    flags = (general < 128) & (domain >= 192)
    assert f"**{flags.sum():,}** of {flags.size:,} weights ({100 * flags.mean():.1f} %) lie in the box" in words(page)
    place = np.array(shown(figure(page, "overlap-place")["data"][1]["customdata"]), dtype=float)
    cells_of = [flags[int(r0):int(r1) + 1, int(c0):int(c1) + 1].mean() for r0, r1, c0, c1, _ in place]
    assert place[:, 4] == pytest.approx(cells_of)
    frame = figure(page, "overlap-plane")["layout"]["shapes"][0]
    assert [frame[k] for k in ("x0", "x1", "y0", "y1")] == [0, 0.5, 0.75, 1]
    next(b for b in page.button if b.label == "Clear the box").click().run()
    assert page.slider(key="overlap-from-general").value == (0, 100) and "Draw a box" in words(page)


def test_what_lambda_changed(run):
    page = opened()
    metrics = run.metrics()
    stored = metrics[(metrics.metric == "decisions changed by λ") & (metrics.domain == "legal")]
    assert f"**{int(stored.value.iloc[0]):,}** of {int(stored.n.iloc[0]):,} decisions" in words(page)
    assert "it changes" not in words(page) and "it changes" in words(opened(sparsity=75)), "the run's own count is not said twice"
    domain, dual = ({n: r >= 128 for n, r in side.items()} for side in sides(run, "domain", "dpruner"))
    changed = cells(figure(page, "overlap-changed"))
    assert changed == pytest.approx({split_name(n): (domain[n] ^ dual[n]).mean() for n in domain})
    total = sum((domain[n] ^ dual[n]).sum() for n in domain)
    assert total == stored.value.iloc[0]   # the ranks and the run's own count agree
    curve, counted = figure(page, "overlap-lambda")["data"]
    assert shown(counted["y"])[0] == pytest.approx(changed[split_name(MATRIX)])
    at = shown(curve["x"]).tolist().index(1.0)
    assert shown(curve["y"])[at] == pytest.approx(changed[split_name(MATRIX)], abs=0.02)


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_the_decisions_at_any_lambda_are_those_of_the_formula(lam):
    generator = torch.Generator().manual_seed(0)
    shape, name = (300, 400), "model.layers.0.mlp.up_proj.weight"
    F = Scores({name: torch.randn(shape, generator=generator).exp() ** 2})
    G = Scores({name: F[name] ** 0.5 * torch.randn(shape, generator=generator).exp() * 7})
    F[name] /= F[name].mean()
    found = {side: ranked(s[name]) for side, s in {"domain": F, "general": G, "dual": balanced(F, G, 1.0)}.items()}   # the run's λ is 1
    ranks, edges = ({side: pair[i].numpy() for side, pair in found.items()} for i in (0, 1))
    scale = weighing.general_scale(ranks, edges, 1.0)
    assert scale == pytest.approx(1 / float(G[name].mean()), rel=0.01)
    histogram = overlap.joint_histogram(ranks["general"], ranks["domain"])
    for sparsity in (0.25, 0.5, 0.75):
        one, other = (make_masks(balanced(F, G, at), sparsity)[name] for at in (lam, 0.0))
        share = weighing.changed_by_lambda(histogram, edges, scale, sparsity, [0.0, lam]).share
        assert share[0] == 0 and share[1] == pytest.approx(float((one ^ other).float().mean()), abs=0.002)
    assert np.isnan(weighing.general_scale(ranks, edges, 0.0)) and weighing.changed_by_lambda(histogram, edges, float("nan"), 0.5).empty


def test_other_formulas_show_the_stored_count_only(run):
    record = json.loads((run.folder / "run.json").read_text())
    record["config"]["formula"] = "taylor"
    store.write_json(run.folder / "run.json", record)
    page = opened()
    assert "decisions (**" in words(page) and "does not follow from what the run keeps" in words(page)
    assert not [e for e in page.get("plotly_chart") if e.proto.id.endswith("overlap-lambda")] and not page.exception


def test_every_sparsity_is_curve_for_each_group(run):
    histograms = dict(overlap.joint_histograms(run.path("ranks", "general", "legal"), run.path("ranks", "domain", "legal")))
    table = overlap.every_sparsity(histograms)
    whole = overlap.curve(sum(histograms.values()))
    chosen = table[table.by == "model"].reset_index(drop=True)
    assert np.allclose(chosen[whole.columns], whole, equal_nan=True)
    at = overlap.at_sparsity(table, 0.75).set_index("matrix")
    for name, row in overlap.overlap_table(histograms, 0.75).set_index("matrix").iterrows():
        assert at.loc[name, ["block", "weights", "changed", "jaccard", "floor", "spearman"]].tolist() == pytest.approx(
            row[["block", "weights", "changed", "jaccard", "floor", "spearman"]].tolist())


def test_bins_of_a_range_cover_it_once():
    edges = [overlap.bin_range(low, high) for low, high in ((0, 30), (30, 77), (77, 100))]
    assert [b for first, last in edges for b in range(first, last + 1)] == list(range(256))
    first, last = overlap.bin_range(40, 40)
    assert last < first


def test_a_run_without_importances_says_what_to_do(run):
    run.path("ranks", "general", "legal").unlink()
    page = opened()
    assert "keeps no general and domain importance" in page.info[0].value and not page.get("plotly_chart") and not page.exception


def test_a_walk_leaves_no_dual_score(run):
    run.path("ranks", "dpruner", "legal").unlink()
    page = opened()
    assert "leaves no ranks of the dual score" in words(page) and figure(page, "overlap-map") and not page.exception and not page.error


def test_damaged_ranks_are_named_and_the_rest_goes_on(run):
    run.path("ranks", "dpruner", "legal").write_bytes(b"no")
    status = run.folder / "status.json"
    status.write_text(status.read_text())   # written anew, so that nothing comes from a cache
    page = opened()
    assert "dpruner@legal.safetensors cannot be read" in page.error[0].value and figure(page, "overlap-map") and not page.exception


def test_where_nothing_is_kept_there_is_no_overlap(run):
    page = opened(sparsity=100)
    assert "nothing is kept" in page.info[0].value and not page.error and not page.exception and not page.get("plotly_chart")

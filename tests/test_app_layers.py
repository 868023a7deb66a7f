"""The page Layers: its numbers against counting by hand, at the run's sparsity and others; what it says where something is missing."""

import math
from types import SimpleNamespace

import numpy as np
import pages
import pytest
from pages import cells, figure, shown, words

from analysis.matrices import split_name
from analysis.sparsity import importance_kept
from app import state
from dpruner import store


def opened(**session):
    return pages.opened("layers", **session)


def times_chance(kept: np.ndarray) -> float:
    """Standard deviation of the kept shares of the rows over that of the hypergeometric distribution."""
    size, count, width = kept.size, int(kept.sum()), kept.shape[1]
    variance = width * count / size * (1 - count / size) * (size - width) / (size - 1)
    return float(kept.sum(1).std() / math.sqrt(variance))


@pytest.mark.parametrize("sparsity", [50, 75])
def test_the_map_shows_what_counting_by_hand_finds(run, sparsity):
    masks = run.masks("dpruner", "legal")
    if sparsity != 50:   # 256 · 0.75 is whole: the ranks cut exactly
        masks = {n: r >= 192 for n, r in run.ranks("dpruner", "legal").items()}
    page = opened(domain="legal", sparsity=sparsity)
    assert not page.exception and not page.error
    assert ("The very masks this run made" in words(page)) == (sparsity == 50)
    expected = {split_name(n): times_chance(m.numpy()) for n, m in masks.items()}
    assert cells(figure(page, "layers-map")) == pytest.approx(expected)
    assert f"differ {min(expected.values()):.1f} to {max(expected.values()):.1f} times as much as chance" in words(page)


def test_the_slider_means_the_prunable_weights_also_where_a_run_was_asked_for_a_share_of_all(run):
    record = run.record
    asked = 0.5 * record["model"]["prunable_weights"] / record["model"]["weights"]   # half of the prunable ones, as the run has removed
    store.write_json(run.folder / "run.json", {**record, "config": {**record["config"], "sparsity": asked, "sparsity_of": "model"}})
    page = opened(domain="legal")
    assert not page.exception and page.sidebar.slider[0].value == 50 and "The very masks this run made" in words(page)
    assert "The very masks this run made" not in words(opened(domain="legal", sparsity=round(100 * asked)))


@pytest.mark.parametrize("part", ["column", "head"])
def test_the_profile_is_of_the_selected_matrix(run, part):
    page = opened(method="magnitude", domain="healthcare", block=1, module="self_attn.q_proj", layers_part=part)
    assert not page.exception and not page.error
    kept = run.masks("magnitude", "healthcare")["model.layers.1.self_attn.q_proj.weight"].numpy()
    stats = run.stats()
    stats = stats[(stats.method == "magnitude") & (stats.domain == "healthcare") & (stats.part == "head")]
    stats = stats[stats.matrix == "model.layers.1.self_attn.q_proj.weight"]
    counts = kept.sum(0) if part == "column" else stats.kept.to_numpy()
    line = figure(page, "layers-profile")["data"][2]
    assert shown(line["y"]) == pytest.approx(np.sort(counts / (kept.size / len(counts)))[::-1])
    assert "layer 1, self_attn.q_proj" in words(page)


def test_a_matrix_without_heads_is_named(run):
    page = opened(module="mlp.up_proj", layers_part="head")
    assert "There are no heads in layer 0, mlp.up_proj" in words(page) and not page.exception


def test_equal_shares_are_not_drawn_and_unequal_ones_are(run):
    page = opened(domain="legal")
    assert "Every matrix loses the same share by construction" in words(page)
    assert not [e for e in page.get("plotly_chart") if e.proto.id.endswith("layers-removed")]
    stats = run.stats()
    first = stats.matrix.iloc[0]
    stats.loc[(stats.matrix == first) & (stats.part == "matrix"), "kept"] //= 2
    stats.to_parquet(run.folder / "stats.parquet", index=False)
    status = run.folder / "status.json"
    status.write_text(status.read_text())   # written anew, so that nothing comes from a cache
    removed = cells(figure(opened(domain="legal"), "layers-removed"))
    assert removed[split_name(first)] == pytest.approx(0.75, abs=0.01) and max(removed.values()) == removed[split_name(first)]


def test_one_threshold_for_the_whole_model_removes_what_is_asked(run):
    page = opened(method="magnitude", domain="legal", sparsity=70)
    lines = [t for t in figure(page, "layers-whole")["data"] if "customdata" in t]
    kept = sum(float(row[2]) for t in lines for row in t["customdata"])
    weights = sum(float(row[3]) for t in lines for row in t["customdata"])
    assert weights == sum(m.numel() for m in run.masks("magnitude", "legal").values()) and kept / weights == pytest.approx(0.3, abs=0.001)
    assert "Mind the scale" not in words(page) and "Mind the scale" in words(opened(method="dpruner"))


def test_importance_kept_is_the_share_of_the_scores():
    scores = np.random.default_rng(0).lognormal(0, 3, 256 * 400)
    ordered = np.sort(scores)
    edges = np.append(ordered[::400], ordered[-1])
    name = "model.layers.0.a.weight"
    for lowest in (0, 64, 128, 200, 250):
        found = importance_kept({name: edges}, {name: scores.mean()}, lowest / 256).importance_kept[0]
        assert found == pytest.approx(ordered[400 * lowest:].sum() / scores.sum(), rel=1e-3)
    assert importance_kept({name: edges}, {name: scores.mean()}, 1.0).importance_kept[0] == 0
    assert math.isnan(importance_kept({name: edges * 0}, {name: 0.0}, 0.5).importance_kept[0])


def test_importance_is_shown_for_the_selected_sparsity(run):
    few, many = (cells(figure(opened(sparsity=s), "layers-importance")) for s in (30, 80))
    assert all(0.8 < few[k] <= 1 and many[k] < few[k] for k in few)
    mean = cells(figure(opened(method="magnitude", layers_score="mean_score"), "layers-mean"))
    stats = run.stats()
    stats = stats[(stats.method == "magnitude") & (stats.part == "matrix")].drop_duplicates("matrix")
    assert mean == pytest.approx({split_name(n): s for n, s in zip(stats.matrix, stats.score, strict=True)})


@pytest.mark.parametrize(("sparsity", "said"), [(0, "nothing is removed"), (100, "everything is removed")])
def test_the_ends_of_the_slider(run, sparsity, said):
    page = opened(sparsity=sparsity)
    assert said in words(page) and not page.exception and not page.get("plotly_chart")


def test_a_method_without_ranks_is_shown_at_its_own_sparsity(run):
    run.path("ranks", "random", "legal").unlink()
    page = opened(method="random", domain="legal")
    assert not page.error and figure(page, "layers-map") and "exist only while it prunes" in words(page)
    page = opened(method="random", domain="legal", sparsity=60)
    assert "random can be shown at its own sparsity only" in page.error[0].value and "50 %" in page.error[0].value


def test_damaged_files_are_named_and_the_rest_goes_on(run):
    run.path("edges", "dpruner", "legal").write_bytes(b"no")
    page = opened(domain="legal")
    assert "edges" in page.error[0].value and figure(page, "layers-map") and not page.exception
    (run.folder / "stats.parquet").write_bytes(b"no")
    status = run.folder / "status.json"
    status.write_text(status.read_text())
    page = opened(domain="legal")
    assert "stats.parquet" in page.error[0].value and not page.exception


def test_no_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "RUNS", tmp_path)
    monkeypatch.setattr("app.demo.ensure", lambda: None)
    page = opened()
    assert "There is no finished run yet" in page.info[0].value and not page.exception


def test_a_click_selects_block_and_module(monkeypatch):
    points = [{"customdata": [3, "mlp.up_proj", 0.5]}]
    session = {"layers-map": SimpleNamespace(selection=SimpleNamespace(points=points))}
    monkeypatch.setattr(state.st, "session_state", session)
    state.choose_matrix("layers-map")
    assert (session["block"], session["module"]) == (3, "mlp.up_proj")
    session["layers-map"].selection.points = [{"customdata": {"0": 2.0, "1": 7.0, "10": 3.0, "2": 5.0}}]   # numbers that travelled packed
    assert state.clicked("layers-map") == [2, 7, 5, 3]
    session["layers-map"].selection.points = []
    session["block"] = 1
    state.choose_matrix("layers-map")   # a selection that was cleared changes nothing
    assert session["block"] == 1

"""The page Similarity: its numbers against counting by hand, on every view; what it says where something is missing."""

import itertools
import json
import shutil

import numpy as np
import pages
import pytest
from pages import cells, figure, figures, metrics, shown, words

from analysis.matrices import split_name
from dpruner import store
from dpruner.store import Run

FLOOR = "Two random masks"


def opened(**session):
    return pages.opened("similarity", **session)


def masks(run: Run, method: str, domain: str, percent: int = 50) -> dict[str, np.ndarray]:
    """{matrix: bool} of a run's own mask, or cut from ranks where 256 steps do that exactly."""
    if percent == 50:
        return {n: m.numpy() for n, m in store.read_masks(run.path("masks", method, domain)).items()}
    return {n: r.numpy() >= 256 * percent // 100 for n, r in store.read_tensors(run.path("ranks", method, domain)).items()}


def jaccard(one: dict, other: dict, of=lambda name: True) -> float:
    a, b = (np.concatenate([m[n].reshape(-1) for n in one if of(n)]) for m in (one, other))
    return float((a & b).sum() / (a | b).sum())


def on_equal_terms(run: Run, percent: int = 50, of=lambda name: True) -> tuple[float, float]:
    """What masks of half the text share: of one domain, the mean over both, and of the two."""
    cut = {d: [masks(run, "dpruner", f"{d}~{n}", percent) for n in (1, 2)] for d in ("healthcare", "legal")}
    same = np.mean([jaccard(*both, of) for both in cut.values()])
    return same, np.mean([jaccard(a, b, of) for a, b in itertools.product(*cut.values())])


@pytest.mark.parametrize("percent", [50, 75])
def test_the_whole_model_is_what_counting_by_hand_finds(run, percent):
    page = opened(sparsity=percent)
    assert not page.exception and not page.error
    assert ("the masks as the run made them" in words(page)) == (percent == 50)
    told = jaccard(*(masks(run, "dpruner", d, percent) for d in ("healthcare", "legal")))
    floor, (same, other) = (1 - percent / 100) / (1 + percent / 100), on_equal_terms(run, percent)
    assert metrics(page) == {"Mean of all pairs": f"{told:.3f}", FLOOR: f"{floor:.3f}", "½ text: 2 domains": f"{other:.3f}",
                             "½ text: 1 domain": f"{same:.3f}", "Floor to ceiling": f"{100 * (other - floor) / (same - floor):.1f} %"}
    carried = {(a, b): v for a, b, v, *_ in figure(page, "similarity-all-heatmap")["data"][1]["customdata"]}
    assert carried == pytest.approx({("healthcare", "legal"): told, ("legal", "healthcare"): told, ("healthcare", "healthcare"): 1, ("legal", "legal"): 1})
    found = {t["name"]: shown(t["x"])[0] for t in figure(page, "similarity-all-dots")["data"] if t.get("name")}
    assert found["the two domains, all their text"] == pytest.approx(told) and found["the two domains, from half the text each"] == pytest.approx(other)
    cut = {d: [masks(run, "dpruner", f"{d}~{n}", percent) for n in (1, 2)] for d in ("healthcare", "legal")}
    clear = max(jaccard(a, b) for a, b in itertools.product(*cut.values())) < min(jaccard(*both) for both in cut.values())
    assert f"**{abs(same - other):.3f} {'less' if same > other else 'more'}**" in words(page) and ("**are** more alike than any two" in words(page)) == clear
    for (block, module), gap in cells(figure(page, "similarity-gap")).items():
        of_one = on_equal_terms(run, percent, lambda n, at=(block, module): split_name(n) == at)
        assert gap == pytest.approx(of_one[0] - of_one[1])
    assert "similarity-map" not in figures(page), "two masks make no map"


def test_methods_have_no_halves_to_compare_and_three_masks_make_a_map(run):
    page = opened(similarity_set="methods", domain="legal")
    assert not page.exception and not page.error
    assert metrics(page)["Same domain"] == "unknown" and "on equal terms" not in words(page).lower()
    carried = {(a, b): v for a, b, v, *_ in figure(page, "similarity-all-heatmap")["data"][1]["customdata"]}
    for a, b in itertools.combinations(("dpruner", "magnitude", "random"), 2):
        assert carried[a, b] == pytest.approx(jaccard(masks(run, a, "legal"), masks(run, b, "legal")))
    assert len(shown(figure(page, "similarity-map")["data"][0]["x"])) == 3


def test_all_masks_compare_domains_within_a_method_only(run):
    page = opened(similarity_set="all")
    assert not page.exception and not page.error
    same, other = on_equal_terms(run)
    assert metrics(page)["½ text: 2 domains"] == f"{other:.3f}" and metrics(page)["½ text: 1 domain"] == f"{same:.3f}"
    assert "ore alike than any two of different domains" in words(page)   # of six masks, two are of one method and have halves


def test_the_same_masks_are_said_to_be_the_same(run):
    page = opened(method="magnitude")
    assert "the same, weight by weight" in page.info[0].value and "magnitude, prunes alike for every domain" in page.info[0].value


@pytest.mark.parametrize("view", ["module", "layer"])
def test_every_module_and_layer(run, view):
    page = opened(similarity_view=view)
    assert not page.exception and not page.error
    both = [masks(run, "dpruner", d) for d in ("healthcare", "legal")]
    groups = list(dict.fromkeys(split_name(n)[view == "module"] for n in both[0]))
    expected = {g: jaccard(*both, lambda n, g=g: split_name(n)[view == "module"] == g) for g in groups}
    profile = {t["name"]: dict(zip(t["x"], shown(t["y"]), strict=True)) for t in figure(page, "similarity-profile")["data"]}
    assert profile["healthcare and legal"] == pytest.approx(expected)
    for side, name in enumerate(("same domain, from half the text each", "two domains, from half the text each")):
        assert profile[name] == pytest.approx({g: on_equal_terms(run, of=lambda n, g=g: split_name(n)[view == "module"] == g)[side] for g in groups})
    grid = {c[0]: c[3] for t in figure(page, "similarity-grid")["data"] if "customdata" in t for c in t["customdata"]}
    assert grid == pytest.approx(expected)
    chosen = page.selectbox(key=f"similarity-{view}")
    assert list(chosen.options) == [str(g) for g in groups]
    page = chosen.select(groups[-1]).run()
    assert metrics(page)["Mean of all pairs"] == f"{expected[groups[-1]]:.3f}" and not page.error


@pytest.mark.parametrize("percent", [0, 100])
def test_the_ends_of_the_slider_say_why_there_is_nothing_to_see(run, percent):
    page = opened(sparsity=percent)
    assert "every mask" in page.info[0].value and not figures(page) and not page.error and not page.exception


def test_every_matrix(run):
    page = opened(similarity_view="matrix", block=1, module="mlp.up_proj")
    both = [masks(run, "dpruner", d) for d in ("healthcare", "legal")]
    expected = {split_name(n): jaccard(*both, lambda m, n=n: m == n) for n in both[0]}
    assert cells(figure(page, "similarity-matrices")) == pytest.approx(expected)
    assert metrics(page)["Mean of all pairs"] == f"{expected[1, 'mlp.up_proj']:.3f}" and not page.exception and not page.error


def test_beside_the_open_domain(run):
    page = opened(similarity_view="open", sparsity=75)
    assert not page.exception and not page.error
    def cut(side, domain):
        return masks(run, side, domain, 75)

    expected = [np.mean([jaccard(cut("general", "healthcare"), cut(side, d)) for d in ("healthcare", "legal")]) for side in ("domain", "dpruner")]
    among = [jaccard(cut(side, "healthcare"), cut(side, "legal")) for side in ("domain", "dpruner")]
    table = page.dataframe[0].value
    assert table.iloc[:, 1].tolist() == pytest.approx([expected[0], among[0], expected[1], among[1]])
    same, other = on_equal_terms(run, 75)
    assert table["½ text: 1 domain"].iloc[3] == pytest.approx(same) and table["½ text: 2 domains"].iloc[3] == pytest.approx(other)
    own = {d: [cut("domain", f"{d}~{n}") for n in (1, 2)] for d in ("healthcare", "legal")}
    assert table["½ text: 1 domain"].iloc[1] == pytest.approx(np.mean([jaccard(*both) for both in own.values()]))


@pytest.mark.parametrize("measure", ["cosine", "corrected", "overlap"])
def test_other_measures(run, measure):
    page = opened(similarity_measure=measure)
    a, b = (masks(run, "dpruner", d) for d in ("healthcare", "legal"))
    flat = [np.concatenate([m[n].reshape(-1) for n in a]) for m in (a, b)]
    both, kept = (flat[0] & flat[1]).sum(), [f.sum() for f in flat]
    expected = {"cosine": both / np.sqrt(kept[0] * kept[1]), "overlap": both / min(kept), "corrected": (jaccard(a, b) - 1 / 3) / (2 / 3)}[measure]
    assert metrics(page)["Mean of all pairs"] == f"{expected:.3f}" and not page.exception and not page.error


def test_runs_of_one_model_stand_side_by_side(run):
    second = run.folder.with_name("20300101-000000-second")
    shutil.copytree(run.folder, second)
    page = opened(run=run.id, similarity_runs=[second.name])
    assert not page.exception and not page.error
    assert f"**(A)** {run.id}; **(B)** {second.name}" in words(page)
    carried = {(a, b): v for a, b, v, *_ in figure(page, "similarity-all-heatmap")["data"][1]["customdata"]}
    assert carried["legal (A)", "legal (B)"] == 1 and len(carried) == 16
    assert "of 4 pairs" in words(page)   # a domain and itself, of another run, say nothing about domains
    record = json.loads((second / "run.json").read_text())
    record["config"]["nsamples"] = 99
    store.write_json(second / "run.json", record)
    assert "of 2 pairs" in words(opened(run=run.id, similarity_runs=[second.name]))   # nor do masks from other amounts of text
    record = json.loads((second / "run.json").read_text())
    record["model"]["fingerprint"] = "another"
    store.write_json(second / "run.json", record)
    page = opened(run=run.id, similarity_runs=[second.name])
    assert page.multiselect(key="similarity-runs").value == [] and not page.exception


def test_what_is_missing_is_said_and_the_rest_goes_on(run):
    for n in (1, 2):
        run.path("masks", "dpruner", f"legal~{n}").unlink()
    page = opened()
    assert metrics(page)["Same domain"] == "unknown" and figures(page) and not page.exception and not page.error
    run.path("masks", "dpruner", "legal").write_bytes(b"torn")
    page = opened()
    assert "dpruner@legal.safetensors cannot be read" in page.error[0].value and not page.exception
    run.path("ranks", "random", "legal").unlink(missing_ok=True)
    page = opened(method="random", sparsity=75)
    assert "There is nothing to compare" in page.error[0].value and not page.exception

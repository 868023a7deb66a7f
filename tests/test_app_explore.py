"""The page Explore: three steps from all matrices to single weights, against counting by hand; what it says where something is missing."""

import re
import shutil

import numpy as np
import pages
import pytest
from pages import cells, changed, figure, figures, shown, words
from safetensors import safe_open

from analysis.matrices import split_name
from app import state
from dpruner import store
from dpruner.store import Run

MATRIX = "model.layers.1.mlp.up_proj.weight"


def opened(domain="healthcare", block=1, module="mlp.up_proj", **session):
    return pages.opened("explore", domain=domain, block=block, module=module, **session)


def masks(run: Run, percent: int, *domains: str) -> list[dict[str, np.ndarray]]:
    """{matrix: bool} of D-Pruner's own masks, or cut from ranks where 256 steps do that exactly."""
    if percent == 50:
        return [{n: m.numpy() for n, m in run.masks("dpruner", d).items()} for d in domains]
    return [{n: r.numpy() >= 256 * percent // 100 for n, r in run.ranks("dpruner", d).items()} for d in domains]


def regions(a: np.ndarray, b: np.ndarray) -> list[int]:
    return [int(x.sum()) for x in (a & b, a & ~b, ~a & b, ~a & ~b)]


@pytest.mark.parametrize("percent", [50, 75])
def test_two_masks_from_the_whole_model_to_single_weights(run, percent):
    page = opened(sparsity=percent, explore_row=9, explore_column=3, explore_size=16)
    assert not page.exception and not page.error
    assert ("Shown: the masks as the run made them" in words(page)) == (percent == 50)
    a, b = masks(run, percent, "healthcare", "legal")
    assert cells(figure(page, "explore-matrices")) == pytest.approx({split_name(n): (a[n] & b[n]).sum() / (a[n] | b[n]).sum() for n in a})

    mine, other = a[MATRIX], b[MATRIX]
    overview = figure(page, "explore-overview")
    for top, bottom, left, right, share in shown(overview["data"][1]["customdata"]):
        rows, columns = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
        assert share == pytest.approx((mine[rows, columns] != other[rows, columns]).mean())
    frame = overview["layout"]["shapes"][0]
    assert (frame["y0"], frame["y1"], frame["x0"], frame["x1"]) == (8.5, 24.5, 2.5, 18.5)

    rows, columns = slice(9, 25), slice(3, 19)
    table = page.dataframe[0].value
    assert table["kept by"].tolist() == ["both", "only dpruner for healthcare", "only dpruner for legal", "neither"]
    assert [int(n.replace(",", "")) for n in table["in the window"]] == regions(mine[rows, columns], other[rows, columns])
    assert [int(n.replace(",", "")) for n in table["in the whole matrix"]] == regions(mine, other)
    assert f"they share {100 * (mine & other).sum() / (mine | other).sum():.1f} %" in words(page)


def hovered(page) -> dict[str, np.ndarray]:
    """{name: values} of what the hover over the single weights says: (rows, columns), or (rows, columns, 2) of a range."""
    trace = figure(page, "explore-tile")["data"][0]
    values, found = shown(trace["customdata"]), {}
    for line in trace["hovertemplate"].split("<br>"):
        if at := [int(n) for n in re.findall(r"customdata\[(\d+)\]", line)]:
            found[line.partition(": ")[0]] = values[..., at].squeeze(-1) if len(at) == 1 else values[..., at]
    return found


def test_what_the_hover_says_of_every_weight(run, small):
    page = opened(explore_row=9, explore_column=3, explore_size=16)
    rows, columns = slice(9, 25), slice(3, 19)
    with safe_open(f"{small.config.model}/model.safetensors", "numpy") as file:
        expected = {"w": file.get_tensor(MATRIX)[rows, columns]}
    general, = (small.cache / "general").rglob("*.safetensors")
    expected["G"] = store.read_tensors(general)[MATRIX].numpy()[rows, columns]
    for domain in ("healthcare", "legal"):
        ranks = run.ranks("dpruner", domain)[MATRIX].numpy()[rows, columns].astype(int)
        edges = store.read_tensors(run.path("edges", "dpruner", domain))[MATRIX].numpy()
        expected |= {f"S, dpruner for {domain}": np.stack([edges[ranks], edges[ranks + 1]], axis=-1), f"rank, dpruner for {domain}": ranks}
        lowest = f"threshold, dpruner for {domain}: {edges[128]:.3g}"
        assert lowest in figure(page, "explore-tile")["data"][0]["hovertemplate"]
    told = hovered(page)
    assert told.keys() == expected.keys()
    for name, values in expected.items():
        assert np.allclose(told[name], values, rtol=1e-6), name


def test_one_mask_alone(run):
    page = opened(explore_other="nothing", explore_size=16)
    assert not page.exception and not page.error
    assert "Every matrix keeps the same share, 50.0 %" in words(page) and not page.dataframe and "explore-matrices" not in str(figures(page))
    (mine,) = masks(run, 50, "healthcare")
    kept = int(mine[MATRIX][:16, :16].sum())
    assert [t["name"] for t in figure(page, "explore-tile")["data"][1:]] == [f"kept ({kept:,})", f"removed ({256 - kept:,})"]


def test_the_importances_behind_a_mask_are_there_to_compare(run):
    page = opened(explore_other="open-domain importance", sparsity=50)
    assert "cut from the ranks at 50 %" in words(page) and not page.exception and not page.error
    a, b = (run.ranks(side, "healthcare")[MATRIX].numpy() >= 128 for side in ("dpruner", "general"))
    assert [int(n.replace(",", "")) for n in page.dataframe[0].value["in the whole matrix"]] == regions(a, b)
    assert "legal's own importance" in page.selectbox(key="explore-other").options


def test_a_head_is_jumped_to_and_the_window_stays_inside(run):
    page = opened(module="self_attn.q_proj", explore_size=16)
    page = page.number_input(key="explore-head").set_value(1).run()
    size = run.record["model"]["heads"]["model.layers.1.self_attn.q_proj.weight"][1]
    assert page.number_input(key="explore-row").value == size and not page.error
    shapes = {n: m.shape for n, m in run.masks("dpruner", "legal").items()}
    last = shapes["model.layers.1.mlp.up_proj.weight"][0] - 1
    page = changed(changed(page, module="mlp.up_proj"), explore_row=last)
    page = changed(page, module="mlp.down_proj")
    assert page.number_input(key="explore-row").value == shapes["model.layers.1.mlp.down_proj.weight"][0] - 1 < last
    assert page.selectbox(key="explore-no-head").disabled and not page.exception and not page.error


def test_a_mask_of_another_run_of_the_model(run):
    second = run.folder.with_name("20300101-000000-second")
    shutil.copytree(run.folder, second)
    page = opened(run=run.id, explore_other=f"dpruner for healthcare ({second.name})")
    assert "a picture would have one colour" in words(page) and not page.exception and not page.error
    table = page.dataframe[0].value
    assert table["in the whole matrix"][1:3].tolist() == ["0", "0"]


def test_what_is_missing_is_said_and_the_rest_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "CACHE", tmp_path / "empty")
    page = opened(explore_size=16)
    low, high = np.moveaxis(hovered(page)["G"], -1, 0)   # from the run's ranks: a range
    assert (low <= high).all() and not page.error
    for side in ("ranks", "edges"):
        for name in ("dpruner@healthcare", "general@healthcare"):
            (run.folder / side / f"{name}.safetensors").unlink()
    page = opened(explore_size=16)
    assert "S and rank of dpruner for healthcare are not shown" in words(page) and "G is not shown" in words(page) and not page.error
    page = opened(sparsity=75)
    assert "The mask of dpruner for healthcare cannot be shown at 75 %" in page.error[0].value and not page.exception
    run.path("masks", "dpruner", "legal").write_bytes(b"torn")
    page = opened()
    assert "dpruner@legal.safetensors cannot be read" in page.error[0].value and not page.exception

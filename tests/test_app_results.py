"""The page Results: what it says of quality is what the run's losses say, window by window."""

import numpy as np
import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest
from pages import MAIN

from analysis import results
from analysis.chart import signed
from app import data, state
from dpruner import store


@pytest.fixture
def run(small, monkeypatch):
    """The small run, as the only one."""
    monkeypatch.setattr(state, "RUNS", small.runs)
    monkeypatch.setattr(state, "CACHE", small.cache)
    return small.run


def opened(**selection) -> AppTest:
    page = AppTest.from_file(MAIN, default_timeout=60)
    for key, value in selection.items():
        page.session_state[key] = value
    page.switch_page("views/results.py")
    return page.run()


def test_losses_are_what_the_perplexities_are_made_of(run):
    losses, metrics = run.losses(), run.metrics()
    found = metrics[metrics.metric == results.PERPLEXITY]
    assert set(found.method) == {"dense", "dpruner", "magnitude", "random"}
    for r in found.itertuples():
        rows = losses[(losses.method == r.method) & (losses.text == r.text) & losses.domain.isin([r.domain, ""])]
        assert np.exp(rows.loss.sum() / rows.tokens.sum()) == pytest.approx(r.value, rel=1e-12) and len(rows) == r.n


def test_what_is_of_this_run_stands_before_the_experiments(run):
    page = opened()
    order = [heading.value for heading in page.subheader]
    assert order[-1] == "Experiments" and {"Size and speed", "Export the checkpoint", "All figures of this run"} <= set(order)
    assert page.multiselect(key="results-values-sparsity").options[:2] == ["10 %", "20 %"], "a sparsity is a percentage, as everywhere on the pages"


def test_differences_are_taken_on_the_same_windows(run):
    losses = run.losses()
    values = {m: np.exp(rows.loss.sum() / rows.tokens.sum()) for m, rows in losses[losses.text == "legal"].groupby("method")}
    gap = results.against(losses, "legal", "random", "dense")["legal"]
    assert gap == pytest.approx(values["random"] / values["dense"] - 1) and gap.low <= gap <= gap.high
    same = results.against(losses, "legal", "dpruner", "dpruner")["legal"]
    assert (same, same.low, same.high) == (0, 0, 0)
    # a tenth of a nat a token, however much windows differ from each other
    shifted = losses[losses.method == "dense"].assign(method="worse", domain="legal", loss=lambda t: t.loss + 0.1 * t.tokens)
    worse = results.against(pd.concat([losses, shifted]), "legal", "worse", "dense")["legal"]
    assert worse == pytest.approx(np.expm1(0.1)) and worse.low == pytest.approx(worse) == pytest.approx(worse.high)


def test_the_page_says_so(run):
    page = opened(method="magnitude", domain="legal")
    assert not page.error and not page.exception
    gaps = data.against(run, "magnitude", "legal")
    said = "\n".join(m.value for m in page.markdown)
    for text in ("legal", "general"):
        gap = gaps["dense"][text]
        assert f"that is **{signed(100 * gap)} %** (95\u00a0%: {signed(100 * gap.low)} to {signed(100 * gap.high)}) against dense" in said
    (table,) = [d.value for d in page.dataframe if "against" in d.value]
    assert list(table.against) == ["dpruner", "dpruner", "random", "random"] and set(table["magnitude for legal is"]) <= {"better", "worse", "inside the noise"}


def test_a_run_whose_losses_are_gone_says_so_and_shows_the_rest(small, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(small.runs, tmp_path / "runs")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(state, "CACHE", small.cache)
    store.find_runs(tmp_path / "runs")[0].folder.joinpath("losses.parquet").write_bytes(b"PAR1")
    page = opened()
    assert len(page.error) == 1 and "losses.parquet cannot be read" in page.error[0].value and not page.exception
    assert any("Size and speed" in s.value for s in page.subheader)


def test_a_run_that_is_gone_is_named(run):
    page = AppTest.from_file(MAIN, default_timeout=60)
    page.query_params["run"] = "20200101-000000-gone"
    page.switch_page("views/results.py").run()
    assert "The run 20200101-000000-gone cannot be shown" in page.warning[0].value and not page.exception
    assert page.sidebar.selectbox(key="run").value == run.id

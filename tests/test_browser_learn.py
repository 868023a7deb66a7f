"""A lesson in a real browser, from the first step to the last; the numbers on the wall are those of the engine."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser, served, settled
from test_browser import SIZE, calm, shown, wait_for

from analysis.chart import number, percent
from analysis.lesson import numbers, prepare
from dpruner import store
from dpruner.domain import domain_importance
from dpruner.loading import load_model
from dpruner.masks import make_masks

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def visit(lesson, small, tmp_path_factory):
    """The app with the finished lesson and one run, and a student's window."""
    runs = tmp_path_factory.mktemp("student") / "runs"
    shutil.copytree(small.runs, runs)
    with served(runs, lesson.cache) as address, browser() as chromium:
        page = chromium.new_context(**SIZE).new_page()
        page.set_default_timeout(30_000)
        yield SimpleNamespace(address=address, page=page, folder=lesson.run.folder, run=small.run)


def at(visit, step: str, **parameters) -> None:
    """Open a step by its link."""
    visit.page.goto(f"{visit.address}/learn?" + "&".join([f"learn-step={step}", *(f"learn-{k}={v}" for k, v in parameters.items())]))
    calm(visit.page)


def test_the_whole_lesson_by_next_alone(visit):
    page = visit.page
    page.goto(f"{visit.address}/learn")
    names = ["Why", "Linear", "Columns", "Sentence", "Plane", "Sparsity", "Predict", "Similarity", "Speed"]
    for place, name in enumerate(names):
        page.get_by_role("heading", name=re.compile(rf"^{place + 1}\. ")).wait_for()
        calm(page)
        words = shown(page)
        assert all(part in words for part in ("Try.", "Check yourself.", "On my run:")), name
        assert page.locator(".katex-display").count() >= 1 and (name == "Predict" or page.locator(".js-plotly-plot").count() >= 1), name
        assert page.locator(".katex-error").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")   # nothing hangs out of 1,280 pixels
        if place:
            assert f"learn-step={name}" in page.url
        if place + 1 < len(names):
            page.get_by_role("button", name=f"Next: {names[place + 1]}").focus()
            page.keyboard.press("Enter")


def test_hover_writes_the_arithmetic_and_a_click_chooses_the_weight(visit):
    page, tensors = visit.page, store.read_tensors(visit.folder / "layer.safetensors")
    at(visit, "Linear", view="d:+cost+G")
    plot = page.locator(".js-plotly-plot").first
    box = plot.locator(".nsewdrag").first.bounding_box()
    x, y = (box[side] + (cell + 0.5) * box[length] / 32 for side, length, cell in (("x", "width", 5), ("y", "height", 9)))
    page.mouse.move(x, y)
    told = wait_for(lambda: " ".join(plot.locator(".hoverlayer .hovertext").all_text_contents()))
    assert "row 9, column 5" in told and "G = w² / U²" in told
    page.mouse.click(x, y)
    page.get_by_text("The weight in row 9, column 5, written out.").wait_for()
    settled(page)
    assert page.get_by_role("spinbutton", name="Row (output)").input_value() == "9" and "learn-row=9" in page.url
    rank = float((tensors["G"] < tensors["G"][9, 5]).double().mean())
    assert f"{percent(rank)} of the matrix's weights cost less than this one" in shown(page)


def test_the_animation_plays_and_its_slider_stops_where_one_wants(visit):
    page, tensors = visit.page, store.read_tensors(visit.folder / "layer.safetensors")
    inputs = numbers.related_inputs(tensors["H"], 12)
    found = numbers.compensation(tensors["W"][:8][:, inputs], tensors["H"][inputs][:, inputs], 0.5)
    at(visit, "Columns")
    plot = page.locator(".js-plotly-plot").first
    bars = "p => Array.from(p.data[2].y)"
    handle = plot.element_handle()
    assert handle.evaluate(bars) == pytest.approx([found.plain[-1], found.moved[-1]])   # complete before a click
    plot.locator(".updatemenu-button", has_text="Play").click()
    wait_for(lambda: 0 < handle.evaluate(bars)[0] < found.plain[-1])
    plot.locator(".updatemenu-button", has_text="Pause").click()
    page.wait_for_timeout(300)
    seen = handle.evaluate(bars)
    step = int(np.abs(found.plain - seen[0]).argmin())
    assert seen == pytest.approx([found.plain[step], found.moved[step]])


def test_lambda_flips_what_is_counted(visit):
    page = visit.page
    rows = store.read_json(visit.folder / "flips.json")["rows"]
    at(visit, "Sentence", **{"formula": "release", "power-release": 6})

    def count(power: int) -> str:
        row = next(r for r in rows if r["formula"] == "release" and np.isclose(r["lam"], 10.0**power))
        return f"{row['from_zero']:,}"

    cell = page.locator("table tr", has_text="model").locator("td").nth(1)
    assert cell.inner_text() == count(6)
    thumb = page.get_by_role("slider", name="the weight of the general side")
    thumb.focus()
    for _ in range(2):
        thumb.press("ArrowRight")
    wait_for(lambda: cell.inner_text() == count(8))
    assert "learn-power-release=8" in page.url and count(8) != count(6)


def test_a_sentence_is_typed_and_another_before_the_first_is_counted(visit):
    page = visit.page
    at(visit, "Sentence")
    field = page.get_by_role("textbox", name="A sentence of the domain")
    for text in ("Rest helps.", "Water helps as well."):
        field.fill(text)
        field.press("Enter")
    page.get_by_text(re.compile("W · a · t · e · r")).first.wait_for()
    cell = page.locator("table tr", has_text="model").locator("td").nth(1)
    model, tokenizer = load_model(store.Run(visit.folder).config["model"])
    ids, G = [torch.tensor([tokenizer(text).input_ids])], store.read_scores(next((visit.folder.parents[1] / "general").glob("*.safetensors")))
    dual, alone = (make_masks(domain_importance(model, ids, G, "balanced", lam).dual, prepare.SPARSITY) for lam in (1.0, 0.0))
    wait_for(lambda: cell.inner_text() == f"{sum(int((dual[n] ^ alone[n]).sum()) for n in G):,}")
    page.locator(".js-plotly-plot").nth(1).locator(".legendtext", has_text="release").wait_for()   # all λ, by every formula
    assert page.locator("table tr", has_text="model").count() == 1 and "being counted" not in shown(page)


def test_the_model_falls_apart_under_the_slider(visit):
    page = visit.page
    rows = store.read_json(visit.folder / "fall.json")["rows"]
    mask = make_masks({"": store.read_tensors(visit.folder / "layer.safetensors")["dual"]}, 0.6)[""]
    at(visit, "Sparsity")
    main = page.locator("[data-testid=stMain]")
    thumb = main.get_by_role("slider", name="Sparsity: how much of every matrix")
    thumb.focus()
    thumb.press("ArrowRight")
    wait_for(lambda: f"{int(mask.sum()):,}" in main.inner_text())
    here = next(r for r in rows if round(100 * r["sparsity"]) == 60 and r["text"] == prepare.DOMAIN)
    settled(page)
    assert number(here["value"]) in main.inner_text() and "learn-sparsity=60" in page.url


def test_answers_come_after_the_guess_and_the_run_is_one_click_away(visit):
    page = visit.page
    at(visit, "Predict")
    assert page.locator(".js-plotly-plot").count() == 0
    page.locator(".st-key-learn-guess-random").get_by_text("33", exact=True).click()
    page.get_by_text("Right.").wait_for()
    at(visit, "Plane")
    page.get_by_role("link", name="The plane of my run, with a brush").click()
    page.get_by_role("heading", name="Overlap", level=1).wait_for()
    assert f"run={visit.run.id}" in page.url
    page.go_back()   # brings the page without its step
    question = page.get_by_role("heading", name="5. Which weights do both sides need, which only one?")
    question.wait_for()
    page.wait_for_url(lambda url: "learn-step=Plane" in url)
    settled(page)
    page.get_by_role("button", name="Next: Sparsity").click()   # at the foot of a long page; the next step begins at its top
    page.get_by_role("heading", name="6. How much can go before it falls apart?").wait_for()
    wait_for(lambda: page.evaluate("document.querySelector('[data-testid=stMain]').scrollTop") == 0)

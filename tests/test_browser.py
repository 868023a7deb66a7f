"""The story of a visit, in a real browser, from an empty folder to a link passed on.

Every test is a chapter and goes on where the one before ended.
"""

import os
import re
import signal
import time
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest
from browser import CHROMIUM, PAGES, browser, served, settled

from app import state
from dpruner import RunConfig, store, worker
from dpruner.store import Run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
DRAWN = ("layers", "overlap", "similarity", "explore", "results")
SIZE = {"viewport": {"width": 1280, "height": 900}}
VIEW = {"method": "magnitude", "domain": "legal", "block": "2", "module": "mlp.up_proj", "sparsity": "70"}


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """The app over an empty folder, and one visitor with a browser window.

    Attributes:
        address, runs: of the app, and its folder.
        chromium, page: the browser, and the visitor's window.
        run: the run that the visitor starts, once there is one.
    """
    root = tmp_path_factory.mktemp("visit")
    (root / "runs").mkdir()
    with served(root / "runs", root / "cache") as address, browser() as chromium:
        context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"], **SIZE)
        page = context.new_page()
        page.set_default_timeout(60_000)
        yield SimpleNamespace(address=address, runs=root / "runs", chromium=chromium, page=page, run=None)
        for run in [*store.find_runs(root / "runs"), *store.find_runs(root / "cache" / "lesson")]:   # what a chapter has left
            if worker.state(run)["state"] in ("queued", "running"):
                psutil.Process(run.status["pid"]).kill()


def newest(visit) -> Run:
    return store.find_runs(visit.runs)[0]


def wait_for(what, seconds: float = 60):
    """The first true value of `what()`."""
    deadline = time.time() + seconds
    while not (found := what()):
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def shown(page) -> str:
    """All words of the page."""
    return page.locator("[data-testid=stMain]").inner_text()


def says(page, words: str, seconds: float = 60) -> None:
    """It stands on the page, or will before the time is over."""
    page.get_by_text(words).first.wait_for(timeout=1000 * seconds)


def calm(page) -> None:
    """Nothing on the page complains, once it is drawn: until then what the last drawing said stands there too."""
    settled(page)
    assert page.locator("[data-testid=stException]").count() == 0
    assert [e.inner_text() for e in page.locator("[data-testid=stAlertContentError]").all()] == []


def turn_to(page, name: str) -> None:
    """Another page, by its link."""
    page.locator("[data-testid=stSidebarNav]").get_by_role("link", name=name.capitalize()).click()
    page.wait_for_url(re.compile(rf"/{name}(\?|$)"))
    page.get_by_role("heading", name=name.capitalize(), level=1).wait_for()
    settled(page)


def started(visit) -> int:
    """The process of the newest run, once it is at work."""
    return wait_for(lambda: (s := worker.state(newest(visit)))["state"] == "running" and s["progress"] > 0 and s["pid"])


def test_the_demonstration_starts_by_itself_and_its_death_is_told_within_ten_seconds(visit):
    page = visit.page
    page.goto(visit.address)
    says(page, "loses 50 % of its prunable weights, three times, each time from the full model, for healthcare, legal and finance")
    says(page, "It reads finance, such as")
    calm(page)
    os.kill(started(visit), signal.SIGKILL)
    says(page, "The run stopped in the middle: its process was killed", 10)
    page.locator(f".st-key-run-resume-{newest(visit).id} button:visible").wait_for()


def test_a_run_is_started_by_the_form_and_its_progress_moves(visit):
    page = visit.page
    page.get_by_role("button", name="More settings").or_(page.get_by_text("More settings")).first.click()
    for field, value in (("Sequences per domain", "8"), ("Tokens per sequence", "64"), ("Held-out documents", "1")):
        page.get_by_role("spinbutton", name=field).fill(value)
        page.get_by_role("spinbutton", name=field).press("Enter")
    program = {"name": "a.exe", "mimeType": "application/x-msdownload", "buffer": b"MZ"}
    page.locator("[data-testid=stFileUploader] input").set_input_files(program)
    says(page, "files are not allowed")   # the browser keeps it back, and the form stays as it is
    settled(page)
    before = newest(visit).id
    page.get_by_role("button", name="Start", exact=True).click()
    wait_for(lambda: newest(visit).id != before)
    visit.run = newest(visit)
    wait_for(lambda: page.evaluate("document.querySelector('[data-testid=stMain]').scrollTop") == 0, 10)   # where the run is seen
    assert RunConfig.from_dict(visit.run.config) == RunConfig(
        domains=("healthcare", "legal"), methods=("dpruner", "magnitude"), nsamples=8, seqlen=64, eval_documents=1)
    bar, seen = page.locator("[data-testid=stProgress]"), set()
    wait_for(lambda: seen.add(re.search(r"\d+ %", bar.inner_text())[0]) or len(seen) >= 3)   # it moves before the visitor's eyes
    process = psutil.Process(started(visit))
    process.suspend()   # the story must not end before its middle has been told
    says(page, f"{visit.run.id} is running.")


def test_a_reload_and_a_second_browser_find_the_run_and_another_one_waits_visibly(visit):
    page, frozen = visit.page, psutil.Process(visit.run.status["pid"])
    page.reload()
    says(page, f"{visit.run.id} is running.")
    second = visit.chromium.new_context(**SIZE).new_page()
    second.goto(visit.address)
    says(second, f"{visit.run.id} is running.")
    share = re.search(r"\d+ %", second.locator("[data-testid=stProgress]").inner_text())[0]
    assert share in page.locator("[data-testid=stProgress]").inner_text()
    second.get_by_role("button", name="Start", exact=True).click()
    for window in (second, page):
        says(window, "waits: 1 run before it on cpu.")
    waiting = newest(visit)
    assert waiting.id != visit.run.id and worker.state(waiting)["state"] == "queued"
    second.locator(f".st-key-run-cancel-{waiting.id} button:visible").click()
    for window in (second, page):
        says(window, f"{waiting.id} was cancelled before it had finished anything.")
    assert worker.state(waiting)["state"] == "cancelled" and worker.state(visit.run)["state"] == "running"
    second.context.close()
    frozen.resume()


def test_what_is_found_grows_and_in_the_end_the_result_stands_there(visit):
    page = visit.page
    says(page, "What dpruner keeps of every attention head")
    page.get_by_role("heading", name="Latest result").wait_for()
    wait_for(lambda: visit.run.id in shown(page) and "Similarity of the domains' masks" in shown(page))
    assert worker.state(visit.run)["state"] == "done"
    calm(page)


def test_every_page_is_reached_and_shows_itself_without_an_error(visit):
    page = visit.page
    for name in filter(None, PAGES):
        turn_to(page, name)
        calm(page)
        assert not page.get_by_text("Deploy", exact=True).count()   # the settings that lie beside the app hold wherever it is started
        if name in DRAWN:
            assert page.locator(".js-plotly-plot").count() >= 1 and page.get_by_text("How to read this").count() >= 1, name


def test_the_sparsity_slider_changes_what_is_said_and_follows_to_the_next_page(visit):
    page = visit.page
    turn_to(page, "layers")
    says(page, "when 50 % of the whole model go at once")
    thumb = page.locator("[data-testid=stSidebar]").get_by_role("slider", name="Sparsity")
    thumb.focus()
    for _ in range(4):
        thumb.press("ArrowRight")
    says(page, "when 54 % of the whole model go at once")
    turn_to(page, "overlap")
    assert "sparsity=54" in page.url and thumb.input_value() == "54"


def test_texts_stream_and_their_differences_are_marked(visit):
    page = visit.page
    turn_to(page, "generate")
    page.get_by_role("button", name="Generate", exact=True).click()
    texts, lengths = page.locator("[data-testid=stHtml] div[style*=pre-wrap]"), set()
    wait_for(lambda: lengths.add(sum(map(len, texts.all_inner_texts()))) or
             page.get_by_text("Perplexity of every text under every model").count())
    calm(page)
    assert len(lengths) > 5   # it grew while one looked on
    assert texts.count() == 3 and texts.first.locator("span[style*=border-bottom]").count() == 0   # dense, and two pruned ones
    assert texts.nth(1).locator("span[style*=border-bottom]").count() > 0
    assert "not in the dense text" in texts.nth(1).locator("span[style*=border-bottom]").first.get_attribute("title")


def test_data_a_figure_and_the_config_are_taken_away(visit):
    page = visit.page

    def taken(name: str) -> str:
        with page.expect_download() as download:
            page.get_by_role("button", name=name).last.click()
        return download.value.path().read_text()

    turn_to(page, "similarity")
    page.get_by_role("button", name="Take it away").first.click()
    header, *rows = taken("Data (CSV)").splitlines()
    assert "jaccard" in header and any("healthcare" in row and "legal" in row for row in rows)
    figure = taken("Figure (HTML)")
    assert "Plotly.newPlot" in figure and "healthcare" in figure
    page.keyboard.press("Escape")
    page.goto(f"{visit.address}/?run={visit.run.id}")
    page.get_by_role("heading", name="All runs").wait_for()
    settled(page)
    chosen = page.get_by_role("combobox", name="Run to look at")
    chosen.focus()
    chosen.press("ArrowDown")   # a click that scrolls the page closes the list again
    page.get_by_role("option", name=visit.run.id).click()
    says(page, "This run is finished.")
    assert RunConfig.from_dict(store.json.loads(taken("Config file"))["config"]) == RunConfig.from_dict(visit.run.config)


COVERED = """() => [...document.querySelectorAll(".js-plotly-plot")].flatMap(plot => {
    const over = (a, b) => b.width > 0 && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom
    const buttons = [...plot.querySelectorAll(".modebar-btn")].map(e => e.getBoundingClientRect())
    const words = [...plot.querySelectorAll(".legend .traces, .gtitle, .xtitle, .ytitle")].map(e => [e.textContent, e.getBoundingClientRect()])
    return words.filter(([, box]) => buttons.some(button => over(button, box))).map(([text]) => text)})"""


@pytest.mark.parametrize("width", [1024, 1440])
def test_the_buttons_of_a_figure_cover_no_words(width, visit):
    page = visit.chromium.new_context(viewport={"width": width, "height": 900}).new_page()
    for view in ("layers", "overlap", "similarity", "results"):
        page.goto(f"{visit.address}/{view}")
        settled(page)
        assert page.locator(".modebar-btn").count() >= 4 and page.locator(".legend .traces").count() >= (view != "similarity")
        assert page.evaluate(COVERED) == [], view
    page.context.close()


NARROW = """() => {   // words of figures that lie over each other, or stick out of their figure
    const words = selector => [...document.querySelectorAll(selector)].filter(e => e.textContent.trim())
        .map(e => [e.getBoundingClientRect(), e.textContent, e.closest(".svg-container")])
    const over = ([a, , of], [b, , too]) => of === too && a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 2 && b.top < a.bottom - 2
    const cells = words(".heatmap-label text"), notes = words(".annotation text"), ends = words(".textpoint text")
    const met = [cells, notes].flatMap(some => some.filter((a, i) => some.some((b, j) => j > i && over(a, b))))
    const cut = ends.filter(([box, , figure]) => box.right > figure.getBoundingClientRect().right + 1)
    return [...met, ...cut].map(([, text]) => text)
}"""


def test_words_of_figures_keep_apart_on_a_phone(visit):
    page = visit.chromium.new_context(viewport={"width": 420, "height": 900}).new_page()
    for name in ("layers", "overlap", "similarity"):
        page.goto(f"{visit.address}/{name}")
        page.locator(".svg-container").first.wait_for()
        settled(page)
        assert page.evaluate(NARROW) == [], name
    page.context.close()


def test_figures_fill_the_room_they_take(visit):
    page = visit.chromium.new_context(viewport={"width": 1440, "height": 900}).new_page()

    def layout(key: str, what: str):
        return page.evaluate(f"document.querySelector('.st-key-{key} .js-plotly-plot')._fullLayout.{what}")

    page.goto(f"{visit.address}/layers")
    settled(page)
    assert layout("layers-map", "_size.t") < 20 < layout("layers-whole", "_size.t")   # room above for a legend where there is one
    page.goto(f"{visit.address}/overlap")
    settled(page)
    assert layout("overlap-plane", "xaxis._length") > 0.6 * layout("overlap-plane", "width")
    page.context.close()


def clicked(page, key: str, n: int) -> list:
    """What the n-th click target of a figure carries, having been clicked."""
    page.locator(f".st-key-{key}").first.scroll_into_view_if_needed()
    page.wait_for_timeout(300)   # it scrolls
    x, y, carried = page.evaluate("""([key, n]) => {
        const plot = document.querySelector(`.st-key-${key} .js-plotly-plot`), layout = plot._fullLayout, box = plot.getBoundingClientRect()
        const trace = plot._fullData.find(t => t.type == "scatter" && t.customdata)
        return [box.x + layout.xaxis._offset + layout.xaxis.d2p(trace.x[n]), box.y + layout.yaxis._offset + layout.yaxis.d2p(trace.y[n]),
                Array.from(trace.customdata[n])]}""", [key, n])
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    return carried


def test_a_click_on_a_figure_chooses_what_lies_under_it(visit):
    page, there = visit.page, f"run={visit.run.id}&method=dpruner&domain=legal&block=0&module=self_attn.q_proj"
    for view, key in (("layers", "layers-map"), ("overlap", "overlap-map"), ("explore", "explore-matrices")):
        page.goto(f"{visit.address}/{view}?{there}")
        settled(page)
        entries = page.evaluate("history.length")
        block, module, _ = clicked(page, key, 12)
        page.wait_for_url(lambda url, block=block, module=module: f"block={block}" in url and f"module={module}" in url)
        settled(page)
        assert page.evaluate("history.length") == entries + 1   # Back is the matrix before, not one that nobody chose
        page.go_back()
        page.wait_for_url(lambda url: "block=0" in url and "module=self_attn.q_proj" in url)
        settled(page)
    top, _, left, *_ = clicked(page, "explore-overview", 1500)
    page.wait_for_url(lambda url: f"explore-row={top:.0f}" in url and f"explore-column={left:.0f}" in url)
    calm(page)


def test_a_link_of_the_lesson_names_everything_once(visit):
    page = visit.page
    turn_to(page, "learn")
    chosen = parse_qs(urlsplit(page.url).query)
    page.locator("[data-testid=stMain] [data-testid=stPageLink] a").first.click()
    page.wait_for_url(lambda url: "/learn" not in url)
    settled(page)
    found = parse_qs(urlsplit(page.url).query)
    assert all(len(values) == 1 for values in found.values())
    assert {key: found[key] for key in state.KEYS} == {key: chosen[key] for key in state.KEYS}


def test_a_copied_link_opens_the_same_view_in_a_second_browser(visit):
    page = visit.page
    page.goto(f"{visit.address}/layers?" + "&".join(f"{name}={value}" for name, value in VIEW.items()))
    settled(page)
    page.get_by_role("button", name="Copy a link to this view").click()
    says(page, "Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(f"{visit.address}/layers?")
    second = visit.chromium.new_context(**SIZE).new_page()
    second.goto(link)
    says(second, "when 70 % of the whole model go at once")
    aside = second.locator("[data-testid=stSidebar]")
    found = {name: aside.get_by_role("combobox", name=name).input_value() for name in ("Run", "Method", "Domain", "Layer", "Module")}
    assert found == {"Run": visit.run.id, "Method": "magnitude", "Domain": "legal", "Layer": "2", "Module": "mlp.up_proj"}
    assert aside.get_by_role("slider", name="Sparsity").input_value() == "70"
    calm(second)
    second.context.close()

"""The story of a visit, in a real browser: open, look at every page, change the sparsity, take data away, pass the link on."""

import shutil

import pytest
from browser import CHROMIUM, PAGES, browser, served, settled

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
DRAWN = ("layers", "overlap", "similarity", "explore", "results")


@pytest.fixture(scope="module")
def visit(small, tmp_path_factory):
    """(address of the app over one finished run, the browser)."""
    root = tmp_path_factory.mktemp("visit")
    shutil.copytree(small.runs, root / "runs")
    with served(root / "runs", small.cache) as address, browser() as chromium:
        yield address, chromium


@pytest.fixture
def page(visit):
    page = visit[1].new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    yield page
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_every_page_shows_itself_without_an_error(visit, page, name):
    page.goto(f"{visit[0]}/{name}")
    settled(page)
    assert page.locator("h1").first.inner_text().strip()
    assert page.locator("[data-testid=stException]").count() == 0
    assert [e.inner_text() for e in page.locator("[data-testid=stAlertContentError]").all()] == []
    if name in DRAWN:
        assert page.locator(".js-plotly-plot").count() >= 1
        assert page.get_by_text("How to read this").count() >= 1


def test_the_link_restores_the_view_in_a_second_browser(visit, page):
    page.goto(f"{visit[0]}/layers?domain=legal&block=1&module=mlp.up_proj&sparsity=70")
    settled(page)
    shown = page.url
    assert all(part in shown for part in ("domain=legal", "block=1", "module=mlp.up_proj", "sparsity=70"))
    second = visit[1].new_context().new_page()
    second.goto(shown)
    settled(second)
    aside = second.locator("[data-testid=stSidebar]")
    assert aside.get_by_role("combobox", name="Module").input_value() == "mlp.up_proj"
    assert aside.get_by_role("combobox", name="Domain").input_value() == "legal"
    assert aside.get_by_role("slider").input_value() == "70"
    second.close()


def test_the_selection_follows_from_page_to_page(visit, page):
    page.goto(f"{visit[0]}/layers?domain=legal&sparsity=70")
    settled(page)
    page.get_by_role("link", name="Overlap").first.click()
    page.wait_for_url("**/overlap**")
    settled(page)
    assert "domain=legal" in page.url and "sparsity=70" in page.url


def test_a_charts_data_can_be_taken_away(visit, page):
    page.goto(f"{visit[0]}/similarity")
    settled(page)
    page.get_by_role("button", name="Take it away").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Data (CSV)").first.click()
    text = download.value.path().read_text()
    assert "healthcare" in text and "," in text.splitlines()[0]

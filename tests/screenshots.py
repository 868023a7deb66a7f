"""`make screenshots`: every page, light and dark, from the demonstration run, into docs/screenshots."""

import tempfile
import time
from pathlib import Path

from browser import PAGES, ROOT, browser, served, settled

from app import demo
from dpruner import worker

FOLDER = ROOT / "docs" / "screenshots"


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs, cache = Path(scratch, "runs"), Path(scratch, "cache")
        run = worker.submit(demo.CONFIG, runs, cache)
        while worker.state(run)["state"] in ("queued", "running"):
            time.sleep(1)
        for theme in ("light", "dark"):
            with served(runs, cache) as address, browser() as chromium:
                page = chromium.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=theme)
                for name in PAGES:
                    page.goto(f"{address}/{name}")
                    settled(page)
                    if name == "generate":   # a page that shows nothing until it is asked
                        page.get_by_role("button", name="Generate", exact=True).click()
                        page.get_by_text("Perplexity of every text under every model").wait_for(timeout=120_000)
                        settled(page)
                        page.get_by_role("button", name="Generate", exact=True).scroll_into_view_if_needed()
                    if name == "learn":   # the first visit makes the lesson
                        page.get_by_text("Steps appear as they are ready").wait_for(state="detached", timeout=300_000)
                        settled(page)
                    page.screenshot(path=FOLDER / f"{name or 'run'}-{theme}.png")
                    print(f"{name or 'run'} {theme}", flush=True)


if __name__ == "__main__":
    main()

"""The app as a process of its own and a real browser on it; shared by the browser tests and the screenshots."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PAGES = ("", "layers", "overlap", "similarity", "explore", "generate", "results", "learn")


@contextlib.contextmanager
def served(runs: Path, cache: Path):
    """The app on a free port of this machine, started elsewhere than in its own folder; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"PYTHONPATH": str(ROOT), "DPRUNER_RUNS": str(runs), "DPRUNER_CACHE": str(cache)}
    server = subprocess.Popen([sys.executable, "-m", "streamlit", "run", str(ROOT / "app/main.py"), "--server.port", str(port), "--server.headless", "true"],
                              cwd=runs.parent, env={**os.environ, **places}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(10)


@contextlib.contextmanager
def browser():
    """A headless Chromium; yields Playwright's Browser."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def settled(page, seconds: float = 60) -> None:
    """Wait until Streamlit has nothing left to run and every figure is drawn."""
    page.wait_for_selector("[data-testid=stApp]", timeout=seconds * 1000)
    page.wait_for_timeout(400)
    page.wait_for_function("() => { const s = document.querySelector('[data-testid=stStatusWidget]'); return !s || !s.innerText.includes('RUNNING'); }",
                           timeout=seconds * 1000)
    page.wait_for_function("() => !document.querySelector('[data-testid=stApp][data-test-script-state=running]')", timeout=seconds * 1000)
    page.wait_for_function("() => !document.querySelector('[data-testid=stSkeleton]')", timeout=seconds * 1000)
    page.wait_for_timeout(600)

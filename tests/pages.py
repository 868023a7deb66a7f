"""What the tests of the app's pages share: a page drawn by its server, and what it shows."""

import base64
import json
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest

MAIN = str(Path(__file__).parents[1] / "app" / "main.py")


def opened(view: str, **session) -> AppTest:
    """A page, drawn with these values of its widgets, whose keys are given with _ for -."""
    page = AppTest.from_file(MAIN, default_timeout=30)
    page.switch_page(f"views/{view}.py")
    return changed(page, **session)


def changed(page: AppTest, **session) -> AppTest:
    """The page drawn anew with other values of its widgets."""
    for key, value in session.items():
        page.session_state[key.replace("_", "-")] = value
    return page.run()


def figures(page: AppTest) -> list[str]:
    """The keys of the figures of a page, in their order."""
    return [e.proto.id.rpartition("None-")[2] for e in page.get("plotly_chart")]


def figure(page: AppTest, key: str) -> dict:
    """The Plotly figure that stands under a key."""
    return next(json.loads(e.proto.spec) for e in page.get("plotly_chart") if e.proto.id.endswith(key))


def shown(values) -> np.ndarray:
    """An array as Plotly writes it."""
    if not isinstance(values, dict):
        return np.array(values)
    flat = np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
    return flat.reshape([int(n) for n in values["shape"].split(",")]) if "shape" in values else flat


def cells(made: dict) -> dict[tuple[int, str], float]:
    """{(block, module): value} that a chart of layers and modules gives to hover and click."""
    return {(block, module): value for block, module, value in made["data"][1]["customdata"]}


def words(page: AppTest) -> str:
    """All that the page says in sentences."""
    return "\n".join(e.value for kind in (page.markdown, page.caption, page.info, page.error) for e in kind)


def metrics(page: AppTest) -> dict[str, str]:
    """{label: value} of the large figures."""
    return {m.label: m.value for m in page.metric}

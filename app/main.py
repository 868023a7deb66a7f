"""Navigation only: `python -m app` serves it."""

import gc
from pathlib import Path

import streamlit as st

from app import demo, state, widgets
from dpruner import memory
from dpruner.errors import InputError

ICON = str(Path(__file__).with_name("icon.svg"))   # a named icon would be fetched from the network
st.set_page_config(page_title="D-Pruner Studio", page_icon=ICON, layout="wide")

PAGES = {
    "": [st.Page("views/run.py", title="Run", icon=":material/play_circle:", default=True)],
    "See": [st.Page("views/layers.py", title="Layers", icon=":material/stacks:"),
            st.Page("views/overlap.py", title="Overlap", icon=":material/join_inner:"),
            st.Page("views/similarity.py", title="Similarity", icon=":material/grid_on:"),
            st.Page("views/explore.py", title="Explore", icon=":material/zoom_in:")],
    "Use": [st.Page("views/generate.py", title="Generate", icon=":material/edit_note:"),
            st.Page("views/results.py", title="Results", icon=":material/monitoring:")],
    "Understand": [st.Page("views/learn.py", title="Learn", icon=":material/school:")],
}


@st.cache_resource
def put_aside() -> None:
    """What the libraries have loaded is not looked at again, and what a script frees is freed.

    Streamlit collects garbage after every script run: a fifth of a second, while the libraries' million objects are looked at each time.
    """
    gc.collect()
    gc.freeze()
    memory.give_back_at_once()


page = st.navigation(PAGES)
st.html("<style>.block-container, [data-testid=stMainBlockContainer] {padding-top: 3rem} [data-testid=stSidebarHeader] {height: 2.5rem} "
        "[data-testid=stMetricLabel] * {white-space: normal !important} "
        "[data-testid=stMainBlockContainer] {padding-inline: clamp(1rem, 3vw, 5rem)} "
        f"{widgets.BUTTONS_BELOW}</style>")
with widgets.guarded():
    demo.ensure()
    state.choose()
with st.sidebar:
    widgets.copy_link(state.parameters())
try:
    page.run()
except InputError as error:   # whatever a page did not catch itself
    st.error(str(error), icon=":material/error:")
finally:
    put_aside()   # the first page does not wait for it

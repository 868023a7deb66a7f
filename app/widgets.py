"""Pieces every page uses: a chart with its words and downloads, a guard that turns problems into sentences, a link to this view."""

import contextlib
import re
import time

import streamlit as st

from dpruner.errors import InputError

MODEBAR = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2},
           "modeBarButtonsToRemove": ["lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"]}   # a drag zooms in, a double click out
# in its upper corner, where plotly puts it, a figure's row of buttons would cover the legend
BUTTONS_BELOW = ".modebar-container {top: auto !important; bottom: 0} .modebar {top: auto !important; bottom: 0}"


def chart(made, key: str, **options):
    """Draw an `analysis.figures.Chart`: title, figure, how to read it, its data and itself to take away.

    Args:
        made: the Chart, or None where it could not be informative; then a word on why stands in its place.
        key: unique on the page; selections come back under it when `on_select` is among the options.
        options: passed on to st.plotly_chart.

    Returns:
        What st.plotly_chart returns.
    """
    if made is None:
        st.caption("Nothing is drawn here: the values are equal by construction, so a picture would say nothing.")
        return None
    st.markdown(f"##### {made.title}")
    name = "-".join(file_name(words) for words in (made.title, *shown_of(key)))
    config = {**MODEBAR, "toImageButtonOptions": {**MODEBAR["toImageButtonOptions"], "filename": name}}
    state = st.plotly_chart(made.figure, key=key, config=config, alt=made.alt, **options)
    st.caption(f"**How to read this:** {made.how}")
    with st.popover("Take it away", help="The figure and its data, for a paper or a lesson"):
        st.download_button("Data (CSV)", lambda: csv(made), f"{name}.csv", "text/csv", key=f"{key}-csv", on_click="ignore")
        st.download_button("Figure (HTML)", lambda: page_of(made, name), f"{name}.html", "text/html", key=f"{key}-html", on_click="ignore")
        st.caption("PNG: the camera in the corner of the figure.")
    return state


def shown_of(key: str) -> tuple[str, ...]:
    """What a figure of the pages that follow the selection shows, for the name of its file: they look alike for every method and domain."""
    chosen = st.session_state.get("_selection")
    if chosen is None or not key.startswith(("layers-", "overlap-", "explore-")):
        return ()
    return chosen.method, chosen.domain, f"{100 * chosen.sparsity:.0f}"


def page_of(made, name: str) -> bytes:
    """A Chart as a page of its own."""
    return made.titled().to_html(include_plotlyjs=True, full_html=True).replace("<head>", f"<head><title>{name}</title><style>{BUTTONS_BELOW}</style>", 1).encode()


def csv(made) -> bytes:
    """The data of a Chart, in the words of the pages, which call a block of the model a layer."""
    return made.table.rename(columns={"block": "layer"}).to_csv(index=False).encode()


def file_name(title: str) -> str:
    """A title as the stem of a file name, of whole words."""
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return (stem if len(stem) <= 80 else stem[:81].rpartition("-")[0] or stem[:80]) or "figure"


def within(value, size: int) -> int:
    """The nearest place of 0 .. size - 1, for a number field without bounds: a browser that knows them turns the field red and says nothing."""
    return min(max(int(value or 0), 0), size - 1)


@contextlib.contextmanager
def guarded():
    """What a user can mend is said in its sentence, in place; the rest of the page goes on."""
    try:
        yield
    except InputError as error:
        st.error(str(error), icon=":material/error:")


_COPY_LINK = st.components.v2.component(
    "copy_link",
    html='<button aria-label="Copy a link to this view">Copy link</button>',
    css="""button {font: inherit; font-size: 0.875rem; width: 100%; padding: 0.35rem 0.75rem; cursor: pointer; background: none;
                   color: var(--st-text-color); border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius)}
           button:hover, button:focus-visible {color: var(--st-primary-color); border-color: var(--st-primary-color); outline: none}""",
    # over plain http from another machine a browser has no clipboard: then the address is shown to be copied by hand
    js="""const oneEntryEach = () => {   // an address that changes in two places at one click would be two entries in the browser's history
            const {history} = window, push = history.pushState.bind(history)
            let acted = false
            for (const event of ["pointerdown", "keydown"]) window.addEventListener(event, () => { acted = true }, true)
            history.pushState = (state, title, url) => {
              const samePage = new URL(url ?? "", window.location.href).pathname === window.location.pathname
              samePage && !acted ? history.replaceState(state, title, url) : push(state, title, url)
              acted = false
            }
            window.oneEntryEach = true
          }
          export default ({data, parentElement}) => {
            if (!window.oneEntryEach) oneEntryEach()
            const whole = () => {   // an address leaves out what is the default; which run that is changes with the next one
              const url = new URL(window.location.href)
              for (const [name, value] of Object.entries(data.selected)) if (!url.searchParams.has(name)) url.searchParams.set(name, value)
              return url
            }
            const address = new URL(window.location.href)
            const tidy = address.searchParams.has("run") || !data.selected.run ? new URL(address) : whole()
            for (const name of Object.keys(data.selected)) {   // a link to a page brings what the browser carries over to it by itself
              const values = tidy.searchParams.getAll(name)
              if (values.length > 1) tidy.searchParams.set(name, values.at(-1))
            }
            if (tidy.href !== address.href) window.history.replaceState(window.history.state, "", tidy)
            const button = parentElement.querySelector("button")
            button.onclick = async () => {
              const link = whole().href
              try { await navigator.clipboard.writeText(link); button.textContent = "Copied" }
              catch { window.prompt("Copy this link", link) }
              setTimeout(() => { button.textContent = "Copy link" }, 2000)
            }
          }""")


_TO_TOP = st.components.v2.component(
    "to_top", html="<span></span>",   # without any content it is not drawn
    js="""export default ({data, parentElement}) => {
            const before = parentElement.shown
            parentElement.shown = data
            if (before !== undefined && before !== data) document.querySelector("[data-testid=stMain]").scrollTo(0, 0)
          }""")


def to_top(shown: str) -> None:
    """Begin at the top of the page when something else is shown than before: a button at its foot would leave the reader there."""
    _TO_TOP(data=shown, key="to-top")


def copy_link(selected: dict) -> None:
    """A button that copies the address of this very view; the address itself names the run from now on.

    Args:
        selected: {name of a parameter: value}, what the address may leave out.
    """
    _COPY_LINK(data={"selected": selected, "now": time.time()}, key="copy-link")   # looks at the address after every change

"""What the steps of the lesson share: their frame, formulas with symbols, the cell that is looked at, links into the user's own run."""

from collections.abc import Callable
from dataclasses import dataclass, field

import streamlit as st

from analysis.lesson.figures import TILE
from app import state, widgets
from app.lesson import job
from dpruner.store import Run

ICONS = {"layers": "stacks", "overlap": "join_inner", "similarity": "grid_on", "explore": "zoom_in", "generate": "edit_note",
         "results": "monitoring"}


@dataclass(frozen=True)
class Step:
    """One step of the lesson.

    Attributes:
        name: one word, in the list of steps and in the URL.
        question: what it answers.
        parts: files of the lesson that it needs.
        show: draws its picture and formulas; what takes longer than a page should it hands back, to be called when the page stands.
        trying: one thing to do.
        check, answer: a question to check oneself, and its answer.
        pages: {page of the app: what it shows of this on the user's own run}.
    """

    name: str
    question: str
    parts: tuple[str, ...]
    show: Callable[[Run], Callable[[], None] | None]
    trying: str
    check: str
    answer: str
    pages: dict[str, str] = field(default_factory=dict)


def draw(step: Step, run: Run) -> Callable[[], None] | None:
    """A step from its picture to the links; what is to be called when the page stands, if anything."""
    later = None
    if set(step.parts) - set(job.ready(run)):
        st.info("This step is still being computed and appears here by itself. Steps that are ready can be read "
                "meanwhile.", icon=":material/hourglass:")
    else:
        with widgets.guarded():
            later = step.show(run)
    left, right = st.columns(2, gap="medium")
    with left.container(border=True, height="stretch"):
        st.markdown(f"**:material/touch_app: Try.** {step.trying}")
    with right.container(border=True, height="stretch"):
        st.markdown(f"**:material/quiz: Check yourself.** {step.check}")
        with st.expander("Answer"):
            st.markdown(step.answer)
    on_my_run(step)
    return later


def on_my_run(step: Step) -> None:
    """Links to where the same is seen on the run that is chosen at the left."""
    selected = st.session_state.get("_selection")
    if selected is None or not step.pages:
        return
    with st.container(horizontal=True):
        st.markdown("**On my run:**", help=f"The run, method, domain, matrix and sparsity chosen at the left: {selected.run.id}")
        for page, words in step.pages.items():
            st.page_link(f"views/{page}.py", label=words, icon=f":material/{ICONS[page]}:", query_params=state.parameters())


def formula(latex: str, symbols: dict[str, str]) -> None:
    """A formula, and what each symbol of it is in the picture.

    Args:
        symbols: {LaTeX: what it is}.
    """
    st.latex(latex)
    st.markdown("  \n".join(f"${symbol}$: {meaning}" for symbol, meaning in symbols.items()))


def written_out(row: int, column: int, lines: list[str], words: str) -> None:
    """The arithmetic of one weight with its own numbers, beside its picture: one equality sign below the other.

    Args:
        lines: LaTeX; equations of one line stand apart by a \\qquad.
        words: what follows from it.
    """
    with st.container(border=True):
        st.markdown(f"**The weight in row {row}, column {column}, written out.** {words}")
        equations = [part.strip(" ,").replace(" = ", " &= ", 1).replace(" = ", r" \\ &= ") for line in lines for part in line.split(r"\qquad")]
        st.latex(r"\footnotesize\begin{aligned}" + r" \\[0.8em] ".join(equations) + r"\end{aligned}")


def mine(label: str = "Show my run instead of the lesson's") -> state.Selection | None:
    """The user's own run, where there is one and it is asked for."""
    selected = st.session_state.get("_selection")
    if selected is None:
        return None
    return selected if st.toggle(label, key="learn-mine", bind="query-params",
                                 help=f"The selection at the left: {selected.run.id}") else None


# ---- the cell that is looked at


def cell(shape: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """(row, column, first row and column of the tile it lies in), from number inputs that a click in the picture moves as well."""
    left, right = st.columns(2)
    found = []
    for place, key, label, size in ((left, "learn-row", "Row (output)", shape[0]), (right, "learn-column", "Column (input)", shape[1])):
        st.session_state[key] = widgets.within(st.session_state.get(key, 0), size)
        found.append(place.number_input(f"{label}, 0 to {size - 1}", value=0, key=key, bind="query-params", help="Or click a cell in the picture."))
    row, column = found
    origin = tuple(max(0, min(at // TILE * TILE, size - TILE)) for at, size in zip(found, shape, strict=True))
    return row, column, origin


def take_click(key: str) -> None:
    """For `on_select` of a tile: the cell that was clicked becomes the one that is looked at."""
    if found := state.clicked(key):
        st.session_state["learn-row"], st.session_state["learn-column"] = (int(v) for v in found[:2])


def window(origin: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a tile."""
    return tuple(slice(start, start + TILE) for start in origin)

"""The page Explore: from layers × modules down to single weights."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from analysis import figures, overlap, similarity, tiles, weights
from analysis.chart import number, percent
from analysis.matrices import read_ranks
from analysis.sparsity import threshold, told
from app import data, state, widgets
from dpruner.errors import InputError
from dpruner.masks import BINS
from dpruner.store import Run

ALONE = "nothing"
DIFFER = "on which they differ"
SIZES = (16, 32, 64)
LARGE = 10**9   # weights from which all matrices are compared on demand only: it reads gigabytes
WINDOW_HELP = "The window shows single weights from here on. Rows are the outputs of the matrix, columns its inputs; both count from 0."


class Mask(NamedTuple):
    """One mask, and what the page calls it."""

    name: str
    run: Run
    method: str
    domain: str


class Look(NamedTuple):
    """What the page shows: one or two masks of one matrix, all from files of one kind."""

    masks: tuple[Mask, ...]
    files: tuple[tuple[str, float], ...]
    at: float | None   # the sparsity at which ranks are cut; None: files of masks
    matrix: str
    flipped: bool      # stored as (in, out)
    shape: tuple[int, int]
    words: str         # the matrix in words


def named(run: Run, method: str, domain: str, home: Run) -> Mask:
    """A mask with its name; runs other than `home` are named too."""
    name = {"general": "open-domain importance", "domain": f"{domain}'s own importance"}.get(method, f"{method} for {domain}")
    return Mask(name if run.id == home.id else f"{name} ({run.id})", run, method, domain)


def file_kind(masks: tuple[Mask, ...], sparsity: float) -> bool | None:
    """Whether masks can be shown as their runs made them (True), only from ranks (False), or not together (None)."""
    for own in (True, False):
        right = not own or all(data.own_masks(mask.run, sparsity) for mask in masks)
        if right and all(data.mask_stamp(mask.run, mask.method, mask.domain, own) for mask in masks):
            return own
    return None


def others(mine: Mask, sparsity: float) -> dict[str, Mask]:
    """What a mask can be compared with, by name: its run's other masks and the importances behind them, then other runs of the same model."""
    found = {}
    for run in [mine.run, *data.same_model(mine.run, state.finished_runs())]:
        pairs = data.pairs(run)
        domains = list(dict.fromkeys(d for _, d in pairs))
        pairs = sorted(pairs, key=lambda pair: pair[0] != mine.method) + [("general", domains[0])] + [("domain", d) for d in domains]
        for method, domain in pairs:
            mask = named(run, method, domain, mine.run)
            if mask != mine and file_kind((mine, mask), sparsity) is not None:
                found.setdefault(mask.name, mask)
    return found


def choose(selected: state.Selection) -> Look:
    """The masks to look at, from the selection and the page's own widget.

    Raises:
        InputError: the selected mask exists at its run's own sparsity only, and the slider stands elsewhere.
    """
    mine = named(selected.run, selected.method, selected.domain, selected.run)
    if file_kind((mine,), selected.sparsity) is None:
        raise InputError(f"The mask of {mine.name} cannot be shown at {percent(selected.sparsity, 0)}", "the run keeps no ranks of it",
                         f"move the slider to the run's own sparsity, {percent(data.own_sparsity(selected.run), 0)}")
    choices = others(mine, selected.sparsity)
    options = [*choices, ALONE]
    if st.session_state.get("explore-other", options[0]) not in options:
        st.session_state["explore-other"] = options[0]
    name = st.selectbox(f"Compare {mine.name} with", options, key="explore-other", bind="query-params",
                        help="Another mask of this run, one of the importances behind it, or a mask of another run of the very same model.")
    masks = (mine,) if name == ALONE else (mine, choices[name])
    own = file_kind(masks, selected.sparsity)
    st.caption("Shown: the masks as the run made them." if own else
               f"Shown: masks cut from the ranks at {told(selected.sparsity)} of every matrix.")
    files = tuple(data.mask_stamp(mask.run, mask.method, mask.domain, own) for mask in masks)
    return Look(masks, files, None if own else selected.sparsity, selected.matrix, data.flipped(selected.run, selected.matrix),
                data.shape(selected.run, selected.matrix), f"layer {selected.block}, {selected.module}")


# ---- all matrices


def all_matrices(look: Look, selected: state.Selection) -> None:
    """Layers × modules: where the two masks differ; a click chooses a matrix."""
    st.subheader("1. All matrices")
    size = selected.run.record["model"]["prunable_weights"]
    if size >= LARGE and not st.toggle(f"Compare all matrices (reads {size * len(look.files) / (8 if look.at is None else 1) / 1e9:.1f} GB)",
                                       key="explore-all", bind="query-params"):
        return
    counts = data.counts(tuple(zip((mask.name for mask in look.masks), look.files, strict=True)), look.at)
    places = data.places(selected.run).set_index("matrix")

    chosen = (selected.block, selected.module)
    if len(look.masks) == 1:
        kept = places.assign(kept=pd.Series(counts.kept[:, 0] / counts.weights, index=list(counts.names))).reset_index()
        made = figures.layer_heatmap(kept, "kept", title=f"Share that {look.masks[0].name} keeps of every matrix", quantity="share kept", share=True,
                                     how="One cell for each matrix.", chosen=chosen)
        if made is None:
            st.info(f"Every matrix keeps the same share, {percent(kept['kept'].iloc[0])}, by construction. What differs lies inside the matrices, below; "
                    "choose one at the left.")
            return
    else:
        table = similarity.pairs(counts, "matrix").set_index("group")[["jaccard", "floor"]]
        made = figures.overlap_heatmap(places.join(table).reset_index(), look.masks[0].name, look.masks[1].name, chosen=chosen)
        if made is None:
            st.info("The two masks are the same, weight by weight." if (table.jaccard == 1).all() else
                    "Both masks keep the same share of what either keeps in every matrix: a picture would have one colour.")
            return
    st.caption("A click chooses the matrix, here and on the other pages.")
    widgets.chart(made, "explore-matrices", on_select=lambda: state.choose_matrix("explore-matrices"), selection_mode="points")


# ---- one matrix


def window(look: Look, head: tuple[str, int] | None) -> tuple[slice, slice]:
    """Which rows and columns are shown as single weights, from number inputs that the URL keeps."""
    for key, size in zip(("explore-row", "explore-column"), look.shape, strict=True):
        if key in st.session_state:   # left from a larger matrix, or typed
            st.session_state[key] = widgets.within(st.session_state[key], size)
    row, column, size, jump = st.columns(4)
    top = row.number_input(f"Row, 0 to {look.shape[0] - 1:,}", value=0, key="explore-row", bind="query-params", help=WINDOW_HELP)
    left = column.number_input(f"Column, 0 to {look.shape[1] - 1:,}", value=0, key="explore-column", bind="query-params", help=WINDOW_HELP)
    side = size.selectbox("Window", SIZES, index=2, key="explore-size", bind="query-params", format_func=lambda n: f"{n} × {n} weights")
    jump_to_head(jump, look, head)
    starts = [min(first, max(n - side, 0)) for first, n in zip((top, left), look.shape, strict=True)]
    return tuple(slice(start, min(start + side, n)) for start, n in zip(starts, look.shape, strict=True))


def jump_to_head(cell, look: Look, head: tuple[str, int] | None) -> None:
    """A number input that moves the window to an attention head's first row or column."""
    if head is None:
        cell.selectbox("Head", ["none here"], disabled=True, key="explore-no-head", help="This matrix belongs to no attention head.")
        return
    axis, size = head
    key = f"explore-{axis}"
    heads = look.shape[axis == "column"] // size

    def jump() -> None:
        st.session_state[key] = widgets.within(st.session_state["explore-head"], heads) * size

    st.session_state["explore-head"] = widgets.within(int(st.session_state.get(key, 0)) // size, heads)
    cell.number_input(f"Head, 0 to {heads - 1}", value=0, key="explore-head", on_change=jump,
                      help=f"A head is {size} {axis}s of this matrix. Where queries, keys and values lie in one matrix, their heads follow each other.")


def whole_matrix(look: Look, rows: slice, columns: slice) -> None:
    """The whole matrix, reduced; a click moves the window."""
    names = [f"that {mask.name} keeps" for mask in look.masks]
    options = [DIFFER, *names] if len(names) == 2 else names
    if st.session_state.get("explore-show", options[0]) not in options:
        st.session_state["explore-show"] = options[0]
    show = st.radio("Share of weights", options, key="explore-show", bind="query-params", horizontal=True)
    counts = data.glance(look.files, look.matrix, look.at, look.flipped)
    shares = counts.shares(counts.differ if show == DIFFER else counts.kept[names.index(show)])

    def click() -> None:
        if found := state.clicked("explore-overview"):
            st.session_state["explore-row"], st.session_state["explore-column"] = int(found[0]), int(found[2])

    quantity = f"share {DIFFER}" if show == DIFFER else "share kept"
    made = tiles.mask_overview(*shares, title=f"The whole matrix: {look.words}", quantity=quantity, frame=(
        rows.start, rows.stop - 1, columns.start, columns.stop - 1), how=(
        f"{look.shape[0]:,} rows by {look.shape[1]:,} columns, each cell the weights of a small rectangle. The frame is the window below; a click "
        "moves it there."))
    if made is None:
        st.info("Every part of this matrix shows the same share: a picture would have one colour.")
    else:
        widgets.chart(made, "explore-overview", on_select=click, selection_mode="points")


def region_table(look: Look, masks: list[np.ndarray]) -> None:
    """Who keeps how many weights, in the window and in the whole matrix."""
    here, whole = overlap.region_counts(*masks), data.glance(look.files, look.matrix, look.at, look.flipped).regions
    shown = pd.DataFrame({"kept by": ["both", f"only {look.masks[0].name}", f"only {look.masks[1].name}", "neither"]})
    for where, found in (("in the window", here), ("in the whole matrix", whole)):
        counts = [found.both, found.only_a, found.only_b, found.neither]
        shown[where] = [f"{n:,}" for n in counts]
        shown[f"share {where}"] = [percent(n / found.weights) for n in counts]
    st.dataframe(shown, hide_index=True)
    st.caption(f"In the whole matrix they share {percent(whole.jaccard)} of what either keeps (Jaccard); two random masks would share "
               f"{percent(whole.floor)}.")


def single_weights(look: Look, rows: slice, columns: slice, selected: state.Selection) -> None:
    """The window at full resolution, with all that is known of every weight in its hover."""
    masks = [data.tile_mask(file, look.matrix, rows, columns, look.at, look.flipped) for file in look.files]
    if len(masks) == 2:
        region_table(look, masks)
    values, notes, missing = known_of(look, rows, columns, selected)
    widgets.chart(tiles.mask_tile(masks[0], masks[1] if len(masks) == 2 else None, tuple(mask.name for mask in look.masks), look.words,
                                  (rows.start, columns.start), values, notes), "explore-tile")
    for sentence in missing:
        st.caption(sentence)
    with st.expander("What the hover says"):
        st.markdown(f"""
- **w**: the weight itself, from the model's own file.
- **G**: general importance, what the open domain loses with the weight.
- **S**: the score by which a mask ranks weights. The run keeps ranks, not scores, so S is known to one of {BINS} equal bins: from, to.
- **rank**: the bin of the weight's score in its matrix, 0 the lowest, {BINS - 1} the highest.
- **threshold**: the lowest score that is kept.""")


def known_of(look: Look, rows: slice, columns: slice, selected: state.Selection) -> tuple[dict, list[str], list[str]]:
    """(values of every weight in the window, lines that hold for all of them, sentences on what is not known)."""
    record, where = selected.run.record, (look.matrix, rows, columns, look.flipped)
    values, notes, missing = {}, [], []
    try:
        stored = look.shape[::-1] if look.flipped else look.shape
        values["w"] = weights.read_weights(weights.model_folder(record), look.matrix, stored, rows, columns, look.flipped)
    except InputError as error:
        missing.append(str(error))
    try:
        values["G"] = general_importance(selected, *where)
    except InputError:
        missing.append("G is not shown: the run keeps no open-domain importance, and the cache has it no more.")
    for mask in look.masks:
        try:
            ranks = read_ranks(mask.run.path("ranks", mask.method, mask.domain), *where)
            edges = weights.read_edges(mask.run.path("edges", mask.method, mask.domain), look.matrix)
        except InputError:
            missing.append(f"S and rank of {mask.name} are not shown: the run keeps no ranks of it.")
            continue
        values[f"S, {mask.name}"], values[f"rank, {mask.name}"] = weights.score_ranges(ranks, edges), ranks
        if look.at is None and mask.run.config["granularity"] != "matrix":
            notes.append(f"threshold, {mask.name}: one for each {mask.run.config['granularity']}")
        else:
            lowest = threshold(selected.sparsity if look.at is None else look.at)
            notes.append(f"threshold, {mask.name}: " + ("above every score" if lowest == BINS else number(float(edges[lowest]))))
    return values, notes, missing


def general_importance(selected: state.Selection, name: str, rows: slice, columns: slice, flipped: bool) -> np.ndarray:
    """G of the window: exact from the cache, else the range of its bin from the run."""
    cached = data.general_file(selected.run, state.CACHE)
    if cached is not None:
        return weights.read_tile(cached, name, rows, columns, flipped)
    run, domain = selected.run, selected.domain
    return weights.score_ranges(read_ranks(run.path("ranks", "general", domain), name, rows, columns, flipped),
                                weights.read_edges(run.path("edges", "general", domain), name))


def page() -> None:
    """Three steps: all matrices, one matrix, single weights."""
    st.title("Explore")
    st.markdown("From the whole model down to a single weight, in three steps: all matrices, one matrix at a glance, and a window of single weights.")
    selected = state.selection()
    if selected is None:
        return
    look = None
    with widgets.guarded():
        look = choose(selected)
    if look is None:
        return
    with widgets.guarded():
        all_matrices(look, selected)
    st.subheader(f"2. One matrix: {look.words}")
    st.caption(f"`{look.matrix}`, {look.shape[0]:,} rows by {look.shape[1]:,} columns")
    with widgets.guarded():
        rows, columns = window(look, data.heads(selected.run).get(look.matrix))
        with widgets.guarded():
            whole_matrix(look, rows, columns)
        st.subheader("3. Single weights")
        single_weights(look, rows, columns, selected)


page()

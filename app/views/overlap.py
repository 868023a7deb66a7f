"""The page Overlap: general against domain importance."""

import streamlit as st

from analysis import figures, overlap, tiles
from analysis.chart import percent
from analysis.glance import cell_shares
from analysis.sparsity import told
from app import data, state, widgets
from dpruner.formulas import DEFAULT_LAM

GENERAL, DOMAIN, DUAL = "general importance", "domain importance", "the dual score"
MEASURES = {"jaccard": "Jaccard similarity", "spearman": "Rank correlation", "changed": "Decisions that differ"}
COARSE = 0.02   # share kept below which ranks are too coarse for the curve of λ
ALL = (0, 100)   # per cent: a range that leaves nothing out

st.title("Overlap")
selected = state.selection()
if selected is None:
    st.stop()

run, domain, matrix = selected.run, selected.domain, selected.matrix
where, here = (selected.block, selected.module), f"layer {selected.block}, {selected.module}"
removed = round(100 * selected.sparsity)

st.markdown(f"Each weight has two ranks in its matrix: by its **{GENERAL}** (what open-domain text loses without it) and by its "
            f"**{DOMAIN}** (what text on **{domain}** loses). Where both keep a weight there is little to decide; the dual score of "
            f"D-Pruner decides the rest.")
if any(data.mask_stamp(run, side, domain, False) is None for side in ("general", "domain")):
    st.info("This run keeps no general and domain importance: they come with the method **dpruner**. Choose another run at the left, or "
            "start one with that method on the page **Run**.")
    st.stop()


def clickable(made, key: str) -> None:
    """A chart of layers and modules in which a click selects a matrix."""
    widgets.chart(made, key, on_select=lambda: state.choose_matrix(key), selection_mode="points")


def whole_model(a: str, b: str, key: str):
    """Overlap of two rankings in all matrices at every sparsity; None while the user has not asked for what takes long."""
    asked = "Compare all matrices (reads two ranks of every weight once: this takes a while)"
    if data.is_large(run) and not st.toggle(asked, key=f"overlap-{key}"):
        return None
    return data.overlaps(run, a, b, domain)


def kept_sets() -> None:
    """Overlap by layer and module, and as a curve."""
    st.subheader("Kept sets")
    table = whole_model("general", "domain", "kept")
    if table is None:
        return
    whole = overlap.at_sparsity(table, selected.sparsity, "model").iloc[0]
    by_matrix = overlap.at_sparsity(table, selected.sparsity)
    chosen = by_matrix[by_matrix.matrix == matrix].iloc[0]
    left, middle, right = st.columns(3)
    plain = {"delta_color": "off", "delta_arrow": "off"}
    left.metric("Jaccard similarity, whole model", f"{whole.jaccard:.3f}", f"random masks: {whole.floor:.3f}", **plain,
                help="Weights that both keep as a share of those that either keeps, beside what two random masks of this sparsity share.")
    middle.metric("Rank correlation, whole model", f"{whole.spearman:.3f}", "no relation: 0", **plain,
                  help="Spearman's correlation of the ranks inside the matrices: 1 is the same order, 0 no relation.")
    right.metric(f"Jaccard similarity, {here}", f"{chosen.jaccard:.3f}", f"random masks: {chosen.floor:.3f}", **plain)
    measure = st.segmented_control(
        "Measure", list(MEASURES), default="jaccard", format_func=MEASURES.get, key="overlap-measure", bind="query-params", required=True,
        help="The rank correlation regards all weights, and does not move with the sparsity.")
    clickable(figures.overlap_heatmap(by_matrix, GENERAL, DOMAIN, measure, where), "overlap-map")
    curves = {"whole model": ("model", "model"), f"all {selected.module}": ("module", selected.module), here: ("matrix", matrix)}
    rows = {name: table[(table.by == by) & (table.group == group)] for name, (by, group) in curves.items()}
    widgets.chart(figures.overlap_curves(rows, GENERAL, DOMAIN, selected.sparsity), "overlap-curves")


def take_brush() -> None:
    """A box drawn over the plane becomes the two ranges: one truth, in the URL, for mouse and keyboard."""
    boxes = st.session_state["overlap-plane"].selection.box
    if boxes:
        for key, ends in (("overlap-from-general", boxes[0]["x"]), ("overlap-from-domain", boxes[0]["y"])):
            low, high = (min(max(round(100 * end), 0), 100) for end in (min(ends), max(ends)))
            st.session_state[key] = (low, high)


def clear_brush() -> None:
    st.session_state["overlap-from-general"] = st.session_state["overlap-from-domain"] = ALL


def slider(column, label: str, key: str, value, explained: str):
    """A slider from 0 to 100 whose value may also be set by the page."""
    return column.slider(label, 0, 100, value, key=key, bind="query-params", help=explained)


def the_plane() -> None:
    """The general x domain plane of the selected matrix: regions, a brush, and what the dual score makes of it."""
    st.subheader(f"The plane of {here}")
    left, right = st.columns(2)
    if st.session_state.get("overlap-followed", removed) != removed:   # the thresholds follow the sparsity at the left until they are moved
        st.session_state["overlap-general"] = st.session_state["overlap-domain"] = removed
    st.session_state["overlap-followed"] = removed
    at_general, at_domain = (
        slider(column, f"{side} side removes (%)", f"overlap-{side.lower()}", removed,
               f"Where the threshold of the {side.lower()} importance stands. It moves with the sparsity at the left.") / 100
        for column, side in ((left, "General"), (right, "Domain")))
    from_general, from_domain = (
        slider(column, f"Box: {side} ranks from, to (%)", f"overlap-from-{side}", ALL,
               "0 is the least important weight of the matrix, 100 the most. Or draw a box over the plane.")
        for column, side in ((left, "general"), (right, "domain")))
    brushing = (from_general, from_domain) != (ALL, ALL)
    ranks = data.sides(run, domain, matrix, ("general", "domain"))
    histogram = overlap.joint_histogram(ranks["general"], ranks["domain"])
    plane, beside = st.columns([2, 1], vertical_alignment="center", gap="medium")   # it is a square: over the whole width half would be empty
    with plane:
        widgets.chart(figures.plane(histogram, at_general, at_domain, GENERAL, DOMAIN, here,
                                    tuple(end / 100 for end in (*from_general, *from_domain)) if brushing else None),
                      "overlap-plane", on_select=take_brush, selection_mode="box")
    brushed(beside, ranks, from_general, from_domain, brushing)
    kept_of_regions(ranks, at_general, at_domain)


def brushed(beside, ranks, from_general, from_domain, brushing: bool) -> None:
    """How many weights lie in the drawn box, beside the plane, and below it where in the matrix they sit."""
    if not brushing:
        beside.caption("Draw a box over the plane, or move the ranges above it, to see how many weights lie there, and where they sit in the matrix.")
        return
    flags = overlap.brushed(ranks["general"], ranks["domain"], overlap.bin_range(*from_general), overlap.bin_range(*from_domain))
    share = float(flags.mean())
    beside.markdown(f"**{int(flags.sum()):,}** of {flags.size:,} weights ({percent(share)}) lie in the box: general ranks {from_general[0]} "
                    f"to {from_general[1]} %, domain ranks {from_domain[0]} to {from_domain[1]} %.")
    beside.button("Clear the box", on_click=clear_brush)
    if not flags.any():
        return
    widgets.chart(tiles.mask_overview(
        *cell_shares(flags), title=f"Where the weights of the box sit in {here}", quantity="share in the box",
        how=f"The matrix in small rectangles, each coloured by how many of its weights lie in the box; {percent(share)} everywhere if "
            f"place did not matter. Stripes are rows or columns that are alike."), "overlap-place")


def kept_of_regions(ranks, at_general: float, at_domain: float) -> None:
    """What the dual score keeps of every region."""
    if data.mask_stamp(run, "dpruner", domain, False) is None:
        st.info("What the dual score keeps cannot be shown: this run chose its masks inside a walk, which leaves no ranks of the dual "
                "score.")
        return
    dual = data.sides(run, domain, matrix, ("dpruner",))["dpruner"]
    counted = overlap.region_histogram(ranks["general"], ranks["domain"], dual, at_general, at_domain)
    widgets.chart(figures.region_bars(overlap.kept_of_regions(counted, selected.sparsity), selected.sparsity, GENERAL, DOMAIN, DUAL, here),
                  "overlap-regions")


def lambdas() -> None:
    """How many decisions λ changed, counted for the run's, and for any other where that follows from what is stored."""
    st.subheader("What λ changed")
    config = run.config
    lam = DEFAULT_LAM[config["formula"]] if config["lam"] is None else config["lam"]
    metrics = data.metrics(run)
    stored = metrics[(metrics.metric == "decisions changed by λ") & (metrics.domain == domain)]
    if len(stored):
        changed, of = stored.value.iloc[0], stored.n.iloc[0]
        st.markdown(f"λ is the weight of the general side in the dual score. At the run's own sparsity of "
                    f"{percent(data.own_sparsity(run), 0)}, λ = {lam:g} changed **{int(changed):,}** of {int(of):,} decisions "
                    f"(**{percent(changed / of)}**) against the domain importance alone: half of them weights it saved, half weights that "
                    f"had to go for these.")
    if data.mask_stamp(run, "dpruner", domain, False) is None:
        st.caption("More is not known: this run chose its masks inside a walk, which leaves no ranks of the dual score.")
        return
    table = whole_model("domain", "dpruner", "lambda")
    if table is not None:
        whole = overlap.at_sparsity(table, selected.sparsity, "model").iloc[0]
        if not (len(stored) and data.own_masks(run, selected.sparsity) and config["granularity"] == "matrix"):   # else it was just said
            st.markdown(f"At {removed} % sparsity with one threshold for each matrix, it changes **{percent(whole.changed)}** of the decisions "
                        f"of the whole model:")
        clickable(figures.overlap_heatmap(overlap.at_sparsity(table, selected.sparsity), DOMAIN, DUAL, "changed", where), "overlap-changed")
    if config["formula"] != "balanced" or not lam > 0:
        st.caption("What another λ would have changed does not follow from what the run keeps: that takes the formula *balanced* and a λ "
                   "above 0.")
        return
    if 1 - selected.sparsity < COARSE:
        st.caption(f"What another λ would have changed cannot be told where less than {percent(COARSE, 0)} is kept: ranks come in 256 steps, and a few of "
                   "them are all that is left.")
        return
    curve, counted_share = data.lambda_changes(run, domain, matrix, selected.sparsity, lam)
    if len(curve):
        widgets.chart(figures.lambda_curve(curve, lam, counted_share, here), "overlap-lambda")
    else:
        st.caption(f"What another λ would have changed in {here} cannot be told: the matrix is too small for its scores to be found again.")


if selected.sparsity in (0, 1):
    st.info(f"At {percent(selected.sparsity, 0)} sparsity {'nothing is removed' if selected.sparsity == 0 else 'nothing is kept'}, so both importances "
            "agree on every weight. Choose a sparsity in between at the left.")
    st.stop()
st.caption(f"All masks of this page are cut from ranks at {told(selected.sparsity)}. The method chosen at the left plays no part here: the two "
           "importances and the dual score belong to **dpruner**.")
for part in (kept_sets, the_plane, lambdas):
    with widgets.guarded():
        part()

"""The page Layers: what is pruned where, through the depth of the model."""

import streamlit as st

from analysis import figures, sparsity
from analysis.chart import informative, number, percent
from app import data, state, widgets
from dpruner.errors import InputError

PARTS = {"row": "Rows (outputs)", "column": "Columns (inputs)", "head": "Heads"}
MEASURES = {"sd_ratio": "Spread, × chance", "losing_more": "Share that loses much more", "sd": "Standard deviation",
            "gini": "Gini coefficient"}
SCORES = {"importance_kept": "Importance that is kept", "mean_score": "Mean score"}

st.title("Layers")
selected = state.selection()
if selected is None:
    st.stop()

run, method, domain = selected.run, selected.method, selected.domain
where, here = (selected.block, selected.module), f"layer {selected.block}, {selected.module}"
own = data.own_masks(run, selected.sparsity)
at = None if own else selected.sparsity


def clickable(made, key: str) -> None:
    """A chart of layers and modules in which a click selects a matrix."""
    widgets.chart(made, key, on_select=lambda: state.choose_matrix(key), selection_mode="points")


def masks() -> None:
    """What the mask removes of every matrix, where that differs."""
    totals = data.totals(run, method, domain)
    if not own:
        st.markdown(f"Masks of **{sparsity.told(selected.sparsity)}** sparsity, cut from the ranks of **{method}** for **{domain}**, "
                    f"one threshold for each matrix.")
        return
    removed = 1 - totals.kept.sum() / totals.weights.sum()
    st.markdown(f"The very masks this run made with **{method}** for **{domain}**: **{percent(removed)}** of {totals.weights.sum():,} "
                f"weights in {len(totals)} matrices are removed.")
    made = figures.layer_heatmap(
        totals.assign(removed=1 - totals.kept_share), "removed", title="What the mask removes of every matrix",
        quantity="share removed", share=True, middle=float(removed), chosen=where,
        how=f"The whole loses {percent(removed)}; matrices above that matter less to this score than the average, those below more.")
    if made is not None and totals.kept_share.max() - totals.kept_share.min() > 0.01:   # less than that is rounding to whole weights
        clickable(made, "layers-removed")
    else:
        st.caption("Every matrix loses the same share by construction, so bars of it would say nothing. What differs is below: heads, "
                   "rows and columns inside the matrices, the importance that goes with them, and what one threshold for the whole "
                   "model would do.")


def spreads() -> None:
    """Heads, rows and columns: a map of all matrices, then the parts of the selected one."""
    st.subheader("Heads, rows, columns")
    kinds = [part for part in PARTS if part != "head" or data.heads(run)]
    left, right = st.columns([3, 2])
    part = left.segmented_control(
        "Parts", kinds, default="row", format_func=PARTS.get, key="layers-part", bind="query-params", required=True,
        help="A row of a matrix makes one output, a column reads one input; a head is a group of them in attention.")
    measure = right.selectbox(
        "Measure", list(MEASURES), format_func=MEASURES.get, key="layers-measure", bind="query-params",
        help="Spread × chance: how much more the kept shares of the parts differ than in a random mask of the same size.")
    if at is None or not data.is_large(run) or st.toggle(
            f"Count all matrices at {percent(selected.sparsity, 0)} (reads every rank once: some seconds)", key="layers-count"):
        table = data.spread(run, method, domain, part, at)
        made, ratio = figures.spread_heatmap(table, measure, where), table.sd_ratio
        if made is None:
            st.caption(f"Every matrix shows the same {MEASURES[measure].lower()}, {number(float(table[measure].iloc[0]))}: a picture would have one colour.")
        else:
            clickable(made, "layers-map")
        st.caption(f"Over the {len(table)} matrices, {PARTS[part].lower()} differ {ratio.min():.1f} to {ratio.max():.1f} times as much as "
                   f"chance, in the median {ratio.median():.1f} times." + (" Click a cell to look into that matrix." if made else ""))
    if part == "head" and selected.matrix not in data.heads(run):
        st.info(f"There are no heads in {here}: choose a matrix of the attention, or look at rows and columns.")
    else:
        widgets.chart(figures.profile(data.parts(run, method, domain, selected.matrix, part, at), part, here), "layers-profile")


def depth() -> None:
    """Importance through the depth, and one threshold for all."""
    st.subheader("Importance through the depth")
    edges, totals = data.edges(run, method, domain), data.totals(run, method, domain)
    table = sparsity.importance_kept(edges, dict(zip(totals.matrix, totals.score, strict=True)), selected.sparsity)
    # scores that are divided by the mean of their matrix have the same mean everywhere
    shown = SCORES if informative(table.mean_score, 1e-4) else {"importance_kept": SCORES["importance_kept"]}
    measure = st.segmented_control("Measure", list(shown), default="importance_kept", format_func=SCORES.get, key="layers-score",
                                   bind="query-params", required=True) if len(shown) > 1 else "importance_kept"
    if measure == "importance_kept":
        kept = percent(1 - selected.sparsity, 0)
        clickable(figures.layer_heatmap(
            table, measure, title=f"Importance that the kept {kept} of the weights carry", quantity="share of the importance", share=True,
            chosen=where, how=f"The scores of the kept weights as a share of all scores of the matrix. Near 100 %: few weights carry "
                              f"everything and pruning costs little by this score; near {kept}: all weights matter alike."),
            "layers-importance")
    else:
        clickable(figures.layer_heatmap(
            table, measure, title=f"Mean score of {method} in every matrix", quantity="mean score", chosen=where,
            how=f"The mean of the score that {method} ranks weights by, in its own unit. Matrices compare where the score means the "
                f"same everywhere."), "layers-mean")

    st.subheader("One threshold for the whole model")
    sizes = dict(zip(totals.matrix, totals.weights, strict=True))
    shares = sparsity.whole_model_kept(edges, sizes, selected.sparsity)
    clickable(figures.whole_model_chart(shares, selected.sparsity, where), "layers-whole")
    config = run.config
    if method in ("dpruner", "domain") and config["formula"] == "balanced" and config["granularity"] != "global":
        st.caption("Mind the scale: this run divided the scores by their mean in each matrix, so a matrix keeps much here where its "
                   "importance is spread over many weights, and little where a few carry it. A run with granularity *global* divides by "
                   "one mean for the whole model, and its picture compares the layers themselves.")


if selected.sparsity in (0, 1):
    gone = "nothing" if selected.sparsity == 0 else "everything"
    st.info(f"At {percent(selected.sparsity, 0)} sparsity {gone} is removed, so no layer, row, column or head differs from another. "
            "Choose a sparsity in between at the left.")
    st.stop()
with widgets.guarded():
    masks()
with widgets.guarded():
    if not own and data.mask_stamp(run, method, domain, False) is None:
        raise InputError(f"{method} can be shown at its own sparsity only",
                         "its scores exist only while it prunes, so the run keeps no ranks",
                         f"set the sparsity to {percent(data.own_sparsity(run), 0)}, or choose another method")
    spreads()
with widgets.guarded():
    if data.mask_stamp(run, method, domain, False) is None:
        st.caption(f"Importance through the depth needs scores, and those of {method} exist only while it prunes.")
    else:
        depth()

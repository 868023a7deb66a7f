"""Step 5: the plane of general and domain importance."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from analysis import figures, overlap, tiles
from analysis.chart import percent
from analysis.lesson import prepare
from analysis.lesson.figures import compact
from analysis.sparsity import at_least, threshold, told
from app import data, widgets
from app.lesson import job
from app.lesson.step import Step, formula, mine
from dpruner.masks import ranked
from dpruner.store import Run

GENERAL, DOMAIN = "general importance", "domain importance"


class Sides(NamedTuple):
    """Ranks of one matrix by both importances and by the dual score, uint8 (out, in), and what is looked at, in words."""

    general: np.ndarray
    domain: np.ndarray
    dual: np.ndarray
    words: str


@st.cache_data(max_entries=4, show_spinner=False)
def _ranks(path: str, when: float) -> dict[str, np.ndarray]:
    found, _ = job._tensors(path, when)
    return {side: ranked(found[name])[0].numpy() for side, name in (("general", "G"), ("domain", "domain"), ("dual", "dual"))}


def sides(run: Run) -> Sides | None:
    """Of the lesson's linear, or of the matrix chosen at the left where the user asks for his own run; None where that keeps no ranks."""
    selected = mine()
    if selected is None:
        return Sides(**_ranks(*job.stamp(run, "layer.safetensors")), words=f"the first linear, {prepare.DOMAIN}")
    names = ("general", "domain", "dpruner")
    if any(data.mask_stamp(selected.run, name, selected.domain, False) is None for name in names):
        st.info("This run keeps no ranks of both importances: they come with the method **dpruner**. Choose another run at the left, or "
                "switch back.")
        return None
    found = data.sides(selected.run, selected.domain, selected.matrix, names)
    return Sides(found["general"], found["domain"], found["dpruner"], f"layer {selected.block}, {selected.module}, {selected.domain}")


def plane(run: Run) -> None:
    """Two thresholds over the plane, the four regions, and where their weights sit."""
    found = sides(run)
    if found is None:
        return
    st.markdown("Every weight has two ranks: how much open-domain text needs it (to the right), and how much text of the domain does "
                "(upwards). Two thresholds cut the plane into four.")
    left, right = st.columns(2)
    at_general = left.slider("The general side removes (%)", 0, 100, 50, key="learn-general", bind="query-params") / 100
    at_domain = right.slider("The domain side removes (%)", 0, 100, 50, key="learn-domain", bind="query-params") / 100
    histogram = overlap.joint_histogram(found.general, found.domain)
    masks = [at_least(ranks, threshold(at)) for ranks, at in ((found.general, at_general), (found.domain, at_domain))]
    with left:
        widgets.chart(compact(figures.plane(histogram, at_general, at_domain, GENERAL, DOMAIN, found.words), f"The plane of {found.words}"),
                      "learn-plane")
    with right:
        window = (mask[:tiles.TILE, :tiles.TILE] for mask in masks)
        widgets.chart(compact(tiles.mask_tile(*window, ("the general side", "the domain side"), found.words), "Where these weights sit"),
                      "learn-plane-place")
        if max(found.general.shape) > tiles.TILE:
            st.caption(f"The first {tiles.TILE} rows and columns of {found.general.shape[0]:,} × {found.general.shape[1]:,}.")
    kept = overlap.kept_of_regions(overlap.region_histogram(found.general, found.domain, found.dual, at_general, at_domain), 0.5)
    words = {"both": "both keep", "only A": "only the general side keeps", "only B": "only the domain side keeps",
             "neither": "neither keeps"}
    st.dataframe(pd.DataFrame({"Region": kept.region.map(words), "Weights": kept.weights,
                               "Share": [percent(w / kept.weights.sum()) for w in kept.weights],
                               "The dual score keeps, at 50 %": [percent(share) if np.isfinite(share) else "–" for share in kept.kept_share]}), hide_index=True,
                 key="learn-plane-table", column_config={"Weights": st.column_config.NumberColumn(format="localized")})
    counted = overlap.regions(histogram, at_general, at_domain)
    st.caption(f"The general side removes {told(at_general)}, the domain side {told(at_domain)}. The two masks share {percent(counted.jaccard)} of what either keeps (Jaccard); two random masks would share "
               f"{percent(counted.floor)}. Rank correlation of the two importances: {overlap.spearman(histogram):.2f}.")
    formula(r"\text{rank}_G(w) = \frac{\#\{w' : G(w') < G(w)\}}{n}, \qquad \text{rank}_F(w) = \frac{\#\{w' : F(w') < F(w)\}}{n}", {
        r"\text{rank}_G": "to the right: the share of the matrix's weights that open-domain text needs less",
        r"\text{rank}_F": "upwards: the share that the domain needs less, F = mean of (g·w)² over its calibration texts",
        "n": f"weights of the matrix, {found.general.size:,} here"})


PLANE = Step(
    "Plane", "Which weights do both sides need, which only one?", ("layer.safetensors",), plane,
    "Set the general side to 90 % and the domain side to 50 %. How many weights does only the domain save? Where in the matrix do they "
    "sit: everywhere alike, or in bands of rows?",
    "If the two importances had nothing to do with each other, what share would lie in each region at 50 % and 50 %?",
    "A quarter in each: 0.5 × 0.5. More in “both” and “neither” means that they agree. The dual score has to decide about the two regions "
    "in which they do not. It is a sum, so a weight that one side needs very much stays, and one that only just passes one threshold may "
    "go: see the last column of the table. Bands of rows are outputs that are needed, or not, as a whole, such as those of one attention "
    "head. That the general side keeps more towards the right has another reason: it judges columns from left to right, and the last ones have "
    "few others left that could stand in for them (1/U² of step 2). Why do the sides agree so often? Large weights on strong inputs matter to everyone.",
    {"overlap": "The plane of my run, with a brush"})

"""Step 3: compensation, column by column."""

import streamlit as st
import torch

from analysis.chart import percent
from analysis.lesson import figures, numbers
from app import widgets
from app.lesson import job
from app.lesson.step import Step, formula
from dpruner.store import Run

SHARES = (25, 50, 75)


def column(run: Run) -> None:
    """A small block of the first linear, pruned before one's eyes."""
    found, told = job.tensors(run, "layer.safetensors")
    rows, across = numbers.SMALL
    share = st.segmented_control("Share of the block that is removed (%)", SHARES, default=50, key="learn-share", bind="query-params",
                                 required=True)
    inputs = numbers.related_inputs(found["H"], across)
    block = numbers.compensation(found["W"][:rows][:, inputs].contiguous(), found["H"][inputs][:, inputs].contiguous(), share / 100)
    st.markdown(f"{rows} rows of `{told['name'].removesuffix('.weight')}` and the {len(inputs)} inputs that have most in common with "
                f"others, as a small layer of its own. Of its {block.removed.size} weights the {int(block.removed.sum())} of lowest G go, "
                "from left to right.")
    places = st.columns(3)
    quiet = {"delta_color": "off", "delta_arrow": "off"}
    places[0].metric("Output lost, zeros alone", percent(float(block.plain[-1]), 2), "the kept weights stay as they are", **quiet)
    places[1].metric("Output lost, with compensation", percent(float(block.moved[-1]), 2), "the kept weights move", **quiet)
    places[2].metric("Compensation saves", percent(float(1 - block.moved[-1] / block.plain[-1]), 0) if block.plain[-1] > 0 else "nothing",
                     "of the loss", **quiet)
    widgets.chart(figures.compensation(block, inputs.tolist()), "learn-compensation")
    first = torch.from_numpy(block.removed).nonzero()
    if len(first):
        r, c = first[first[:, 1].argmin()].tolist()
        st.caption(f"The first to go is row {r}, column {int(inputs[c])}: {block.weights[0][r, c]:.4f}. Look along its row: every weight to "
                   "its right moves by its error times a number of U; nothing in the other rows does.")
    formula(r"e = \frac{\hat w_{ij}}{U_{jj}}, \qquad \hat w_{ik} \leftarrow \hat w_{ik} - e\,U_{jk}\quad (k>j), \qquad "
            r"\text{lost} = \frac{\operatorname{tr}(\Delta W\,H\,\Delta W^{\mathsf T})}{\operatorname{tr}(W\,H\,W^{\mathsf T})}", {
                "j": "the column that is being worked on; the slider under the picture counts those that are done",
                r"\hat w_{ij}": "a removed weight, at the moment it goes: a cross in the picture",
                "U_{jk}": "how far input k can stand in for input j, the same for all rows",
                r"\Delta W": "what is different from the first picture: minus the weight where there is a cross, how far it moved "
                             "elsewhere"})


COLUMN = Step(
    "Columns", "How do the others make up for a weight that goes?", ("layer.safetensors",), column,
    "Press Play, then move the slider back to 1 and forward again: which cells change when the first column is done? Then remove 75 % "
    "instead of 50 %.",
    "Why do only columns to the right move, and only in the same row?",
    "A row of W makes one output by itself, so rows do not interact. Columns to the left are done: going back to them would mean to solve "
    "everything anew, and the order left to right is what makes one pass enough (SparseGPT). G is taken inside this walk, so it is the "
    "cost although the others help. Masks that are compared on the other pages leave the kept weights as they are; a model that is to be "
    "used is pruned inside such a walk, and keeps the moved weights. Does it always help? With the cheapest weights removed it nearly "
    "always does; with a mask chosen without regard to the cost it can do harm to text it was not made for.",
    {"explore": "Single weights of my run"})

"""Step 1: why prune, and why for a domain. Step 6: sparsity from 0 to 90 %. Step 9: why it is not faster."""

import html

import pandas as pd
import streamlit as st

from analysis import comparisons, results, tiles
from analysis.chart import number, percent
from analysis.lesson import figures, prepare
from app import widgets
from app.lesson import job
from app.lesson.step import Step, formula
from dpruner.formulas import DEFAULT_LAM
from dpruner.masks import make_masks
from dpruner.store import Run

MODELS = {"dense": "Nothing pruned", "general": "Pruned, general", "dpruner": "Pruned, general + domain"}


def written(text: str, prompt: str) -> None:
    """A continuation as it came, behind its prompt."""
    st.html(f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;min-height:9em;line-height:1.6"><span '
            f'style="opacity:0.6">{html.escape(prompt)}'
            f"</span>{html.escape(text)}</div>")


def surprise(quality: pd.DataFrame) -> str:
    """A word on the dual mask where it serves the open domain better than the mask made for that."""
    general, dual = (quality[(quality.method == m) & (quality.text != prepare.DOMAIN)]["value"].iloc[0] for m in ("general", "dpruner"))
    return (" That the third does better on open-domain text as well is no slip: two sets of texts tell more about the weights than one."
            if dual < general else "")


def why(run: Run) -> None:
    """Three models continue the same text."""
    found = job.table(run, "words.json")
    prompts = list(dict.fromkeys(row["prompt"] for row in found["texts"]))
    prompt = st.segmented_control("Beginning of the text", prompts, default=prompts[0], key="learn-prompt", bind="query-params",
                                  required=True)
    st.markdown("A model has more weights than any one use of it needs. Which ones can go tells what it uses them for; and what is gone need not "
                "be stored or, with hardware that skips zeros, multiplied (step 9 says what that takes). A doctor's assistant and a lawyer's "
                "need not keep the same ones: that is why one asks a domain.")
    st.markdown("Three versions of one small model go on with the same words. The second and the third have lost "
                f"**{percent(found['sparsity'], 0)}** of the weights that can be pruned: as many of every matrix, but not the same ones. What "
                "the second keeps was decided by general text alone (the open domain), what the third keeps by text on "
                f"{prepare.DOMAIN} as well.")
    quality = pd.DataFrame(found["quality"])
    for place, (name, words) in zip(st.columns(3), MODELS.items(), strict=True):
        with place.container(border=True, height="stretch"):
            st.markdown(f"##### {words}")
            written(next(row["text"] for row in found["texts"] if row["model"] == name and row["prompt"] == prompt), prompt)
            for row in quality[quality.method == name].itertuples():
                st.markdown(f"Perplexity on {row.text} text: **{number(row.value)}** ({number(row.low)} to {number(row.high)})")
    windows = " and ".join(f"{row.n} on {row.text} text" for row in quality[quality.method == "dense"].itertuples())
    st.caption("**How to read this:** a perplexity of 150 says that the model is as unsure of the next token as if it chose among 150 "
               "equally likely ones, on text it has not seen: lower is better. In brackets the 95 % interval. “Domain” here is "
               f"{prepare.DOMAIN}. Texts are the most probable continuation, word by word. Measured on few windows of text, so that it is "
               f"soon done ({windows}): the same as those of the demonstration run."
               + surprise(quality))
    widgets.chart(comparisons.quality(quality.assign(method=quality.method.map(MODELS), domain=f"{prepare.DOMAIN} (where anything is pruned)")),
                  "learn-why-quality")
    formula(r"\text{remove } \lfloor s\cdot n\rceil \text{ of the } n \text{ weights of every matrix: those with the lowest score } S", {
        "s": f"sparsity, the share that is removed: {percent(found['sparsity'], 0)} here", "n": "weights of the matrix; ⌊ ⌉ rounds to a whole number",
        "S": "a score for every weight. The second model asks only what open-domain text loses without the weight; the third asks the "
             "domain as well. How, is the rest of this lesson"})


WHY = Step(
    "Why", "Why prune a model, and why ask a domain?", ("words.json",), why,
    "Switch to the other beginning. Which of the two pruned models still speaks of the subject?",
    "Both pruned models have lost exactly as many weights. Why do they write so differently?",
    "What counts is which weights went. The second model kept what open-domain text needs, and some of what health text needs went with "
    "the rest. For the third both needs were weighed in one score: what one side needs very much stays, even if the other does not ask "
    "for it. That is the idea of dual pruning: two importances, one mask. It may serve open-domain text better too, as it does here: two "
    "sets of texts tell more about the weights than one.",
    {"generate": "Write texts with my masks", "results": "Quality of my masks"})


# ---- step 6


def fall(run: Run) -> None:
    """Mask, perplexity and text at every tenth of sparsity."""
    found = job.table(run, "fall.json")
    rows = pd.DataFrame(found["rows"])
    share = st.slider("Sparsity: how much of every matrix is removed (%)", 0, 90, 50, 10, key="learn-sparsity", bind="query-params") / 100
    here = rows[(rows.sparsity - share).abs() < 1e-6]
    tensors, told = job.tensors(run, "layer.safetensors")
    mask = make_masks({"": tensors["dual"]}, share)[""].numpy()
    places = st.columns(4)
    places[0].metric("Weights kept in this matrix", f"{int(mask.sum()):,}", f"of {mask.size:,}", delta_color="off", delta_arrow="off")
    for place, row in zip(places[1:], here.itertuples(), strict=False):
        dense = rows[(rows.text == row.text) & (rows.sparsity == 0)]["value"].iloc[0]
        place.metric(f"Perplexity, {row.text} text", number(row.value), f"{row.value / dense:.2f} × dense", delta_color="off",
                     delta_arrow="off")
    left, right = st.columns([1, 1], gap="medium")
    with left:
        name = told["name"].removesuffix(".weight")
        widgets.chart(figures.compact(tiles.mask_tile(mask, None, ("the mask",), name), f"The mask of {name}", 470), "learn-fall-mask")
    with right:
        st.markdown("##### What it writes")
        with st.container(border=True):
            written(here["continuation"].iloc[0], found["prompt"])
            st.caption("One text is a small sample: it may read better at 70 % than at 60 %. The perplexity below is over many.")
        widgets.chart(figures.fall(rows, share), "learn-fall-curve")
    formula(r"M_{ij} = \begin{cases}1 & S_{ij} > \text{threshold}(s)\\ 0 & \text{otherwise}\end{cases}\qquad W \leftarrow M\odot W", {
        "s": "the slider", "S": f"the dual score of every weight (balanced, λ = {DEFAULT_LAM['balanced']:g}), computed once: another sparsity only moves the threshold",
        "M": "the mask at the left: blue is 1, kept"})


FALL = Step(
    "Sparsity", "How much can go before it falls apart?", ("layer.safetensors", "fall.json"), fall,
    "Move the slider from 0 % upwards. Note the first sparsity at which the text goes wrong, and what the perplexity is there.",
    "Removing the first half costs a few per cent of perplexity, the next four tenths a factor of thirty or so. Why is the beginning so "
    "cheap?",
    "The weights go in the order of their importance. Most of a matrix carries almost nothing of it, so the first half is nearly free; "
    "what goes at the end is what the model is made of. Errors of early layers also feed all later ones, so beyond a point they multiply.",
    {"layers": "What my masks keep, layer by layer", "generate": "Generate at any sparsity"})


# ---- step 9


def cost(run: Run) -> None:
    """Bytes and time, measured when the lesson was made."""
    found = job.table(run, "cost.json")
    ratio, low, high = results.speed_ratio(found["speeds"]["dense"], found["speeds"]["pruned"])
    speeds = pd.DataFrame(found["speeds"])
    st.markdown(f"**{found['removed']:,}** weights of the model are zero now ({percent(found['sparsity'], 0)} of those that can be pruned). What "
                "does that buy?")
    places = st.columns(3)
    quiet = {"delta_color": "off", "delta_arrow": "off"}
    places[0].metric("Dense", f"{speeds.dense.median():.0f} tokens/s", f"{len(speeds)} rounds", **quiet)
    places[1].metric("Pruned", f"{speeds.pruned.median():.0f} tokens/s", f"{len(speeds)} rounds", **quiet)
    places[2].metric("Times as fast", f"{ratio:.2f}", f"95 %: {low:.2f} to {high:.2f}", **quiet)
    st.caption("Measured on this machine when the lesson was made, dense and pruned in turn: medians of the rounds, and the mean of pruned ÷ dense "
               "in the same round, which other work on the machine disturbs less. Where the interval holds 1, there is no "
               "difference beyond the "
               "noise." + ("" if low <= 1 <= high else " Here it leaves out 1, though both do the same multiplications: something else "
                                                           "kept this "
                               "machine busy. The page Results measures again."))
    widgets.chart(comparisons.bytes_bars(pd.DataFrame(found["sizes"])), "learn-cost-bytes")
    st.caption(f"Compression is what zlib leaves of {percent(found['sampled'], 0)} of the weights, measured; “kept weights + packed mask” is "
               "counted.")
    formula(r"y_i = \sum_j W_{ij}\,x_j \qquad\text{costs}\qquad \text{out}\times\text{in multiplications, whether or not } W_{ij}=0", {
        "x_j,\\ y_i": "inputs and outputs of a linear, in and out of them",
        "W_{ij}": "a zero is a number like any other to a dense matrix product: it is stored, loaded and multiplied",
        })
    st.caption(f"Bytes of “kept weights + packed mask”: kept weights × 2 ({found['precision']}) + 1 bit for every prunable weight, in a format that "
               "knows the mask.")


COST = Step(
    "Speed", "Why is it not faster by itself?", ("cost.json",), cost,
    "Compare the bars “as it is stored”. Then find the one that is smaller, and say what a program must know to use it.",
    "What would make the zeros pay?",
    "Their order. If of every four weights in a row two are zero (2:4), some GPUs skip them; if whole rows, heads or layers are zero they "
    "can be cut out. Zeros anywhere pay only in storage, with a format that leaves them out, or at very high sparsity with sparse kernels. "
    "What pruning shows here is which weights a domain needs.",
    {"results": "Bytes and speed of my run, and the export"})



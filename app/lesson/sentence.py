"""Step 4: the gradient of a sentence, the score it gives, and what λ adds."""

import json
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st
import torch

from analysis.chart import percent
from analysis.lesson import arithmetic, figures, numbers, prepare
from app import resident, widgets
from app.lesson import counting, job
from app.lesson.step import Step, cell, formula, take_click, window, written_out
from dpruner.errors import InputError
from dpruner.formulas import DEFAULT_LAM, FORMULAS
from dpruner.store import Run

POWERS = tuple(round(float(np.log10(lam))) for lam in numbers.LAMBDAS)
LATEX = {
    "balanced": r"u = g\,w, \qquad F = u^2, \qquad S = \frac{F}{\bar F} + \lambda\,\frac{G}{\bar G}",
    "taylor": r"g' = g + 2\lambda\alpha^2\,G\,g\,h, \quad h = g^2, \qquad u = g'w, \qquad S = \left|u - \tfrac12u^2\right|",
    "release": r"\hat g = 2^{16}g, \quad g' = \hat g + \lambda\,\tfrac{2\alpha^2}{1000}\,G\,\hat g^2, \qquad u = g'w, \qquad "
               r"S = \left|u + \tfrac{u^2}{2000} + w^3\right|"}
ABOUT = {
    "balanced": "It is the default of this program. Both sides are divided by their mean over the matrix, so λ = 1 gives them equal weight: λ decides much.",
    "taylor": "These are the paper's equations. The general side comes in through the gradient, times α² = 0.0009 and times g²: far too small to "
              "change an order, unless λ is astronomic.",
    "release": "It is what the authors' published code adds up. At its own λ = 0.1 the general side is less than a millionth of the gradient: λ is "
               "inert, and the mask is the domain's alone."}
MORE = {   # symbols that only one formula has
    "balanced": {"F": "the square, because the sign of u does not matter; a run takes its mean over many texts",
                 r"\bar F,\ \bar G": "the means over the matrix"},
    "taylor": {"g'": "the gradient with the pull of the general side", r"\alpha": "0.03, how far a weight is imagined to move", "h": "g² of this sentence; in a run, the mean over all texts",
               r"u - \tfrac12u^2": "what the loss changes when w goes to zero, to second order: slope times w, and half the curvature, for "
                                  "which the paper takes g², times w²"},
    "release": {r"\hat g": "the gradient as half-precision training keeps it: times 2¹⁶, lest it vanish; u grows with it",
                "g'": "that gradient with the pull of the general side", "w^3": "a third term of the published code", r"\alpha": "0.03",
                "1000": "texts the code divides by, whatever their number"}}
NARROW = "\u202f"   # a space at which no line breaks
COMPARED = {"from_zero": "λ = 0", "from_usual": "the formula's own λ"}


class Read(NamedTuple):
    """What the page needs of a sentence.

    Attributes:
        text, tokens, loss: as of `numbers.Sentence`.
        g: gradient in the first linear.
    """

    text: str
    tokens: list[str]
    loss: float
    g: torch.Tensor


def prepared(run: Run) -> Read:
    """The sentence that comes with the lesson."""
    found, told = job.tensors(run, "sentence.safetensors")
    return Read(told["text"], json.loads(told["tokens"]), float(told["loss"]), found["g"])


@st.cache_resource(max_entries=64, show_spinner="Reading the sentence, forwards and backwards …")
def typed(text: str, _run: Run, folder: str) -> Read:
    """A sentence of the user; not to be changed."""
    found = counting.read(text, _run, folder)
    return Read(found.text, found.tokens, found.loss, next(iter(found.gradients.values())).cpu())


@st.cache_data(max_entries=64, show_spinner=False)
def in_matrix(text: str, formula_name: str, power: int, _w, _g, _G, when: tuple) -> dict[str, np.ndarray]:
    """Score of the first linear at one λ, without its general side, and the masks at that λ, at 0 and at the formula's own."""
    lam = 10.0**power
    dual, domain = numbers.scored(formula_name, lam, _w, _g, _G)
    masks = {name: numbers.kept_by(formula_name, at, _w, _g, _G, prepare.SPARSITY).numpy()
             for name, at in (("kept", lam), ("from_zero", 0.0), ("from_usual", DEFAULT_LAM[formula_name]))}
    return {"S": dual.numpy(), "domain": domain.numpy(), **masks}


def sentence(run: Run) -> Callable[[], None] | None:
    """The sentence, the λ, the tile with its flips, and the counts; returned is what there is to do once they stand there."""
    first, second = st.columns([4, 3], gap="medium")
    text = first.text_input("A sentence of the domain", prepare.SENTENCE, key="learn-sentence", bind="query-params", max_chars=400,
                            help="The model reads it, and the error of its predictions is traced back to every weight: that is the "
                                 "gradient g.")
    name = second.segmented_control("Formula", list(FORMULAS), default="balanced", key="learn-formula", bind="query-params", required=True)
    read = prepared(run)
    if text.strip() != read.text:
        read = typed(text.strip(), run, str(run.folder))
    power = first.slider("λ, the weight of the general side: a power of ten", min(POWERS), max(POWERS),
                         round(float(np.log10(DEFAULT_LAM[name]))),
                         key=f"learn-power-{name}", bind="query-params", format="10^%d")
    against = second.radio("Outlined: cells whose fate differs from that at", list(COMPARED), format_func=COMPARED.get, key="learn-against",
                           bind="query-params", horizontal=True)
    lam, spelled = 10.0**power, written(power)
    pieces = " · ".join(piece.strip() or "␣" for piece in read.tokens).replace("`", "'")
    st.markdown(f"Read as {len(read.tokens)} tokens: `{pieces}`")
    st.caption(f"Mean loss {read.loss:.2f}: to each next token the model gave a chance of "
               f"e^−{read.loss:.2f}, one in {np.exp(read.loss):,.0f}, in the geometric mean.")
    st.markdown(f"**{name}**, whose own λ is {DEFAULT_LAM[name]:g}. {ABOUT[name]}")
    table = curves(run, read.text)
    tensors, told = job.tensors(run, "layer.safetensors")
    w, g, G = tensors["W"], read.g, tensors["G"]
    here = in_matrix(read.text, name, power, w, g, G, job.stamp(run, "layer.safetensors"))
    left, right = st.columns([4, 3], gap="medium")
    with right:
        row, column, origin = cell(tuple(w.shape))
    rows, columns = window(origin)
    flipped = here["kept"] != here[against]
    with left:
        values = {"w": w[rows, columns].numpy(), "g": g[rows, columns].numpy(), "G": G[rows, columns].numpy(),
                  "S": here["S"][rows, columns],
                  "S_without_general": here["domain"][rows, columns], "kept": here["kept"][rows, columns]}
        widgets.chart(figures.tile(
            here["S"][rows, columns], origin, values,
            "row %{customdata[0]}, column %{customdata[1]}<br>w = %{customdata[2]:.4g}, g = %{customdata[3]:.4g}, G = "
            "%{customdata[4]:.4g}<br>domain side alone: %{customdata[6]:.4g}<br>S = "
            "%{customdata[5]:.4g}", title=f"Score S of {name} at λ = {spelled}", quantity="S",
            chosen=(row, column), flipped=flipped[rows, columns], removed=~here["kept"][rows, columns],
            how=f"The brighter, the more this weight matters to the sentence and, as far as λ lets it, to the open domain. Crosses go at "
                f"{percent(prepare.SPARSITY, 0)}; outlined cells would have met the other fate at {COMPARED[against]}."),
            "learn-tile", on_select=lambda: take_click("learn-tile"), selection_mode="points")
    with right:
        tell = partial(told_counts, st.empty(), against, [("tile", flipped[rows, columns].sum(), flipped[rows, columns].size),
                                                          ("matrix", flipped.sum(), flipped.size)])
        tell(table if table is None else at_lambda(table, name, lam, against))
        written_out(row, column, arithmetic.score(name, lam, w, g, G, here["S"], row, column),
                    f"At λ = {spelled} it is **{'kept' if here['kept'][row, column] else 'removed'}**.")
    curve = st.container()
    if table is not None:
        draw_curves(curve, table, name, lam)
    formula(LATEX[name], {
        "w": f"a weight of `{told['name'].removesuffix('.weight')}`, as in step 2", "g": "its gradient: how fast the sentence's error "
                                                                                         "grows with the weight",
        "u": "gradient times weight: to first order, how the error changes when the weight goes to zero",
        "G": "general importance of the weight, as in step 2", r"\lambda": "the slider: how much the open domain has to say",
        "S": "the colour of the cell; of every matrix, the half with the lowest S goes", **MORE[name]})
    if read.text == prepare.SENTENCE:
        return partial(resident.load_ahead, run)   # for the first sentence that is typed
    return partial(count, run, read.text, name, lam, against, tell, curve) if table is None else None


def written(power: int) -> str:
    """A power of ten as one writes it by hand."""
    return f"{10.0**power:g}" if abs(power) < 5 else "10" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def curves(run: Run, text: str) -> pd.DataFrame | None:
    """Counts of the whole model at every λ by every formula, as of `numbers.changed_everywhere`; None where they are not there yet."""
    if text == prepare.SENTENCE:
        return pd.DataFrame(job.table(run, "flips.json")["rows"]) if (run.folder / "flips.json").is_file() else None
    tables = [counting.counted(run, text, name) for name in FORMULAS]
    return None if any(table is None for table in tables) else pd.concat(tables, ignore_index=True)


def count(run: Run, text: str, name: str, lam: float, against: str, tell: Callable[..., None], curve) -> None:
    """Count in the whole model: first at the λ of the slider, then at every λ by every formula, the chosen one first.

    Args:
        tell: `told_counts` of this page.
        curve: the place of the curves.
    """
    with curve:
        first, note = st.empty(), st.empty()
    try:
        if counting.counted(run, text, name) is None:
            table = counting.counted(run, text, name, (lam,), lambda done, of: tell(note=f"counting: {done} of {of} matrices"))
            tell(at_lambda(table, name, lam, against))
        for at, each in enumerate(sorted(FORMULAS, key=lambda formula_name: formula_name != name)):
            table = counting.counted(run, text, each, tell=lambda done, of, each=each: note.caption(
                f"The whole model is being counted at every λ, by {each}: {done} of {of} matrices."))
            if at == 0:
                tell(at_lambda(table, name, lam, against))
                draw_curves(first, table, name, lam, "-first")
        draw_curves(first, curves(run, text), name, lam)
        note.empty()
    except InputError as error:
        tell()
        note.caption(str(error))


def draw_curves(place, table: pd.DataFrame, name: str, lam: float, key: str = "") -> None:
    with place.container():
        widgets.chart(figures.lambda_curves(table, name, lam), f"learn-lambda{key}")


def at_lambda(table: pd.DataFrame, name: str, lam: float, against: str) -> tuple[str, int, int]:
    """The model's line of `told_counts`."""
    row = table[(table.formula == name) & np.isclose(table.lam, lam)].iloc[0]
    return "model", int(row[against]), int(row.weights)


def small_share(share: float) -> str:
    """A share as a percentage with two digits that count, however small."""
    digits = 2 if share == 0 or share >= 1e-4 else 1 - int(np.floor(np.log10(100 * share)))
    return percent(share, digits).replace(" ", NARROW)


def told_counts(place, against: str, here: list[tuple[str, int, int]], model: tuple[str, int, int] | None = None, note: str = "") -> None:
    """How many cells flip in the tile, in the matrix, in the model.

    Args:
        here: (where, decisions that differ, of how many), of tile and matrix.
        model: the same of the model, where it has been counted.
        note: what stands in its place.
    """
    lines = [f"| {where} | **{flips:,}** | {of:,} | "
             f"{small_share(flips / of)} |"
             for where, flips, of in [*here, *([model] if model else [])]]
    place.markdown("\n".join([f"Decisions that differ from {COMPARED[against]}:\n", "| in the | differ | of | share |", "|---|--:|--:|--:|",
                              *lines, *([f"| model | | | {note} |"] if note else [])]))


SENTENCE = Step(
    "Sentence", "What does a sentence need, and what does λ add?", ("layer.safetensors", "sentence.safetensors"), sentence,
    "Move λ through its range with **release**, and watch the table of decisions: at which λ does the first one of the model change? Do the "
    "same with **balanced**, whose λ decides from the start. Then type a sentence of your own.",
    "The authors' published code is **release** with λ = 0.1. How many of the model's decisions does it change here, and why?",
    "Next to none: see the ring on the floor of the curve. Its general side is multiplied by 2α²/1000 and comes to less than a millionth of "
    "the gradient it is added to. With scores divided by their means (balanced) λ = 1 changes about a quarter of them, for one sentence; a "
    "run asks many texts of the domain, and λ changes fewer. So do not ask a paper for its λ, but for how many decisions it changes.",
    {"overlap": "What λ changed in my run"})

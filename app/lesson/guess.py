"""Step 7: predict, then look. Step 8: similarity between floor and ceiling."""

import numpy as np
import pandas as pd
import streamlit as st

from analysis import alike, figures, similarity
from analysis.chart import listed, percent
from analysis.lesson import prepare
from analysis.matrices import places
from analysis.sparsity import told as in_words
from app import data, widgets
from app.lesson import job
from app.lesson.step import Step, formula, mine
from dpruner.errors import InputError
from dpruner.store import Run


BOTH = "general + domain"
SIDES = {BOTH: "", "the domain alone": " alone"}   # what its labels end with


def pairs_of(counts: similarity.Counts, domains: list[str]) -> pd.DataFrame:
    """Every two domains' masks; and of masks from half the text each, the ceiling and what the two domains share, NaN where there are none."""
    found = similarity.pairs(counts.only(domains))
    halves = [f"{d}~{n}" for d in domains for n in (1, 2)]
    if not set(halves) <= set(counts.labels):
        return found.assign(ceiling=np.nan, halves=np.nan)
    cut, (i, j) = similarity.halves(counts.only(halves))["model"], np.triu_indices(len(domains), 1)
    return found.assign(ceiling=cut.same[i, j], halves=cut.other[i, j])


# ---- step 7


def predict(run: Run) -> None:
    """Three questions; each shows its answer once it has been guessed, or all at once for the wall."""
    everything = st.toggle("Show all answers", key="learn-reveal", bind="query-params", help="For the teacher, after the class has voted.")
    counts, domains = job.counts(run, prepare.SPARSITY)
    table = pairs_of(counts, domains)
    names = [f"{a} and {b}" for a, b in zip(table.a, table.b, strict=True)]
    best = names[int(table.jaccard.argmax())]
    st.markdown(f"All masks here remove {percent(prepare.SPARSITY, 0)} of every matrix. Guess first.")

    with st.container(border=True):
        random = similarity.pairs(counts.only([label for label in counts.labels if label.startswith("random")]))
        shown = [25, 33, 50, 67, 100]
        guess = st.radio("1. Two masks are drawn at random, each keeps half. What share of the weights that either keeps do both keep "
                         "(%)?", shown,
                         index=None, key="learn-guess-random", horizontal=True)
        if answered := guess is not None or everything:
            value = float(random.jaccard.iloc[0])
            verdict(guess, 33, f"**{percent(value, 2)}**, counted over {int(random.weights.iloc[0]):,} weights. Both keep a quarter, either "
                               "keeps three quarters: a third. So a third means nothing in common.")

    with st.container(border=True):
        guess = st.radio("2. Masks for which two domains share most?", names, index=None, key="learn-guess-pair", horizontal=True)
        if guess or everything:
            verdict(guess, best, f"**{best}** share most: {percent(float(table.jaccard.max()))} of what either keeps.{close(table, names)}")
            widgets.chart(alike.pair_dots(table.drop(columns=["ceiling", "halves"])), "learn-predict-pairs")

    with st.container(border=True):
        found = job.table(run, "modules.json")
        rows = pd.DataFrame(found["rows"])
        rows = pd.concat([places(rows.matrix.tolist()), rows.drop(columns="matrix")], axis=1).assign(kept_share=rows.kept / rows.weights)
        by_module = rows.groupby("module", sort=False)[["kept", "weights"]].sum()
        shares = by_module.kept / by_module.weights
        guess = st.radio("3. Now one threshold holds for the whole model, so that matrices may keep different shares. Which module keeps "
                         "most?",
                         list(shares.index), index=None, key="learn-guess-module", horizontal=True)
        if guess or everything:
            verdict(guess, shares.idxmax(), f"**{shares.idxmax()}** keeps {percent(float(shares.max()))}, {shares.idxmin()} only "
                                            f"{percent(float(shares.min()))}. Their scores are divided by one mean for the whole model, so "
                                            "they compare.")
            widgets.chart(figures.whole_model_chart(rows, found["sparsity"]), "learn-predict-modules")
    symbols = {"A, B": "the sets of weights that two masks keep", "J": "Jaccard similarity: both over either"}
    if answered:   # it would tell what the first question asks
        formula(r"J(A, B) = \frac{|A\cap B|}{|A\cup B|}, \qquad J_\text{random} = \frac{p^2}{2p-p^2} = \frac13\ \text{ at } p=\tfrac12",
                symbols | {"p": "the share that each keeps"})
    else:
        formula(r"J(A, B) = \frac{|A\cap B|}{|A\cup B|}", symbols)


def close(table: pd.DataFrame, names: list[str]) -> str:
    """A word on pairs that the 95 % intervals do not tell from the first."""
    best = int(table.jaccard.argmax())
    near = [name for name, low, high in zip(names, table.low, table.high,
                                            strict=True) if high >= table.low.iloc[best] and name != names[best]]
    return f" But it is close: the 95 % interval overlaps that of {listed(near)}, so they are not told apart for certain." if near else ""


def verdict(guess, truth, words: str) -> None:
    """Right, wrong, or only shown; then what is the case."""
    if guess is None:
        st.markdown(words)
    elif guess == truth:
        st.success(f"Right. {words}", icon=":material/check:")
    else:
        st.info(f"Not {guess}: {words}", icon=":material/lightbulb:")


PREDICT = Step(
    "Predict", "Predict first, then look", ("alike.safetensors", "modules.json"), predict,
    "Write your three guesses down before you click; a class votes with hands. Being surprised is what makes it stay.",
    "Two masks that keep 20 % each share 20 % of what either keeps. Is that much?",
    "Two random masks that keep 20 % share 0.04 / 0.36 = 11 %. So it is more than chance, but most of what they keep is not shared. "
    "Without the floor the number says nothing.",
    {"similarity": "Similarity of my masks", "layers": "One threshold for my model"})


# ---- step 8


def own_pairs(selected) -> pd.DataFrame:
    """Every two domains of the user's own run at the sparsity chosen at the left, as `pairs_of`.

    Raises:
        InputError: there are no two masks to compare, or they take long to read.
    """
    if data.is_large(selected.run):
        raise InputError("The masks of this run are not compared here", "it is so large that reading them takes a while",
                         "open the page Similarity, or switch back to the lesson's")
    domains = [d for m, d in data.pairs(selected.run) if m == selected.method]
    own = data.own_masks(selected.run, selected.sparsity)
    stamps = {label: data.mask_stamp(selected.run, selected.method, label, own) for d in domains for label in (d, f"{d}~1", f"{d}~2")}
    there = tuple((label, found) for label, found in stamps.items() if found is not None)
    domains = [d for d in domains if stamps[d] is not None]
    if len(domains) < 2:
        raise InputError("There is nothing to compare", f"the run has {len(domains)} mask{'s' * (len(domains) != 1)} of {selected.method} "
                                                        "at this sparsity",
                         "choose another run or method at the left, or switch back to the lesson's")
    return pairs_of(data.counts(there, None if own else selected.sparsity), domains)


def between(run: Run) -> None:
    """Every pair of domains between what chance gives and what one domain's own text gives."""
    selected = mine()
    if selected is None:
        share = st.slider("Sparsity (% removed)", 10, 90, 50, 10, key="learn-alike", bind="query-params") / 100
        which = st.segmented_control("Masks of", list(SIDES), default=BOTH, key="learn-sides", bind="query-params", required=True,
                                     help="The dual score regards the open domain as well, which is the same for all domains.")
        counts, domains = job.counts(run, share)
        table = pairs_of(counts, [f"{d}{SIDES[which]}" for d in domains])
    else:
        share, table = selected.sparsity, own_pairs(selected)
    if (table.jaccard == 1).all():
        st.info("These masks are the same, weight by weight: there is nothing to draw. Choose another sparsity.")
        return
    mean, floor, ceiling, other = (float(table[c].mean()) for c in ("jaccard", "floor", "ceiling", "halves"))
    way = similarity.of_the_way(other, floor, ceiling)
    told = [("Floor: random masks", f"{floor:.3f}"), ("Two domains", f"{mean:.3f}"), ("½ text: 2 domains", f"{other:.3f}"),
            ("½ text: 1 domain", f"{ceiling:.3f}"), ("Floor to ceiling", percent(way))]
    for place, (label, value) in zip(st.columns(5), told, strict=True):
        place.metric(label, value if np.isfinite(other) or label in ("Floor: random masks", "Two domains") else "unknown")
    widgets.chart(alike.pair_dots(table), "learn-alike-dots")
    if np.isfinite(way):
        st.markdown(f"From half the text each, masks of two domains go **{percent(way)}** of the way from chance to what masks of one domain share. "
                    f"What is missing, {ceiling - other:.3f}, is the difference that the subject of the text makes.")
    formula(r"\text{from floor to ceiling} = \frac{J_{\text{two}} - J_\text{floor}}{J_\text{one} - J_\text{floor}}", {
        r"J_\text{floor}": f"the line at the left: what random masks share that keep as much, {floor:.3f} at {in_words(share)}",
        r"J_\text{two}": "an open circle: what masks of two domains share, each made from half of its domain's text",
        r"J_\text{one}": "a mark at the right, the ceiling: what masks from the two halves of one domain's text share. Masks from different texts "
                         "differ even then; two domains can hardly be more alike. Both come from half the text because less text makes a mask "
                         "noisier: the filled dot, from all the text, lies to the right for that reason alone, and is not to be compared with these two"})


ALIKE = Step(
    "Similarity", "How alike are two domains, really?", ("alike.safetensors",), between,
    "Compare **general + domain** with **the domain alone**: which masks of two domains lie farther below the ceiling, and why? Then move "
    "the sparsity to 90 %.",
    "A paper reports that the masks of two domains share 60 %. What two numbers do you ask for?",
    "What random masks of that sparsity would share (the floor), and what two masks of one domain share that were made from different "
    "texts, as much of it as the paper's masks (the ceiling). If the ceiling is 62 %, the domains are almost as alike as a domain is to "
    "itself; if it is 95 %, they differ much.",
    {"similarity": "Similarity in my run, by layer and module"})

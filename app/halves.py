"""Masks from halves of each domain's text, which compare domains on equal terms: which there are, and where in the model domains part."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from analysis import figures, similarity
from analysis.chart import signed
from app import data, state, widgets
from dpruner.store import Run


class Mask(NamedTuple):
    """One mask to be compared, and what the page calls it."""

    label: str
    run: Run
    method: str
    domain: str


def halves_of(masks: list[Mask], sparsity: float | None) -> tuple[list[int], similarity.Counts] | None:
    """Which masks have masks of the two halves of their domain's text, and the counts of those; None where no two are comparable."""
    stamps = [[data.mask_stamp(mask.run, mask.method, f"{mask.domain}~{n}", sparsity is None) for n in (1, 2)] for mask in masks]
    there = [i for i, both in enumerate(stamps) if all(both)]
    if not any(comparable(masks[i], masks[j]) for i in there for j in there):
        return None
    return there, data.counts(tuple((f"{i}~{n}", stamp) for i in there for n, stamp in enumerate(stamps[i], 1)), sparsity)


def comparable(a: Mask, b: Mask) -> bool:
    """Whether halves of these masks' texts say something about domains: one method, two domains, as much text."""
    settings = [[mask.run.config[name] for name in ("nsamples", "seqlen", "formula", "lam", "granularity")] for mask in (a, b)]
    return a.method == b.method and a.domain != b.domain and settings[0] == settings[1]


def halves(masks: list[Mask], sparsity: float | None, measure: str, by: str) -> dict:
    """{group: what masks of half the text share, NaN where two are not `comparable` or one has none}; empty without any."""
    found = halves_of(masks, sparsity)
    if found is None:
        return {}
    there, counts = found
    known = np.array([[comparable(a, b) for b in masks] for a in masks])

    def spread(values: np.ndarray) -> np.ndarray:
        every = np.full((len(masks), len(masks)), np.nan)
        every[np.ix_(there, there)] = values
        return np.where(known, every, np.nan)

    return {group: similarity.Halves(*map(spread, cut)) for group, cut in similarity.halves(counts, measure, by).items()}


def mean_pair(matrix: np.ndarray) -> float:
    """The mean of what is known of every two different masks."""
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else float("nan")


def where_they_part(masks: list[Mask], sparsity: float | None, places: pd.DataFrame, chosen: tuple[int, str] | None = None) -> None:
    """Layers × modules: how much less two domains share than one, on equal terms.

    Args:
        sparsity: at which ranks are cut; None for the runs' own masks.
        places: the matrices, as `data.places`.
        chosen: block and module to be framed.
    """
    gaps = {name: mean_pair(cut.same) - mean_pair(cut.other) for name, cut in halves(masks, sparsity, "jaccard", "matrix").items()}
    if not gaps:
        return
    table, key = places.assign(gap=lambda t: t.matrix.map(gaps)), "similarity-gap"
    widgets.chart(figures.layer_heatmap(
        table, "gap", title="Where do the domains part?", quantity="Jaccard, one domain − two", middle=0.0, chosen=chosen,
        how="What masks of one domain share, minus what masks of two share, all from half the text each: 0 where the subject of the text makes no "
            "difference, the higher the more it does. A click chooses the matrix, here and on the other pages."),
        key, on_select=lambda: state.choose_matrix(key), selection_mode="points")
    most, least = table.loc[table.gap.idxmax()], table.loc[table.gap.idxmin()]
    st.markdown(f"The domains part most in layer {most.block}, {most.module} ({signed(most.gap, 3)}), least in layer {least.block}, {least.module} "
                f"({signed(least.gap, 3)}).")

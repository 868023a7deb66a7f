"""Experiments as figures: what was measured at every point, and whether like masks serve each other's texts.

Every function returns a Chart, or None where a chart could not be informative.
"""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import comparisons
from analysis.chart import AROUND, CELL_TEXT, FAINT, VERMILLION, Chart, colour_bar, columns, new_figure, number, plain
from dpruner.transfer import predicts, transfer

FLOOR = "random"   # its perplexities are so high that nothing else could be told apart beside them


def texts_of(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(domain pruned for, task, metric) of everything an experiment has measured, in its order."""
    measured = table[table["low"].notna() & (table["method"] != "dense")]
    return list(dict.fromkeys(measured[["domain", "task", "metric"]].itertuples(index=False, name=None)))


def measured(table: pd.DataFrame, axis: str, domain: str, task: str, metric: str) -> Chart | None:
    """One metric of one task over the axis of an experiment, a line or a row of dots for each model.

    Args:
        table: as `Experiment.results` gives it.
        axis: what its x is.
    """
    rows = table[(table["task"] == task) & (table["metric"] == metric) & table["low"].notna()]
    rows = rows[((rows["domain"] == domain) | (rows["method"] == "dense")) & (rows["method"] != FLOOR)]
    numeric = pd.to_numeric(rows["x"], errors="coerce").notna().all()
    rows = rows.assign(**{axis: pd.to_numeric(rows["x"]) if numeric else rows["x"]})
    rows = rows[(rows["method"] != "dense") | ~rows.duplicated(["method", "value"])]
    made = comparisons.quality(rows.assign(method=rows["series"]), x=axis, series="method", metric=metric, lower_is_better=metric == "perplexity")
    if made is None:
        return None
    title = f"{metric[0].upper()}{metric[1:]} on {task.removesuffix('-perplexity')} text against {axis}, pruned for {domain}"
    dense = " The dashed line is the dense model." if (rows["method"] == "dense").any() else ""
    how = ("Dots with 95 % intervals. Models differ less than their intervals suggest, because all read the same windows: the table of figures has the "
           f"differences taken window by window, and which of them are more than noise.{dense}" + (f" {FLOOR} masks, far above all others, are left out." if (table["method"] == FLOOR).any() else ""))
    return Chart(title, made.figure, made.table, how, made.alt)


def excess(table: pd.DataFrame) -> Chart | None:
    """Every domain's mask on every domain's text: how much worse than the text's own mask.

    Args:
        table: results of the experiment "transfer".

    Returns:
        None for fewer than two domains.
    """
    found = transfer(table)
    names = list(dict.fromkeys(found["mask"]))
    if len(names) < 2:
        return None
    at = {v: i for i, v in enumerate(names)}
    shown = np.full((len(names), len(names)), np.nan)
    for r in found.itertuples():
        shown[at[r.mask], at[r.text]] = 0.0 if r.mask == r.text else r.excess
    most = float(np.nanmax(np.abs(shown))) or 1.0
    figure = new_figure(height=150 + 44 * max(len(names), 4))
    figure.add_trace(go.Heatmap(z=shown, x=[plain(n) for n in names], y=[plain(n) for n in names], colorscale=AROUND, reversescale=True, zmin=-most,
                                zmax=most, texttemplate="%{z:+.1%}", textfont=CELL_TEXT, xgap=1, ygap=1, colorbar=colour_bar("excess perplexity", tickformat="+.0%"),
                                hovertemplate="mask of %{y} on %{x} text: %{z:+.2%}<extra></extra>"))
    figure.update_xaxes(title="text of", showgrid=False)
    figure.update_yaxes(title="mask of", autorange="reversed", showgrid=False)
    apart = found[found["mask"] != found["text"]]
    worst = apart.loc[apart["excess"].idxmax()]
    alt = f"Excess perplexity of {len(names)} masks on {len(names)} texts; most: the mask of {worst['mask']} on {worst['text']} text, {worst.excess:+.1%}."
    how = "Each column is one text. 0 is the text's own mask; above it, another domain's mask serves the text worse."
    return Chart("What does another domain's mask cost?", figure, found, how, alt)


def prediction(table: pd.DataFrame) -> Chart | None:
    """Likeness of two masks against what one costs on the other's text, a dot for each ordered pair, with intervals.

    Returns:
        None for fewer than three domains.
    """
    found = transfer(table)
    rho, p = predicts(found)
    if math.isnan(rho):
        return None
    pairs = found[found["mask"] != found["text"]].reset_index(drop=True)
    figure = new_figure()
    figure.add_trace(go.Scatter(
        x=pairs["jaccard"], y=pairs["excess"], mode="markers", showlegend=False, marker={"size": 9, "color": VERMILLION},
        error_y={"array": pairs["high"] - pairs["excess"], "arrayminus": pairs["excess"] - pairs["low"], "color": FAINT},
        customdata=columns(pairs["mask"], pairs["text"], pairs["low"], pairs["high"]),
        hovertemplate="mask of %{customdata[0]} on %{customdata[1]} text: %{y:+.2%} (95 %: %{customdata[2]:+.2%} to %{customdata[3]:+.2%})<br>"
                      "Jaccard %{x:.4f}<extra></extra>"))
    figure.update_xaxes(title="Jaccard similarity of the two masks")
    figure.update_yaxes(title="excess perplexity", tickformat="+.0%")
    says = "does" if rho < 0 and p < 0.05 else "is not shown to"
    how = (f"Dots that fall from left to right mean that like masks serve each other's texts. Spearman's correlation is {number(rho)}, p = {p:.3f} over "
           f"permutations of the domains: similarity {says} predict transfer here.")
    alt = f"{len(pairs)} pairs of masks; Spearman's correlation of similarity and excess perplexity {number(rho)}, p = {p:.3f}."
    return Chart("Does similarity predict transfer?", figure, pairs, how, alt)

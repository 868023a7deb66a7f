"""Experiments as figures: what was measured at every point, and whether like masks serve each other's texts.

Every function returns a Chart, or None where a chart could not be informative.
"""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import comparisons
from analysis.chart import (AROUND, CELL_TEXT, GREY, Chart, colour_bar, columns, error_bars, listed, look, new_figure, number,
                            plain)
from dpruner.experiments import ALL
from dpruner.metrics import BETTER, NOISE, WORSE
from dpruner.transfer import predicts, transfer

RATIOS = (0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)   # marked on an axis of wide differences
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
    rows = _shown(table, axis, domain, task, metric)
    rows = rows[(rows["method"] != "dense") | ~rows.duplicated(["method", "value"])]
    made = comparisons.quality(rows.assign(method=rows["series"]), x=axis, series="method", metric=metric, lower_is_better=metric == "perplexity")
    if made is None:
        return None
    dense = " The dashed line is the dense model." if (rows["method"] == "dense").any() else ""
    how = ("Dots with 95 % intervals, which say how far other texts would move each figure. They move all models together, so where intervals overlap "
           f"models may still differ: differences are taken on the same windows of text.{dense}{_left_out(table)}")
    return Chart(f"{metric[0].upper()}{metric[1:]} on {_text(task)} text by {axis}, pruned for {domain}", made.figure, made.table, how, made.alt)


def differences(table: pd.DataFrame, axis: str, domain: str, task: str, metric: str) -> Chart | None:
    """How far each model is from the one it is compared with, on the same items, with the interval of that difference.

    Args:
        table: as `Experiment.results` gives it.
        axis: what its x is.

    Returns:
        None where nothing is compared.
    """
    rows = _shown(table, axis, domain, task, metric)
    names = list(dict.fromkeys(rows.loc[rows["method"] != "dense", "series"]))   # each in the colour it has among the figures themselves
    rows = rows[rows["difference"].notna()]
    if rows.empty:
        return None
    places = {x: i for i, x in enumerate(dict.fromkeys(rows[axis]))}
    against = listed(dict.fromkeys(rows["against"]))
    against = f"{axis} = {against}" if set(rows["against"]) <= set(table["x"]) else against
    lower, several = metric == "perplexity", rows["series"].nunique()
    wide = lower and rows["difference_high"].max() > 2   # shares of a figure: twice as much and half as much are as far from 0
    figure = new_figure()
    for at, (name, of) in enumerate(rows.groupby("series", sort=False)):
        style, noise = look(names.index(name)), of["verdict"] == NOISE
        beside = (at - (several - 1) / 2) * min(0.6 / several, 0.16)
        value = of["difference"] + wide
        figure.add_trace(go.Scatter(
            x=np.array([places[x] for x in of[axis]]) + beside, y=value.to_numpy(), mode="markers", legendgroup=name, showlegend=False,
            marker={"size": 10, "color": style["color"], "symbol": [style["symbol"] + "-open" * hollow for hollow in noise],
                    "line": {"width": 2, "color": style["color"]}},
            error_y={**error_bars(value, of["difference_low"] + wide, of["difference_high"] + wide), "color": style["color"]},
            customdata=columns(of["difference"], of["difference_low"], of["difference_high"], of["verdict"], of["n"], of[axis]),
            hovertemplate=f"{plain(name)}, {plain(axis)} %{{customdata[5]}}<br>%{{customdata[0]:+.2%}} (95 %: %{{customdata[1]:+.2%}} to %{{customdata[2]:+.2%}}, "
                          "n = %{customdata[4]:,})<br>%{customdata[3]}<extra></extra>"))
        figure.add_trace(go.Scatter(x=[None], y=[None], name=plain(name), mode="markers", legendgroup=name,   # filled, whatever its first point is
                                    marker={"size": 10, "color": style["color"], "symbol": style["symbol"]}))
    figure.add_hline(y=float(wide), line={"color": GREY, "dash": "dash", "width": 1.5})
    figure.update_layout(showlegend=True)
    named = [f"{float(x):.0%}" if axis == "sparsity" else plain(x) for x in places]
    figure.update_xaxes(title=axis, tickvals=list(places.values()), ticktext=named, range=[-0.5, len(places) - 0.5], showgrid=False)
    ticks = _ratios(rows["difference_low"].min() + 1, rows["difference_high"].max() + 1)
    scale = {"type": "log", "tickvals": ticks, "ticktext": [f"{100 * (r - 1):+,.0f} %".replace("+0", "0") for r in ticks]} if wide else {"tickformat": ".2~%"}
    figure.update_yaxes(title=f"{metric} differs by ({'below' if lower else 'above'} 0 is better)", **scale)
    counts = {verdict: int((rows["verdict"] == verdict).sum()) for verdict in (BETTER, WORSE, NOISE)}
    alt = (f"Differences of {metric} on {_text(task)} text to {against}: {counts[BETTER]} better, {counts[WORSE]} worse, {counts[NOISE]} inside the noise. "
           f"{listed((f'{r.series} at {r.x} {r.difference:+.1%}' for r in rows.itertuples()), 12)}.")
    how = (f"Each model against {against} (the dashed line), item by item on the same text, with the 95 % interval of the difference. Filled: more than noise; "
           f"hollow: the interval holds 0, so this text cannot tell them apart.{_left_out(table)}")
    return Chart(f"Difference to {against} on {_text(task)} text, pruned for {domain}", figure, rows.drop(columns=axis).reset_index(drop=True), how, alt)


def _ratios(low: float, high: float) -> list[float]:
    """Marks of a logarithmic axis of ratios, 1 among them, that stand apart."""
    found = [1.0]
    for ratio in sorted(RATIOS, key=lambda r: abs(math.log(r))):
        if low / 1.3 <= ratio <= 1.3 * high and all(abs(math.log(ratio / other)) > math.log(high / low) / 12 for other in found):
            found.append(ratio)
    return sorted(found)


def _shown(table: pd.DataFrame, axis: str, domain: str, task: str, metric: str) -> pd.DataFrame:
    """The figures of one chart, with a column named as the axis: numbers where it has a length, names otherwise, in the order of the experiment."""
    rows = table[(table["task"] == task) & (table["metric"] == metric) & table["low"].notna()]
    rows = rows[((rows["domain"] == domain) | (rows["method"] == "dense")) & (rows["method"] != FLOOR)]
    places = pd.to_numeric(rows["x"]) if axis == "sparsity" and rows["x"].nunique() > 2 else rows["x"].replace({ALL: "all, averaged"})
    return rows.assign(**{axis: places})


def _text(task: str) -> str:
    return task.removesuffix("-perplexity")


def _left_out(table: pd.DataFrame) -> str:
    return f" {FLOOR[0].upper()}{FLOOR[1:]} masks, far above all others, are left out." if (table["method"] == FLOOR).any() else ""


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
    for i, (text, of) in enumerate(pairs.groupby("text", sort=False)):
        style = look(i)
        figure.add_trace(go.Scatter(
            x=of["jaccard"].to_numpy(), y=of["excess"].to_numpy(), mode="markers", name=f"on {plain(text)} text",
            marker={"size": 9, "color": style["color"], "symbol": style["symbol"]},
            error_y={**error_bars(of["excess"], of["low"], of["high"]), "color": style["color"], "thickness": 1},
            customdata=columns(of["mask"], of["text"], of["low"], of["high"]),
            hovertemplate="mask of %{customdata[0]} on %{customdata[1]} text: %{y:+.2%} (95 %: %{customdata[2]:+.2%} to %{customdata[3]:+.2%})<br>"
                          "Jaccard %{x:.4f}<extra></extra>"))
    figure.update_xaxes(title="Jaccard similarity of the two masks")
    figure.add_hline(y=0, line={"color": GREY, "dash": "dash", "width": 1.5})
    figure.update_yaxes(title="excess perplexity", tickformat=".0%")
    says = "does" if rho < 0 and p < 0.05 else "is not shown to"
    how = (f"A dot for each mask on another domain's text, in the colour of the text; on the dashed line it costs nothing. Dots that fall from left to "
           f"right mean that like masks serve each other's texts. Spearman's correlation is {number(rho)}, p = {p:.3f} over "
           f"permutations of the domains: similarity {says} predict transfer here.")
    alt = f"{len(pairs)} pairs of masks; Spearman's correlation of similarity and excess perplexity {number(rho)}, p = {p:.3f}."
    return Chart("Does similarity predict transfer?", figure, pairs, how, alt)

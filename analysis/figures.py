"""Figures of one model's masks and importances: layers by modules, parts, the whole-model threshold, overlap, the plane.

Every function returns a Chart, or None where a chart could not be informative.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy.stats import beta

from analysis.chart import (AMOUNTS, AROUND, BLUE, CATEGORIES, CELL_TEXT, GREY, ORANGE, PURPLE, VERMILLION, Chart, cell_format, click_targets, colour_bar,
                            columns, counted, informative, level_line, listed, look, named_counts, new_figure, number, percent, plain)
from analysis.matrices import layers_by_modules
from analysis.overlap import regions
from analysis.sparsity import chance
from dpruner.masks import BINS

PLANE = 128          # cells a side of the general × domain plane
PROFILE_POINTS = 2000
LABEL = (0.2, 0.06)   # half the width and height of a region's label, as shares of the plane


# ---- layers x modules


def layer_heatmap(table: pd.DataFrame, column: str, *, title: str, quantity: str, how: str, middle: float | None = None,
                  share: bool = False, chosen: tuple[int, str] | None = None) -> Chart | None:
    """Layers (across) by modules (down), a value for each matrix; click and hover carry (block, module).

    Args:
        table: columns block, module and `column`, one row for each matrix.
        column: what is shown.
        quantity: its name in words, with the unit.
        middle: a value that means "nothing special": colours then part around it.
        share: the value is a share, shown as a percentage.
        chosen: (block, module) to be framed.

    Returns:
        None where all values are equal or there are fewer than two.
    """
    wide = layers_by_modules(table, column).T
    values = wide.to_numpy(dtype=np.float64)
    if not informative(values):
        return None
    blocks, modules = wide.columns.to_numpy(), list(wide.index)
    style = cell_format(values[np.isfinite(values)], share)
    few = values.size <= 120
    colours = {"colorscale": AMOUNTS} if middle is None else {"colorscale": AROUND, "zmid": middle}
    figure = new_figure(height=170 + 34 * len(modules))
    figure.add_trace(go.Heatmap(
        x=blocks, y=[plain(m) for m in modules], z=values, hoverinfo="skip", xgap=1, ygap=1, textfont=CELL_TEXT,
        texttemplate=f"%{{z:{style}}}" if few else None,
        colorbar=colour_bar(quantity, tickformat=style if share else None), **colours))
    rows, at = np.nonzero(np.isfinite(values))
    figure.add_trace(click_targets(
        blocks[at], [plain(modules[r]) for r in rows], columns(blocks[at], [modules[r] for r in rows], values[rows, at]),
        f"layer %{{x}}<br>%{{y}}<br>{plain(quantity)}: %{{customdata[2]:{'.2%' if share else '.4g'}}}"))
    # ranges of their own: on a narrow page the click targets would widen the axes to layers that are none
    figure.update_xaxes(title="layer", showgrid=False, dtick=max(1, math.ceil(len(blocks) / 16)), range=[blocks[0] - 0.5, blocks[-1] + 0.5])
    figure.update_yaxes(title="module", showgrid=False, range=[len(modules) - 0.5, -0.5])
    if chosen is not None and chosen[1] in modules:
        x, y = chosen[0], modules.index(chosen[1])
        figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line={"color": VERMILLION, "width": 3})
    words = (lambda v: percent(v)) if share else number
    ends = [f"{words(values[m, b])} in layer {blocks[b]}, {modules[m]}"
            for m, b in (np.unravel_index(f(values), values.shape) for f in (np.nanargmin, np.nanargmax))]
    alt = (f"Heatmap of {quantity} over {counted(len(blocks), 'layer')} and {counted(len(modules), 'module')}. Lowest: {ends[0]}; "
           f"highest: {ends[1]}; median {words(float(np.nanmedian(values)))}.")
    return Chart(title, figure, table[["block", "module", column]].reset_index(drop=True), how, alt)


def spread_heatmap(table: pd.DataFrame, column: str = "sd_ratio", chosen: tuple[int, str] | None = None) -> Chart | None:
    """How unequally the parts of every matrix lose, by layer and module.

    Args:
        table: as `analysis.sparsity.rank_spread` or `stats_spread` makes it.
        column: "sd_ratio", "sd", "gini" or "losing_more".

    Returns:
        None where every matrix shows the same.
    """
    part = {"row": "rows", "column": "columns", "head": "heads"}[table["part"].iloc[0]]
    much = float(table["more_than"].median())
    quantity, title, how = {
        "sd_ratio": ("spread, × chance", f"Where some {part} lose far more than others",
                     f"1 is what a random mask would show: every matrix loses the same share, but its {part} need not. The higher, the "
                     f"more the pruning has picked whole {part}."),
        "sd": (f"standard deviation of the kept share of {part}", f"Spread of the kept share over the {part} of every matrix",
               f"0 where all {part} of a matrix keep the same share; a random mask shows "
               f"{percent(float(table['sd_random'].median()))} here."),
        "gini": ("Gini coefficient", f"How unequally the {part} of every matrix are kept",
                 f"0 where all {part} keep as much, toward 1 where a few keep everything; a random mask shows "
                 f"{number(float(table['gini_random'].median()))} here."),
        "losing_more": (f"share of {part} losing more than {percent(much, 0)}",
                        f"Share of the {part} that lose more than {percent(much, 0)}",
                        f"In a random mask {percent(float(table['losing_more_random'].median()))} of the {part} would lose that much."),
    }[column]
    return layer_heatmap(table, column, title=title, quantity=quantity, how=how, share=column in ("sd", "losing_more"), chosen=chosen)


def overlap_heatmap(table: pd.DataFrame, a: str, b: str, column: str = "jaccard", chosen: tuple[int, str] | None = None) -> Chart | None:
    """Overlap of two rankings by layer and module.

    Args:
        table: as `analysis.overlap.overlap_table` makes it.
        a, b: names of the rankings.
        column: "jaccard", "spearman" or "changed".

    Returns:
        None where every matrix shows the same, as two equal rankings do.
    """
    low = float(table["floor"].median())
    quantity, title, how = {
        "jaccard": ("Jaccard similarity", f"How much do {a} and {b} keep in common, by layer and module?",
                    f"Weights both keep as a share of those either keeps: 1 for equal masks, {low:.3f} for two random ones."),
        "spearman": ("rank correlation", f"Do {a} and {b} rank the weights alike?",
                     "Spearman's rank correlation in every matrix: 1 is the same order, 0 no relation, below 0 the opposite."),
        "changed": ("share of decisions that differ", f"Decisions on which {a} and {b} differ",
                    "The share of the weights that one of the two keeps and the other removes."),
    }[column]
    return layer_heatmap(table, column, title=title, quantity=quantity, how=how, share=column == "changed", chosen=chosen)


# ---- parts of one matrix


def profile(parts: pd.DataFrame, part: str, matrix: str) -> Chart | None:
    """Kept share of every row, column or head, sorted, with the band in which 95 % of random masks would lie; click carries the index.

    Args:
        parts: columns index, weights (the same for all) and kept, as `analysis.sparsity.part_table` makes it; more columns go along as CSV.
        part: "row", "column" or "head".
        matrix: its name in words.

    Returns:
        None where all parts keep the same, as they do by construction when every row has its own threshold.
    """
    if not informative(parts["kept"]):
        return None
    ordered = parts.assign(kept_share=parts["kept"] / parts["weights"])
    ordered = ordered.sort_values("kept_share", ascending=False, kind="stable", ignore_index=True)
    size, n = int(parts["weights"].iloc[0]), len(parts)
    low, high = _random_band(n, size, int(parts["kept"].sum()))
    ordered = ordered.assign(random_low=low, random_high=high)
    at = np.unique(np.linspace(0, n - 1, min(n, PROFILE_POINTS)).round().astype(int))
    shown, place = ordered.iloc[at], at + 1
    figure = new_figure(height=380)
    for y, more in ((high, {}), (low, {"fill": "tonexty", "fillcolor": "rgba(128,128,128,0.55)"})):
        figure.add_trace(go.Scatter(x=place, y=y[at], mode="lines", line={"width": 0, "color": GREY}, name="95 % of random masks",
                                    showlegend=bool(more), hoverinfo="skip", **more))
    figure.add_trace(go.Scatter(
        x=place, y=shown["kept_share"].to_numpy(), customdata=columns(shown["index"], shown["kept"], shown["weights"]),
        name=f"{part}s, sorted", mode="lines+markers" if n <= 400 else "lines", line={"color": BLUE}, marker={"color": BLUE, "size": 6},
        hovertemplate=f"{part} %{{customdata[0]:,}}<br>keeps %{{customdata[1]:,}} of %{{customdata[2]:,}} (%{{y:.2%}})<extra></extra>"))
    figure.update_xaxes(title=f"{part}s from most to least kept", dtick=1 if n <= 20 else None)
    figure.update_yaxes(title="share kept", tickformat=".0%", rangemode="tozero")
    share = ordered["kept_share"]
    outside = int(((share > high) | (share < low)).sum())
    least, most = (f"{percent(share.iloc[i])} ({part} {int(ordered['index'].iloc[i])})" for i in (-1, 0))
    alt = (f"The {counted(n, part)} of {matrix} keep from {least} to {most} of their weights; a random mask would keep from "
           f"{percent(low[-1])} to {percent(high[0])}. {outside:,} of them lie outside the random band.")
    how = (f"Every {part} of the matrix, the best kept on the left. The grey band is where the sorted {part}s of a random mask lie; what "
           f"leaves it was chosen or spared as a whole.")
    return Chart(f"Share kept of every {part} of {matrix}", figure, ordered, how, alt)


def _random_band(parts: int, weights: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept share of the 1st, 2nd, .. best kept part of a random mask: 2.5 and 97.5 % quantiles of order statistics.

    The parts are taken as independent of each other.
    """
    expected = chance(parts * weights, kept, weights)
    place = np.arange(parts, 0, -1)
    return tuple(expected.quantile(beta.ppf(level, place, parts + 1 - place)) / weights for level in (0.025, 0.975))


# ---- one threshold for the whole model


def whole_model_chart(table: pd.DataFrame, sparsity: float, chosen: tuple[int, str] | None = None) -> Chart | None:
    """Share kept of every matrix when one threshold holds for the whole model: a line for each module through the layers.

    Args:
        table: as `analysis.sparsity.whole_model_kept` makes it.
        sparsity: of the whole model.

    Returns:
        None where every matrix keeps the same share. Models of more than seven modules get a heatmap.
    """
    title = f"What every matrix keeps when {percent(sparsity, 0)} of the whole model go at once"
    how = (f"One threshold for all weights instead of one for each matrix: matrices above {percent(1 - sparsity, 0)} hold more of the "
           f"highest scores, those below fewer.")
    if not informative(table["kept_share"]):
        return None
    if table["module"].nunique() > len(CATEGORIES):
        return layer_heatmap(table, "kept_share", title=title, quantity="share kept", how=how, middle=1 - sparsity, share=True,
                             chosen=chosen)
    figure = new_figure()
    for i, (module, rows) in enumerate(table.groupby("module", sort=False)):
        rows, style = rows.sort_values("block"), look(i)
        figure.add_trace(go.Scatter(
            x=rows["block"].to_numpy(), y=rows["kept_share"].to_numpy(), name=plain(module), mode="lines+markers",
            customdata=columns(rows["block"], rows["module"], rows["kept"].round(), rows["weights"]),
            line={"color": style["color"], "dash": style["dash"]}, marker={"color": style["color"], "symbol": style["symbol"], "size": 8},
            hovertemplate="layer %{x}, %{customdata[1]}<br>keeps %{y:.2%} of %{customdata[3]:,} weights<extra></extra>"))
    figure.add_trace(level_line(1 - sparsity, table["block"].min(), table["block"].max(), "whole model", GREY))
    figure.update_xaxes(title="layer", dtick=max(1, math.ceil(table["block"].nunique() / 16)))
    figure.update_yaxes(title="share kept", tickformat=".0%")
    low, high = (f"{percent(m.kept_share)} (layer {m.block}, {m.module})"
                 for m in (table.loc[table["kept_share"].idxmin()], table.loc[table["kept_share"].idxmax()]))
    by_module = table.groupby("module", sort=False)[["kept", "weights"]].sum()
    alt = (f"At a whole-model sparsity of {percent(sparsity)}, matrices keep from {low} to {high}. By module: "
           f"{listed(f'{m} {percent(k / w)}' for m, k, w in by_module.itertuples())}.")
    return Chart(title, figure, named_counts(table, "kept"), how, alt)


# ---- overlap


def overlap_curves(curves: Mapping[str, pd.DataFrame], a: str, b: str, sparsity: float | None = None) -> Chart | None:
    """Jaccard similarity of two rankings' masks at every sparsity, with what random masks would share.

    Args:
        curves: {what: table as `analysis.overlap.curve` makes it}, such as one for each module or domain.
        a, b: names of the rankings.
        sparsity: marked with a line.

    Returns:
        None where the rankings are the same everywhere.
    """
    table = pd.concat([c.assign(what=what) for what, c in curves.items()], ignore_index=True) if curves else pd.DataFrame({"jaccard": []})
    if not (table["jaccard"] < 1).any():
        return None
    figure = new_figure()
    for i, (what, c) in enumerate(curves.items()):
        style = look(i)
        figure.add_trace(go.Scatter(
            x=c["sparsity"].to_numpy(), y=c["jaccard"].to_numpy(), customdata=c[["both", "floor"]].to_numpy(), name=plain(what),
            mode="lines", line={"color": style["color"], "dash": style["dash"]},
            hovertemplate="%{fullData.name}<br>sparsity %{x:.1%}<br>Jaccard %{y:.4f}, random %{customdata[1]:.4f}<br>"
                          "%{customdata[0]:,} weights kept by both<extra></extra>"))
    first = next(iter(curves.values()))
    figure.add_trace(go.Scatter(x=first["sparsity"].to_numpy(), y=first["floor"].to_numpy(), name="two random masks", mode="lines",
                                line={"color": GREY, "dash": "dot", "width": 3},
                                hovertemplate="random<br>sparsity %{x:.1%}<br>Jaccard %{y:.4f}<extra></extra>"))
    if sparsity is not None:
        figure.add_vline(x=sparsity, line={"color": GREY, "width": 1})
    figure.update_xaxes(title="sparsity (share removed)", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="Jaccard similarity of the kept sets", range=[0, 1.02])
    at = 0.5 if sparsity is None else sparsity
    rows = {what: c.iloc[(c["sparsity"] - at).abs().argmin()] for what, c in curves.items()}
    alt = (f"Curves of the Jaccard similarity of {a} and {b} over the sparsity. At {percent(at)}: "
           f"{listed(f'{what} {r.jaccard:.3f}' for what, r in rows.items())}; two random masks share "
           f"{next(iter(rows.values())).floor:.3f}.")
    how = (f"How far {a} and {b} keep the same weights when both keep as many. The distance to the dotted line is what they have in common "
           f"beyond chance.")
    return Chart(f"Overlap of {a} and {b} at every sparsity", figure, table, how, alt)


def plane(histogram: np.ndarray, sparsity_a: float, sparsity_b: float, a: str, b: str, matrix: str,
          brush: tuple[float, float, float, float] | None = None) -> Chart | None:
    """All weights in the plane of two rankings, with both thresholds.

    A box drawn over it selects markers whose customdata is (first bin in A, last bin in A, first bin in B, last bin in B).

    Args:
        histogram: (256, 256), as `analysis.overlap.joint_histogram` makes it.
        sparsity_a, sparsity_b: where the thresholds stand.
        a, b: names of the rankings; A runs to the right, B upwards.
        matrix: what the weights are of, in words.
        brush: (from, to in A, from, to in B), shares of the weights: a rectangle to be framed.

    Returns:
        None where there are no weights, or either ranking has put them all into one bin.
    """
    counts = histogram.reshape(PLANE, BINS // PLANE, PLANE, BINS // PLANE).sum(axis=(1, 3))
    if min(np.count_nonzero(counts.any(axis=axis)) for axis in (0, 1)) < 2:
        return None
    middles = (np.arange(PLANE) + 0.5) / PLANE
    with np.errstate(divide="ignore"):
        logs = np.where(counts > 0, np.log10(counts), np.nan).T
    powers = np.arange(0, math.floor(np.nanmax(logs)) + 1)
    figure = new_figure(height=560)
    figure.add_trace(go.Heatmap(
        x=middles, y=middles, z=logs.astype(np.float32), customdata=counts.T.astype(np.int32), colorscale=AMOUNTS, hoverongaps=False,
        colorbar=colour_bar("weights", tickvals=powers, ticktext=[f"{10**int(p):,}" for p in powers]),
        hovertemplate=f"{plain(a)}: above %{{x:.1%}} of the weights<br>{plain(b)}: above %{{y:.1%}}<br>"
                      "%{customdata:,} weights<extra></extra>"))
    figure.add_trace(_brush())
    for x, y in (([sparsity_a] * 2, [0, 1]), ([0, 1], [sparsity_b] * 2)):
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"color": VERMILLION, "width": 2, "dash": "dash"}, hoverinfo="skip",
                                    showlegend=False))
    if brush is not None:
        for colour, width in (("white", 5), (BLUE, 3)):   # to be seen on all colours of the scale
            figure.add_shape(type="rect", x0=brush[0], x1=brush[1], y0=brush[2], y1=brush[3], line={"color": colour, "width": width})
    found = regions(histogram, sparsity_a, sparsity_b)
    (kept_x, gone_x), (kept_y, gone_y) = _label_places(sparsity_a, "x", LABEL[0]), _label_places(sparsity_b, "y", LABEL[1])
    named = {"both": (kept_x, kept_y, found.both), f"only {a}": (kept_x, gone_y, found.only_a), f"only {b}": (gone_x, kept_y, found.only_b),
             "neither": (gone_x, gone_y, found.neither)}
    for name, (x, y, count) in named.items():   # light on its own dark ground: it lies over all colours of the scale
        figure.add_annotation(**x, **y, text=f"{plain(name)}<br>{count:,} ({count / found.weights:.1%})", showarrow=False, borderpad=4,
                              bgcolor="rgba(40,40,40,0.78)", font={"color": "#eeeeee", "size": 12})
    square = {"tickformat": ".0%", "range": [0, 1], "showgrid": False, "constrain": "domain"}
    figure.update_xaxes(title=f"rank by {plain(a)} (share below)", constraintoward="right", **square)   # beside the colour bar
    figure.update_yaxes(title=f"rank by {plain(b)} (share below)", scaleanchor="x", **square)
    bins = np.nonzero(histogram)
    table = pd.DataFrame({**{f"rank bin of {side}": at for side, at in zip((a, b), bins, strict=True)}, "weights": histogram[bins]})
    shares = listed(f"{name} {count:,} ({percent(count / found.weights)})" for name, (_, _, count) in named.items())
    alt = (f"Plane of {found.weights:,} weights of {matrix} by their rank in {a} and in {b}, thresholds at {percent(sparsity_a)} and "
           f"{percent(sparsity_b)}. Kept by: {shares}.")
    how = (f"Every weight by its rank in {a} (to the right) and in {b} (upwards); the dashed lines are the thresholds. Were the two "
           f"unrelated, the plane would have one colour; along the diagonal they agree.")
    return Chart(f"{a[:1].upper()}{a[1:]} against {b}, {matrix}", figure, table, how, alt)


def _label_places(sparsity: float, axis: str, half: float) -> tuple[dict, dict]:
    """Where a label of a side that is kept, and of one that goes, stands along an axis: in the middle, or at the edge of the plane where it is narrow."""
    kept, gone = (1 + sparsity) / 2, sparsity / 2
    start, end = ("left", "right") if axis == "x" else ("bottom", "top")
    middle = "center" if axis == "x" else "middle"
    return tuple({axis: place, f"{axis}anchor": middle} if room >= half else {axis: edge, f"{axis}anchor": side}
                 for place, room, edge, side in ((kept, 1 - kept, 1, end), (gone, gone, 0, start)))


def _brush(cells: int = 32) -> go.Scatter:
    """Invisible markers under a box selection; they take no hover, which is the heatmap's."""
    first = np.arange(cells) * BINS // cells
    x, y = (g.reshape(-1) for g in np.meshgrid(first, first, indexing="ij"))
    width = BINS // cells
    unseen = {"marker": {"opacity": 0}}
    return go.Scatter(x=(x + width / 2) / BINS, y=(y + width / 2) / BINS, mode="markers", hoverinfo="skip", showlegend=False,
                      customdata=np.stack([x, x + width - 1, y, y + width - 1], axis=1).astype(np.int16),
                      marker={"size": 8, "opacity": 0, "color": GREY}, selected=unseen, unselected=unseen)


def region_bars(kept: pd.DataFrame, sparsity: float, a: str, b: str, third: str, matrix: str) -> Chart | None:
    """What a third score keeps of the weights that both, one or none of two rankings keep.

    Args:
        kept: as `analysis.overlap.kept_of_regions` makes it.
        sparsity: of the third score's mask.
        a, b, third: names of the rankings.
        matrix: what the weights are of, in words.

    Returns:
        None where every region is kept alike.
    """
    if not informative(kept["kept_share"]):
        return None
    words = {"both": "both", "only A": f"only {a}", "only B": f"only {b}", "neither": "neither"}
    named = [words[r] for r in kept["region"]]
    figure = new_figure(height=300)
    colours = {"both": BLUE, "only A": ORANGE, "only B": PURPLE, "neither": GREY}
    figure.add_trace(go.Bar(
        x=kept["kept_share"].to_numpy(), y=[plain(n) for n in named], orientation="h",
        marker={"color": [colours[r] for r in kept["region"]]},
        customdata=columns(kept["kept"], kept["weights"]), showlegend=False,
        hovertemplate="kept by %{y}<br>%{customdata[0]:,} of %{customdata[1]:,} weights (%{x:.2%})<extra></extra>"))
    figure.add_trace(go.Scatter(x=[1.01] * len(named), y=[plain(n) for n in named], mode="text", textposition="middle right",
                                text=[f"{percent(s)}<br>of {n:,}" for s, n in zip(kept["kept_share"], kept["weights"], strict=True)],
                                hoverinfo="skip", showlegend=False))
    figure.add_vline(x=1 - sparsity, line={"color": VERMILLION, "dash": "dash"})
    figure.update_xaxes(title=f"share that {plain(third)} keeps", tickformat=".0%", range=[0, 1.3], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_yaxes(title="kept by", autorange="reversed", showgrid=False)
    shares = listed(f"{percent(s)} of {n:,} ({name})" for name, s, n in zip(named, kept["kept_share"], kept["weights"], strict=True))
    how = (f"The weights of the matrix by who keeps them, and how many of each {third} keeps. The dashed line is what a mask would keep "
           f"of each that cared for neither side: {percent(1 - sparsity)}.")
    return Chart(f"What {third} keeps of each region, {matrix}", figure, kept.assign(region=named), how,
                 f"Of the weights of {matrix}, {third} keeps {shares}.")


def lambda_curve(changed: pd.DataFrame, lam: float, counted_share: float, matrix: str) -> Chart | None:
    """Decisions that the general side changes, for any λ, with the counted one of the run.

    Args:
        changed: as `analysis.weighing.changed_by_lambda` makes it; its λ = 0 is left out of the picture, where nothing changes.
        lam: the λ of the run.
        counted_share: share of the decisions it changed.
        matrix: its name in words.

    Returns:
        None where no λ changes anything.
    """
    shown = changed[changed["lam"] > 0]
    if not informative(shown["share"]):
        return None
    figure = new_figure(height=360)
    figure.add_trace(go.Scatter(x=shown["lam"].to_numpy(), y=shown["share"].to_numpy(), customdata=shown["changed"].round().to_numpy(),
                                mode="lines+markers", line={"color": BLUE}, marker={"color": BLUE, "size": 6}, name="any λ",
                                hovertemplate="λ = %{x:g}<br>%{y:.2%} of the decisions<br>about %{customdata:,} weights<extra></extra>"))
    figure.add_trace(go.Scatter(x=[lam], y=[counted_share], name=f"this run, λ = {lam:g} (counted)", mode="markers",
                                marker={"color": VERMILLION, "symbol": "diamond", "size": 13},
                                hovertemplate="λ = %{x:g}<br>%{y:.2%} of the decisions, counted<extra></extra>"))
    figure.update_xaxes(title="λ, the weight of the general side", type="log", tickvals=[0.01, 0.1, 1, 10, 100],
                        ticktext=["0.01", "0.1", "1", "10", "100"])
    figure.update_yaxes(title="decisions changed", tickformat=".0%", rangemode="tozero")
    most = shown.iloc[-1]
    alt = (f"Share of the decisions in {matrix} that differ from those at λ = 0, from {percent(shown['share'].iloc[0])} at λ = "
           f"{shown['lam'].iloc[0]:g} to {percent(most.share)} at λ = {most.lam:g}; the run's λ = {lam:g} changed "
           f"{percent(counted_share)}.")
    how = ("How many decisions would differ from those of the domain importance alone. On the left the domain decides, on the right the "
           "general side. The line follows from the stored ranks and scores, each weight known to 1/256; the diamond is counted.")
    return Chart(f"How many decisions any λ would change, {matrix}", figure, named_counts(changed, "changed"), how, alt)

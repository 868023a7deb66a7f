"""Figures that lay masks, qualities, sizes and texts side by side.

Every function returns a Chart, or None where a chart could not be informative.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import (AMOUNTS, BLUE, CELL_TEXT, FAINT, GREEN, GREY, ORANGE, SKY, VERMILLION, Chart, click_targets, colour_bar, columns, counted,
                            informative, level_line, listed, look, new_figure, number, percent, plain)
from analysis.similarity import order

MEASURE_NAMES = {"jaccard": "Jaccard similarity", "cosine": "cosine similarity", "overlap": "overlap coefficient",
                 "corrected": "chance-corrected Jaccard"}
LINE_CHARACTERS = 96    # of a token strip
TOKEN_CHARACTERS = 24   # a longer token is cut; its hover has it whole


# ---- similarity of masks


def similarity_heatmap(matrix: np.ndarray, labels: Sequence[str], floor: float | np.ndarray, ceiling: float | np.ndarray | None = None,
                       measure: str = "jaccard", where: str = "the whole model") -> Chart | None:
    """Similarity of every two masks, like ones side by side, with chance and the same domain on the scale; click carries the pair.

    Args:
        matrix: (masks, masks), as `analysis.similarity.similarity` makes it.
        labels: of the masks.
        floor: what random masks of these counts share, one figure or one for each pair.
        ceiling: what masks from two halves of one domain share, one figure or one for each pair; None or NaN where it is not known.
        measure: what was measured.
        where: which part of the model, in words.

    Returns:
        None for fewer than two masks, or where all are identical.
    """
    a, b = np.triu_indices(len(labels), 1)
    values = matrix[a, b]
    if values.size == 0 or np.all(values == 1):
        return None
    floors = np.broadcast_to(np.asarray(floor, dtype=np.float64), matrix.shape)
    base = float(floors[a, b].mean())
    ceilings = np.broadcast_to(np.asarray(np.nan if ceiling is None else ceiling, dtype=np.float64), matrix.shape)
    ceiling = _mean(ceilings[a, b])
    at = order(matrix)
    names, shown = [labels[i] for i in at], matrix[np.ix_(at, at)]
    low = min(base, float(values.min()))
    quantity = MEASURE_NAMES[measure]
    figure = new_figure(height=170 + 38 * max(len(names), 5), xaxis2={"domain": [0.86, 0.9], "visible": False, "range": [0, 1]},
                        yaxis2={"anchor": "x2", "side": "left", "range": [low - 0.03, 1.03], "showgrid": False, "title": quantity})
    ticks = {"tickvals": list(range(len(names))), "ticktext": [plain(n) for n in names], "showgrid": False, "constrain": "domain"}
    digits = "%{z:.3f}" if len(names) <= 8 else "%{z:.2f}" if len(names) <= 16 else None
    figure.add_trace(go.Heatmap(x=np.arange(len(names)), y=np.arange(len(names)), z=shown, colorscale=AMOUNTS, zmin=low, zmax=1,
                                showscale=False, hoverinfo="skip", xgap=1, ygap=1, texttemplate=digits, textfont=CELL_TEXT))
    y, x = (i.reshape(-1) for i in np.indices(shown.shape))
    figure.add_trace(click_targets(
        x, y, columns([names[i] for i in y], [names[i] for i in x], shown.reshape(-1), floors[np.ix_(at, at)].reshape(-1),
                      ceilings[np.ix_(at, at)].reshape(-1)),
        f"%{{customdata[0]}} and %{{customdata[1]}}<br>{quantity} %{{customdata[2]:.4f}}<br>random masks: %{{customdata[3]:.4f}}"
        + ("" if ceiling is None else "<br>two halves of one domain: %{customdata[4]:.4f}"), size=24))
    _scale(figure, low, base, ceiling, values, [f"{plain(labels[i])} and {plain(labels[j])}" for i, j in zip(a, b, strict=True)])
    figure.update_layout(xaxis={**ticks, "domain": [0, 0.72]}, yaxis={**ticks, "autorange": "reversed"}, margin={"r": 120})
    table = pd.DataFrame({"a": [labels[i] for i in a], "b": [labels[j] for j in b], measure: values, "floor": floors[a, b],
                          "ceiling": ceilings[a, b]})
    least, most = (f"{labels[a[k]]} and {labels[b[k]]}, {values[k]:.3f}" for k in (values.argmin(), values.argmax()))
    top = f"; two halves of one domain share {ceiling:.3f}" if ceiling is not None else ""
    alt = (f"{quantity} of {counted(len(labels), 'mask')} over {where}. Most alike: {most}; least: {least}. Two random masks share "
           f"{base:.3f}{top}.")
    how = ("The scale on the right holds every pair as a circle. Between the random floor"
           + (" and what two halves of one domain share" if ceiling is not None else " and 1") + " lies what can be said about domains.")
    return Chart(f"How alike are the masks? {quantity[0].upper()}{quantity[1:]}, {where}", figure, table, how, alt)


def _mean(values) -> float | None:
    """The mean of what is known; None where nothing is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def _scale(figure: go.Figure, low: float, floor: float, ceiling: float | None, values: np.ndarray, names: list[str]) -> None:
    """The colour scale as a strip of its own, with floor, ceiling and every pair on it."""
    steps = np.linspace(low, 1, 128)
    figure.add_trace(go.Heatmap(x=[0.5], y=steps, z=steps[:, None], colorscale=AMOUNTS, zmin=low, zmax=1, showscale=False, hoverinfo="skip",
                                xaxis="x2", yaxis="y2"))
    across = np.full(len(values), 0.5)
    across[np.argsort(values, kind="stable")] += 0.3 * np.resize([-1, 0, 1], len(values))   # neighbours beside each other
    figure.add_trace(go.Scatter(x=across, y=values, customdata=columns(names), mode="markers", showlegend=False, xaxis="x2",
                                yaxis="y2", hovertemplate="%{customdata[0]}: %{y:.4f}<extra></extra>",
                                marker={"symbol": "circle-open", "size": 8, "color": VERMILLION, "line": {"width": 2}}))
    for value, words in ((floor, "random masks"), (ceiling, "same domain")):
        if value is not None:
            figure.add_shape(type="line", xref="x2 domain", yref="y2", x0=-0.3, x1=1.4, y0=value, y1=value,
                             line={"color": GREY, "width": 2, "dash": "dot"})
            figure.add_annotation(xref="x2 domain", yref="y2", x=1.5, y=value, text=f"{words}<br>{value:.3f}", showarrow=False,
                                  xanchor="left", align="left", font={"size": 11})


def similarity_grid(matrices: Mapping[str | int, np.ndarray], labels: Sequence[str], what: str, measure: str = "jaccard",
                    across: int = 4) -> Chart | None:
    """Small multiples: the similarity matrix of every module or block, on one scale and in one order; click carries (group, a, b).

    Args:
        matrices: {group: (masks, masks)}, as `analysis.similarity.similarity` makes it.
        what: what the groups are: "module" or "layer".

    Returns:
        None for fewer than two masks or groups, or where all pairs show the same everywhere.
    """
    n = len(labels)
    apart = ~np.eye(n, dtype=bool)
    values = np.array([m[apart] for m in matrices.values()])
    if n < 2 or len(matrices) < 2 or not informative(values):
        return None
    at = order(np.mean(list(matrices.values()), axis=0))
    names, across = [plain(labels[i]) for i in at], min(across, len(matrices))
    down = -(-len(matrices) // across)
    size = 60 + 32 * n
    gap_x, gap_y = 0.12 / across, 34 / (size * down)   # the second holds a title
    figure = new_figure(height=60 + size * down, coloraxis={
        "colorscale": AMOUNTS, "cmin": float(values.min()), "cmax": float(values.max()), "colorbar": colour_bar(MEASURE_NAMES[measure])})
    traces, axes, titles = [], {}, []
    y, x = (i.reshape(-1) for i in np.nonzero(apart))
    for k, (group, matrix) in enumerate(matrices.items()):
        row, column = divmod(k, across)
        left, top = column / across + gap_x / 2, 1 - row / down - gap_y
        ends, suffix = (left + 1 / across - gap_x, top - 1 / down + 1.6 * gap_y), "" if k == 0 else str(k + 1)
        shown = np.where(apart, matrix[np.ix_(at, at)], np.nan)   # a mask and itself say nothing, and would fill the scale
        traces.append(go.Heatmap(z=shown, coloraxis="coloraxis", hoverinfo="skip", xaxis=f"x{suffix}", yaxis=f"y{suffix}", xgap=1, ygap=1))
        title = f"{what} {group}" if isinstance(group, int) else str(group)
        traces.append(click_targets(
            x, y, columns([group] * len(x), [labels[at[i]] for i in y], [labels[at[i]] for i in x], shown[y, x]),
            f"{plain(title)}<br>%{{customdata[1]}} and %{{customdata[2]}}<br>%{{customdata[3]:.4f}}", size=16,
            xaxis=f"x{suffix}", yaxis=f"y{suffix}"))
        ticks = {"tickvals": list(range(n)), "ticktext": names, "showgrid": False}
        axes[f"xaxis{suffix}"] = {**ticks, "domain": [left, ends[0]], "anchor": f"y{suffix}", "showticklabels": row == down - 1}
        axes[f"yaxis{suffix}"] = {**ticks, "domain": [ends[1], top], "anchor": f"x{suffix}", "showticklabels": column == 0,
                                  "autorange": "reversed"}
        titles.append({"text": plain(title), "x": (left + ends[0]) / 2, "y": top, "xref": "paper", "yref": "paper", "xanchor": "center",
                       "yanchor": "bottom", "showarrow": False, "font": {"size": 12}})
    figure.add_traces(traces).update_layout(**axes, annotations=titles)
    table = pd.DataFrame([{what: g, "a": labels[i], "b": labels[j], measure: m[i, j]} for g, m in matrices.items()
                          for i, j in zip(*np.triu_indices(n, 1), strict=True)])
    mean = {g: float(m[apart].mean()) for g, m in matrices.items()}
    least, most = min(mean, key=mean.get), max(mean, key=mean.get)
    ends = [f"{what} {g} ({mean[g]:.3f})" for g in (most, least)]
    alt = (f"{MEASURE_NAMES[measure]} of {counted(n, 'mask')} in each of {len(matrices)} {what}s. On average most alike in {ends[0]}, "
           f"least in {ends[1]}.")
    how = f"One square for each {what}, all on one scale that runs from the lowest to the highest pair: brighter is more alike."
    return Chart(f"How alike are the masks in every {what}?", figure, table, how, alt)


def similarity_sides(sides: Mapping[str, np.ndarray], labels: Sequence[str], floor: float, ceiling: float | None = None,
                     measure: str = "jaccard") -> Chart | None:
    """Two or three similarity matrices of masks of the same names beside each other, in one order, on one scale that names chance.

    Args:
        sides: {name: (masks, masks)}, as `analysis.similarity.similarity` makes them.
        labels: of the masks, the same on every side.
        floor, ceiling: what random masks, and two halves of one domain, share; the second may be missing.

    Returns:
        None for fewer than two masks, or where all are identical.
    """
    a, b = np.triu_indices(len(labels), 1)
    values = {name: matrix[a, b] for name, matrix in sides.items()}
    if len(a) == 0 or all(np.all(v == 1) for v in values.values()):
        return None
    at = order(np.mean(list(sides.values()), axis=0))
    names, n = [plain(labels[i]) for i in at], len(labels)
    low = min(floor, *(float(v.min()) for v in values.values()))
    marks = {1.0: "the same", floor: f"random masks {floor:.3f}", **({ceiling: f"same domain {ceiling:.3f}"} if ceiling is not None else {})}
    figure = new_figure(height=150 + 46 * max(n, 4), coloraxis={"colorscale": AMOUNTS, "cmin": low, "cmax": 1, "colorbar": {
        **colour_bar(""), "tickvals": list(marks), "ticktext": list(marks.values())}})
    y, x = (i.reshape(-1) for i in np.indices((n, n)))
    for k, (name, matrix) in enumerate(sides.items()):
        suffix, shown = "" if k == 0 else str(k + 1), matrix[np.ix_(at, at)]
        figure.add_trace(go.Heatmap(z=shown, coloraxis="coloraxis", hoverinfo="skip", xgap=1, ygap=1, xaxis=f"x{suffix}", yaxis=f"y{suffix}",
                                    texttemplate="%{z:.3f}" if n <= 6 else "%{z:.2f}" if n <= 9 else None, textfont=CELL_TEXT))
        figure.add_trace(click_targets(x, y, columns([names[i] for i in y], [names[i] for i in x], shown.reshape(-1)),
                                       f"{plain(name)}<br>%{{customdata[0]}} and %{{customdata[1]}}<br>{MEASURE_NAMES[measure]} %{{customdata[2]:.4f}}",
                                       size=20, xaxis=f"x{suffix}", yaxis=f"y{suffix}"))
        ends, ticks = [(k + 0.03) / len(sides), (k + 0.97) / len(sides)], {"tickvals": list(range(n)), "ticktext": names, "showgrid": False}
        figure.update_layout({f"xaxis{suffix}": {**ticks, "domain": ends, "anchor": f"y{suffix}"},
                              f"yaxis{suffix}": {**ticks, "anchor": f"x{suffix}", "autorange": "reversed", "showticklabels": k == 0}})
        figure.add_annotation(text=f"<b>{plain(name)}</b>", x=sum(ends) / 2, y=1.02, xref="paper", yref="paper", xanchor="center", yanchor="bottom",
                              showarrow=False)
    table = pd.concat([pd.DataFrame({"side": name, "a": [labels[i] for i in a], "b": [labels[j] for j in b], measure: v})
                       for name, v in values.items()], ignore_index=True)
    table = table.assign(floor=floor, ceiling=np.nan if ceiling is None else ceiling)
    alt = (f"{MEASURE_NAMES[measure]} of {counted(n, 'mask')}. " + " ".join(
        f"{name}: from {v.min():.3f} ({labels[a[v.argmin()]]} and {labels[b[v.argmin()]]}) to {v.max():.3f} ({labels[a[v.argmax()]]} and "
        f"{labels[b[v.argmax()]]})." for name, v in values.items()) + f" Two random masks share {floor:.3f}.")
    how = ("Both squares have one scale and one order, so that colours compare across them; the scale marks what random masks share"
           + (" and what masks from two halves of one domain's text share." if ceiling is not None else "."))
    return Chart(f"{MEASURE_NAMES[measure][0].upper()}{MEASURE_NAMES[measure][1:]}: {', '.join(n.lower() for n in sides)}", figure, table, how, alt)


def similarity_profile(matrices: Mapping[str | int, np.ndarray], labels: Sequence[str], what: str, floors: Mapping[str | int, float],
                       ceilings: Mapping[str | int, float] | None = None, measure: str = "jaccard") -> Chart | None:
    """Similarity through the layers or over the modules: the mean pair with the lowest and the highest, between floor and ceiling.

    Args:
        matrices: {group: (masks, masks)}, as `analysis.similarity.similarity` makes it.
        labels: of the masks.
        what: what the groups are: "module" or "layer".
        floors, ceilings: {group: what random masks, and two halves of one domain, share}; the second may be missing.

    Returns:
        None for fewer than two masks or groups, or where all masks are identical.
    """
    a, b = np.triu_indices(len(labels), 1)
    if len(a) == 0 or len(matrices) < 2:
        return None
    values = np.array([m[a, b] for m in matrices.values()])
    if np.all(values == 1):
        return None
    groups = list(matrices)
    numbers = all(isinstance(g, int) for g in groups)
    x = groups if numbers else [plain(g) for g in groups]
    table = pd.DataFrame({what: groups, "mean": values.mean(axis=1), "lowest": values.min(axis=1), "highest": values.max(axis=1),
                          "floor": [floors[g] for g in groups], "ceiling": [ceilings[g] if ceilings else np.nan for g in groups]})
    figure = new_figure(height=400)
    mean = table["mean"].to_numpy()
    bars = {"error_y": {"array": table["highest"] - mean, "arrayminus": mean - table["lowest"], "symmetric": False, "color": BLUE,
                        "thickness": 2}} if len(a) > 1 else {}
    figure.add_trace(go.Scatter(
        x=x, y=mean, name="mean of all pairs, lowest to highest" if bars else plain(f"{labels[0]} and {labels[1]}"), mode="lines+markers",
        line={"color": BLUE}, marker={"size": 9, "color": BLUE}, customdata=table[["lowest", "highest", "floor", "ceiling"]].to_numpy(), **bars,
        hovertemplate=f"{what} %{{x}}<br>{MEASURE_NAMES[measure]} %{{y:.4f}} (%{{customdata[0]:.4f}} to %{{customdata[1]:.4f}})<br>"
                      f"random masks %{{customdata[2]:.4f}}<br>same domain %{{customdata[3]:.4f}}<extra></extra>"))
    for column, name, colour, dash in (("ceiling", "two halves of one domain", GREEN, "dash"), ("floor", "two random masks", GREY, "dot")):
        if table[column].notna().any():
            figure.add_trace(go.Scatter(x=x, y=table[column].to_numpy(), name=name, mode="lines", line={"color": colour, "dash": dash, "width": 2},
                                        hovertemplate=f"{name}<br>{what} %{{x}}: %{{y:.4f}}<extra></extra>"))
    figure.update_xaxes(title=what, **({"dtick": max(1, math.ceil(len(groups) / 16))} if numbers else {"type": "category"}))
    figure.update_yaxes(title=MEASURE_NAMES[measure])
    low, high = table.loc[table["mean"].idxmin()], table.loc[table["mean"].idxmax()]
    alt = (f"{MEASURE_NAMES[measure]} of {counted(len(labels), 'mask')} by {what}, mean of all pairs: from {low['mean']:.3f} ({what} {low[what]}) to "
           f"{high['mean']:.3f} ({what} {high[what]}). Two random masks share {table['floor'].mean():.3f}"
           + (f", two halves of one domain {table['ceiling'].mean():.3f}." if ceilings else "."))
    how = ("Where the line runs along the upper one, the masks differ no more than two samples of the same domain's text would make them; along "
           "the lower one, they share no more than chance." if ceilings else "The lower line is chance: what two random masks would share.")
    return Chart(f"Where in the model do the masks differ? By {what}", figure, table, how, alt)


def pair_dots(pairs: pd.DataFrame, ceiling: float | None = None, measure: str = "jaccard", floor: float | None = None) -> Chart | None:
    """Every two masks as a dot with its interval, between the random floor and the same-domain ceiling; click carries the pair.

    Args:
        pairs: rows of one group, as `analysis.similarity.pairs` makes them: a, b, jaccard, low, high, floor, corrected, changed. A column
            ceiling, where each pair has its own.
        ceiling: what masks from two halves of one domain share, in the same measure, where one figure holds for all pairs.
        measure: a column of `pairs`; only "jaccard" has an interval.
        floor: what random masks share, in the same measure, where it is neither "jaccard" nor "corrected", whose floors are known.

    Returns:
        None where there is no pair, or all masks are identical.
    """
    if len(pairs) == 0 or (pairs[measure] == 1).all():
        return None
    table = pairs.assign(pair=[f"{a} · {b}" for a, b in zip(pairs["a"], pairs["b"], strict=True)])
    if ceiling is not None or "ceiling" not in table:
        table["ceiling"] = np.nan if ceiling is None else ceiling
    table = table.sort_values(measure, kind="stable", ignore_index=True)
    values, names = table[measure].to_numpy(), [plain(p) for p in table["pair"]]
    floors = {"jaccard": table["floor"].to_numpy(), "corrected": np.zeros(len(table))}.get(
        measure, np.full(len(table), np.nan if floor is None else floor))
    limits = [("random masks", floors, "left"), ("same domain", table["ceiling"].to_numpy(dtype=np.float64), "right")]
    bars = measure == "jaccard" and bool(table["low"].notna().any())
    figure = new_figure(height=150 + 26 * len(table))
    for words, limit, side in limits:
        _limit(figure, words, limit, names, side)
    figure.add_trace(go.Scatter(
        x=values, y=names, mode="markers", marker={"size": 10, "color": BLUE}, showlegend=False,
        customdata=columns(table["a"], table["b"], table["low"], table["high"], table["floor"], table["changed"]),
        hovertemplate=f"%{{y}}<br>{MEASURE_NAMES[measure]} %{{x:.4f}}<br>Jaccard over matrices, 95 %: %{{customdata[2]:.4f}} to "
                      "%{customdata[3]:.4f}<br>random masks, Jaccard: %{customdata[4]:.4f}<br>%{customdata[5]:,} decisions differ"
                      "<extra></extra>",
        error_x={**_error_bars(values, table["low"], table["high"]), "color": BLUE} if bars else None))
    marks = np.concatenate([values, *(limit for _, limit, _ in limits)])
    figure.update_xaxes(title=MEASURE_NAMES[measure], range=[np.nanmin(marks) - 0.03, max(1.0, np.nanmax(marks)) + 0.02])
    figure.update_yaxes(title="pair of masks", categoryorder="array", categoryarray=names)
    floor, ceiling = (_mean(limit) for _, limit, _ in limits)
    ends = [f"{values[i]:.3f} ({table['pair'].iloc[i]})" for i in (0, -1)]
    alt = (f"{counted(len(table), 'pair')} of masks by {MEASURE_NAMES[measure]}: from {ends[0]} to {ends[1]}."
           + (f" Two random masks share {floor:.3f}." if floor is not None else "")
           + (f" Two halves of one domain share {ceiling:.3f}." if ceiling is not None else ""))
    how = "At 1 two masks are equal" + (", at the line “random masks” they share no more than chance." if floor is not None else ".")
    how += " At the mark “same domain” they differ no more than two halves of one domain's text." if ceiling is not None else ""
    how += " Bars are 95 % intervals over the model's matrices." if bars else ""
    return Chart("Every pair of masks between chance and sameness", figure, table, how, alt)


def _limit(figure: go.Figure, words: str, limit: np.ndarray, names: list[str], side: str) -> None:
    """A floor or ceiling: one line where it is the same for all pairs, else a mark on the row of each."""
    known = np.isfinite(limit)
    if not known.any():
        return
    if not informative(limit, 1e-3):
        value = float(limit[known].mean())
        figure.add_vline(x=value, line={"color": GREY, "width": 2, "dash": "dot"})
        figure.add_annotation(x=value, yref="paper", y=1, text=f"{words} {value:.3f}", showarrow=False, xanchor=side, yanchor="bottom")
        return
    figure.add_trace(go.Scatter(x=limit[known], y=[n for n, k in zip(names, known, strict=True) if k], mode="markers", name=words,
                                marker={"symbol": "line-ns-open", "size": 16, "color": GREY, "line": {"width": 3}},
                                hovertemplate=f"%{{y}}<br>{words}: %{{x:.4f}}<extra></extra>"))
    figure.update_layout(legend={"x": 1, "xanchor": "right"}, showlegend=True)   # away from what is written over the other line


def domain_map(points: pd.DataFrame, shown: float) -> Chart | None:
    """Masks as points whose distances come close to 1 − similarity; click carries the label.

    Args:
        points: columns label, x, y, as `analysis.similarity.domain_points` makes them, and group where colours should tell groups (such as
            methods) apart.
        shown: share of the squared distances that the plane shows.

    Returns:
        None for fewer than three masks, or where all are identical.
    """
    if len(points) < 3 or not (informative(points["x"]) or informative(points["y"])):
        return None
    middle = {c: (points[c].min() + points[c].max()) / 2 for c in ("x", "y")}
    reach = 0.65 * max(np.ptp(points["x"]), np.ptp(points["y"]))
    figure, points = new_figure(height=480), points.reset_index(drop=True)
    texts = _uncrowded(points, reach)
    for i, (group, rows) in enumerate(points.groupby(points["group"] if "group" in points else pd.Series("", points.index), sort=False)):
        style = look(i)
        figure.add_trace(go.Scatter(
            x=rows["x"].to_numpy(), y=rows["y"].to_numpy(), text=[texts[k] for k in rows.index], customdata=columns(rows["label"]),
            name=plain(group), mode="markers+text", textposition="top center", showlegend="group" in points, cliponaxis=False,
            marker={"size": 13, "color": style["color"], "symbol": style["symbol"]},
            hovertemplate="%{customdata[0]}<br>%{x:.4f}, %{y:.4f}<extra></extra>"))
    ranges = {c: [middle[c] - reach, middle[c] + reach] for c in middle}
    figure.update_xaxes(title="first direction of 1 − similarity", range=ranges["x"], constrain="domain")
    figure.update_yaxes(title="second direction", range=ranges["y"], constrain="domain", scaleanchor="x")
    gaps = np.hypot(*(np.subtract.outer(points[c].to_numpy(), points[c].to_numpy()) for c in ("x", "y")))
    a, b = np.triu_indices(len(points), 1)
    near, far = (f"{points['label'][a[k]]} and {points['label'][b[k]]}" for k in (gaps[a, b].argmin(), gaps[a, b].argmax()))
    alt = (f"Map of {counted(len(points), 'mask')}. Nearest: {near}; farthest apart: {far}. The plane shows {percent(shown, 0)} of the "
           f"squared distances.")
    how = (f"Near means alike: distances come as close to 1 − similarity as a plane allows ({percent(shown, 0)} of the squared distances). "
           f"Only distances count; the directions have no meaning of their own.")
    return Chart("Map of the masks", figure, points, how, alt)


def _uncrowded(points: pd.DataFrame, reach: float) -> list[str]:
    """A text for every point; of points too near for a text each, only the first has one, and it says how many they are."""
    texts, owner = [""] * len(points), {}
    for k, (x, y) in enumerate(zip(points["x"], points["y"], strict=True)):   # texts are wide and flat
        first = next((j for j in owner if abs(points["x"][j] - x) < 0.3 * reach and abs(points["y"][j] - y) < 0.09 * reach), k)
        owner.setdefault(first, []).append(k)
    for first, members in owner.items():
        texts[first] = plain(points["label"][first]) + (f" and {len(members) - 1} more" if len(members) > 1 else "")
    return texts


# ---- quality and size


def quality(table: pd.DataFrame, x: str = "method", series: str = "text", metric: str = "perplexity",
            lower_is_better: bool = True) -> Chart | None:
    """Quality with 95 % intervals, against sparsity (lines) or method (dots); the dense model as a line across.

    Args:
        table: rows as of metrics.parquet (method, domain, text, metric, value, low, high, n); those of the method "dense" make the lines. A
            column sparsity where `x` is that.
        x: column to the right, numbers or names.
        series: column whose values get a colour each, such as "text" or "method".

    Returns:
        None where nothing pruned was measured.
    """
    table = table[table["metric"] == metric] if "metric" in table else table
    dense, pruned = table[table["method"] == "dense"], table[table["method"] != "dense"]
    if len(pruned) == 0 or not np.isfinite(pruned["value"]).any():
        return None
    names, along = list(dict.fromkeys(pruned[series])), pd.api.types.is_numeric_dtype(table[x])
    places = None if along else {v: i for i, v in enumerate(dict.fromkeys(pruned[x]))}
    figure = new_figure(height=440)
    for i, name in enumerate(names):
        rows, style = pruned[pruned[series] == name], look(i)
        rows = rows.sort_values(x, kind="stable") if along else rows
        # beside each other, so that intervals at one place do not hide each other
        beside = (i - (len(names) - 1) / 2) * min(0.6 / len(names), 0.16)
        at = rows[x].to_numpy() if along else np.array([places[v] for v in rows[x]]) + beside
        value = rows["value"].to_numpy(dtype=np.float64)
        figure.add_trace(go.Scatter(
            x=at, y=value, name=plain(name), mode="lines+markers" if along else "markers",
            line={"color": style["color"], "dash": style["dash"]}, marker={"size": 9, "color": style["color"], "symbol": style["symbol"]},
            customdata=columns(rows["method"], rows["domain"], rows["low"], rows["high"], rows["n"], rows[x]),
            error_y={**_error_bars(value, rows["low"], rows["high"]), "color": style["color"]},
            hovertemplate=f"%{{customdata[0]}} for %{{customdata[1]}}<br>{plain(metric)} %{{y:.4g}}, 95 %: %{{customdata[2]:.4g}} to "
                          "%{customdata[3]:.4g} (n = %{customdata[4]:,})<extra></extra>"))
    ends = (table[x].min(), table[x].max()) if along else (-0.5, len(places) - 0.5)
    told = _dense_lines(figure, dense, names if series != "method" else None, series, ends)
    finite = table.loc[np.isfinite(table["value"]), "value"]
    steep = finite.min() > 0 and finite.max() > 10 * finite.min()
    figure.update_yaxes(title=f"{metric} ({'lower' if lower_is_better else 'higher'} is better)", **(_log_axis(finite) if steep else {}))
    figure.update_xaxes(title="sparsity (share removed)" if x == "sparsity" else x, tickformat=".0%" if x == "sparsity" else None,
                        **({} if along else {"tickvals": list(places.values()), "ticktext": [plain(v) for v in places], "showgrid": False}))
    best = pruned.loc[(pruned["value"] if lower_is_better else -pruned["value"]).groupby(pruned[series], sort=False).idxmin()]
    alt = (f"{metric} by {x}. Best: {listed(f'{r[series]} {number(r.value)} ({x} {r[x]})' for _, r in best.iterrows())}."
           + (f" Dense: {listed(told)}." if told else ""))
    how = (f"Dots with 95 % intervals; where intervals overlap widely, the difference may be noise. "
           f"{'The dashed lines are' if len(told) > 1 else 'The dashed line is'} the dense model." if told else
           "Dots with 95 % intervals; where intervals overlap widely, the difference may be noise.")
    return Chart(f"{metric[0].upper()}{metric[1:]} by {x}", figure, table.reset_index(drop=True), how, alt)


def _dense_lines(figure: go.Figure, dense: pd.DataFrame, names: list | None, series: str, ends: tuple[float, float]) -> list[str]:
    """A line for the dense model: in each series' colour, or grey where they all share it; what the lines say, in words."""
    told = []
    for i, name in enumerate(names if names is not None else [None]):
        values = (dense if name is None else dense[dense[series] == name])["value"].dropna()
        for value in values.unique()[:1]:
            label, colour = ("dense", GREY) if name is None else (f"dense, {name}", look(i)["color"])
            figure.add_trace(level_line(float(value), *ends, label, colour))
            told.append(number(float(value)) if name is None else f"{name} {number(float(value))}")
    return told


def _error_bars(values, low, high) -> dict:
    """Unequal error bars from the bounds of intervals; none where a bound is not known."""
    return {"type": "data", "symmetric": False, "array": np.nan_to_num(np.asarray(high - values, dtype=np.float64)).clip(0),
            "arrayminus": np.nan_to_num(np.asarray(values - low, dtype=np.float64)).clip(0), "thickness": 2}


def _log_axis(values: pd.Series) -> dict:
    """A logarithmic axis with whole numbers at 1, 2 and 5 times every power of ten."""
    powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:,.10g}" for t in ticks]}


def bytes_bars(table: pd.DataFrame) -> Chart | None:
    """Bytes of each model: as it is stored dense, with the mask packed, and compressed; three different things.

    Args:
        table: columns name, kind, bytes; the kinds in the order they should stand.

    Returns:
        None where the table is empty, or all sizes are equal.
    """
    if len(table) == 0 or not informative(table["bytes"]):
        return None
    names, kinds = (list(dict.fromkeys(table[c])) for c in ("name", "kind"))
    unit, scale = ("GB", 1e9) if table["bytes"].max() >= 1e9 else ("MB", 1e6)
    figure = new_figure(height=140 + 26 * len(names) * len(kinds), barmode="group", bargap=0.25)
    for i, kind in enumerate(kinds):
        rows = table[table["kind"] == kind]
        figure.add_trace(go.Bar(
            x=rows["bytes"].to_numpy(dtype=np.float64) / scale, y=[plain(n) for n in rows["name"]], orientation="h", name=plain(kind),
            customdata=columns(rows["name"], rows["kind"], rows["bytes"]), text=[f"{v / scale:.3g} {unit}" for v in rows["bytes"]],
            textposition="outside", cliponaxis=False,
            marker={"color": (SKY, ORANGE, GREEN, BLUE, VERMILLION)[i % 5],
                    "pattern": {"shape": ("", "/", ".", "x", "-")[i % 5], "solidity": 0.2, "fillmode": "overlay"}},
            hovertemplate="%{customdata[0]}, %{customdata[1]}<br>%{customdata[2]:,} bytes<extra></extra>"))
    figure.update_xaxes(title=f"size ({unit})", rangemode="tozero", range=[0, 1.15 * table["bytes"].max() / scale])
    figure.update_yaxes(autorange="reversed", title=None)
    sizes = listed((f"{r.name_} {r.kind} {r.bytes / scale:.3g} {unit}" for r in table.rename(columns={"name": "name_"}).itertuples()), 12)
    how = ("Zeros stored densely take the room they always took; only packing or compression makes a file smaller, and neither makes the "
           "model faster.")
    return Chart("How large is the model, stored in different ways?", figure, table.reset_index(drop=True), how, f"Sizes: {sizes}.")


# ---- texts


def token_strip(table: pd.DataFrame, name: str, most: float | None = None) -> Chart | None:
    """A text with the surprisal of each token as its colour; tokens that differ from the text it is compared with are framed.

    Args:
        table: columns index, token, surprisal (bits), probability, differs, as `analysis.generation.token_table` makes it.
        name: whose text it is.
        most: surprisal at the end of the scale; the same for all strips that are to be compared. Default the highest here.

    Returns:
        None for an empty text, or one of which no token was scored.
    """
    bits = table["surprisal"].to_numpy(dtype=np.float64)
    if not np.isfinite(bits).any():
        return None
    words = [_visible(t) for t in table["token"]]
    line, start, width = _wrapped([len(w) for w in words])
    most = max(float(bits[np.isfinite(bits)].max()) if most is None else most, 1e-9)
    differs = table["differs"].to_numpy(dtype=bool)
    lines = int(line.max()) + 1
    figure = new_figure(height=90 + 30 * lines, margin={"l": 10, "r": 20, "t": 20, "b": 20}, showlegend=False)
    figure.add_trace(go.Bar(
        x=width, y=line, base=start, orientation="h", width=0.8, text=[plain(w) for w in words], textposition="inside",
        insidetextanchor="middle", textangle=0, constraintext="none", textfont={"family": "monospace", "size": 12},
        customdata=columns(table["index"], [plain(t) for t in table["token"]], table["surprisal"], table["probability"],
                           np.where(differs, "differs", "the same")),
        marker={"color": np.minimum(bits, most), "colorscale": AMOUNTS, "cmin": 0, "cmax": most, "showscale": True,
                "colorbar": colour_bar("surprisal, bits"),
                "line": {"color": np.where(differs, VERMILLION, FAINT), "width": np.where(differs, 3, 1)}},
        hovertemplate="token %{customdata[0]}: “%{customdata[1]}”<br>%{customdata[2]:.2f} bits (p = %{customdata[3]:.3g})<br>"
                      "%{customdata[4]}<extra></extra>"))
    figure.update_xaxes(visible=False, range=[-0.5, LINE_CHARACTERS + 0.5])
    figure.update_yaxes(visible=False, range=[lines - 0.4, -0.6])
    scored = np.isfinite(bits)
    highest = int(np.nanargmax(np.where(scored, bits, -1)))
    differ = (f" {int(differs.sum())} of them differ from the text beside it, the first at token {int(differs.argmax())}."
              if differs.any() else "")
    alt = (f"{counted(len(table), 'token')} of {name}, {bits[scored].mean():.2f} bits of surprisal on average; the most surprising is "
           f"“{table['token'].iloc[highest]}” with {bits[highest]:.1f} bits.{differ}")
    how = ("The brighter a token, the less the model expected it: n bits are a chance of one in 2ⁿ."
           + (" Framed tokens are not in the text it is compared with." if differs.any() else ""))
    return Chart(f"Surprisal of every token, {name}", figure, table.reset_index(drop=True), how, alt)


def _visible(token: str) -> str:
    """A token as it can be printed in one line."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    shown = shown if shown.strip() else shown.replace(" ", "·") or "∅"
    return shown if len(shown) <= TOKEN_CHARACTERS else shown[:TOKEN_CHARACTERS - 1] + "…"


def _wrapped(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line, first character and width of every token when lines are filled in turn."""
    line, at, found = 0, 0, []
    for length in lengths:
        width = length + 1   # a little room, or neighbours run together
        if at + width > LINE_CHARACTERS:
            line, at = line + 1, 0
        found.append((line, at, width))
        at += width
    return tuple(np.array(column) for column in zip(*found, strict=True))

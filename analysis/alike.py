"""Figures of how alike masks are: pairs, matrices and maps of them, between chance and the same domain.

Every function returns a Chart, or None where a chart could not be informative.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import (AMOUNTS, BLUE, CELL_TEXT, GREEN, GREY, ORANGE, VERMILLION, Chart, click_targets, colour_bar, columns, counted,
                            error_bars, informative, look, new_figure, percent, plain)
from analysis.similarity import Halves, order

MEASURE_NAMES = {"jaccard": "Jaccard similarity", "cosine": "cosine similarity", "overlap": "overlap coefficient",
                 "corrected": "chance-corrected Jaccard"}
HALF = "from half the text each"


def similarity_heatmap(matrix: np.ndarray, labels: Sequence[str], floor: float | np.ndarray, halves: Halves | None = None,
                       measure: str = "jaccard", where: str = "the whole model") -> Chart | None:
    """Similarity of every two masks, like ones side by side, with chance and the same domain on the scale; click carries the pair.

    Args:
        matrix: (masks, masks), as `analysis.similarity.similarity` makes it.
        labels: of the masks.
        floor: what random masks of these counts share, one figure or one for each pair.
        halves: what masks from half the text share, of the same domain (the ceiling) and of different ones; None or NaN where it is not known.
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
    same, other = (np.full(matrix.shape, np.nan),) * 2 if halves is None else halves[:2]
    ceiling, others = _mean(same[a, b]), _mean(other[a, b])
    at = order(matrix)
    names, shown = [labels[i] for i in at], matrix[np.ix_(at, at)]
    low = min(base, float(values.min()))
    quantity = MEASURE_NAMES[measure]
    figure = new_figure(height=170 + 38 * max(len(names), 5), xaxis2={"domain": [0.86, 0.9], "visible": False, "range": [0, 1]},
                        yaxis2={"anchor": "x2", "side": "left", "range": [low - 0.03, 1.03], "showgrid": False})
    ticks = {"tickvals": list(range(len(names))), "ticktext": [plain(n) for n in names], "showgrid": False, "constrain": "domain"}
    digits = "%{z:.3f}" if len(names) <= 8 else "%{z:.2f}" if len(names) <= 16 else None
    figure.add_trace(go.Heatmap(x=np.arange(len(names)), y=np.arange(len(names)), z=shown, colorscale=AMOUNTS, zmin=low, zmax=1,
                                showscale=False, hoverinfo="skip", xgap=1, ygap=1, texttemplate=digits, textfont=CELL_TEXT))
    y, x = (i.reshape(-1) for i in np.indices(shown.shape))
    figure.add_trace(click_targets(
        x, y, columns([names[i] for i in y], [names[i] for i in x], shown.reshape(-1), floors[np.ix_(at, at)].reshape(-1),
                      same[np.ix_(at, at)].reshape(-1), other[np.ix_(at, at)].reshape(-1)),
        f"%{{customdata[0]}} and %{{customdata[1]}}<br>{quantity} %{{customdata[2]:.4f}}<br>random masks: %{{customdata[3]:.4f}}"
        + ("" if ceiling is None else f"<br>{HALF}: %{{customdata[5]:.4f}},<br>of the same domain %{{customdata[4]:.4f}}"), size=24))
    _scale(figure, low, base, ceiling, others, values, [f"{plain(labels[i])} and {plain(labels[j])}" for i, j in zip(a, b, strict=True)])
    figure.update_layout(xaxis={**ticks, "domain": [0, 0.72]}, yaxis={**ticks, "autorange": "reversed"}, margin={"r": 130, "t": 30})
    # above the scale, and not along it, where a narrow page has no room beside the matrix
    figure.add_annotation(xref="x2 domain", yref="paper", x=0.5, y=1.01, yanchor="bottom", text=quantity, showarrow=False)
    table = pd.DataFrame({"a": [labels[i] for i in a], "b": [labels[j] for j in b], measure: values, "floor": floors[a, b],
                          "halves": other[a, b], "ceiling": same[a, b]})
    least, most = (f"{labels[a[k]]} and {labels[b[k]]}, {values[k]:.3f}" for k in (values.argmin(), values.argmax()))
    top = "" if ceiling is None else f"; made from half the text each, masks of one domain share {ceiling:.3f}, of two {others:.3f}"
    alt = (f"{quantity} of {counted(len(labels), 'mask')} over {where}. Most alike: {most}; least: {least}. Two random masks share "
           f"{base:.3f}{top}.")
    how = "The scale on the right holds every pair as a circle. " + (
        "Less text makes a mask noisier, so domains are judged on equal terms: masks from half the text of two domains, against masks from "
        "the two halves of one. Where those lie together, domains make no difference." if ceiling is not None else
        "Between the random floor and 1 lies what can be said.")
    return Chart(f"How alike are the masks? {quantity[0].upper()}{quantity[1:]}, {where}", figure, table, how, alt)


def _mean(values) -> float | None:
    """The mean of what is known; None where nothing is."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def _scale(figure: go.Figure, low: float, floor: float, ceiling: float | None, others: float | None, values: np.ndarray,
           names: list[str]) -> None:
    """The colour scale as a strip of its own, with every pair on it, the floor, and same and different domains at half the text."""
    steps = np.linspace(low, 1, 128)
    figure.add_trace(go.Heatmap(x=[0.5], y=steps, z=steps[:, None], colorscale=AMOUNTS, zmin=low, zmax=1, showscale=False, hoverinfo="skip",
                                xaxis="x2", yaxis="y2"))
    across = np.full(len(values), 0.5)
    across[np.argsort(values, kind="stable")] += 0.3 * np.resize([-1, 0, 1], len(values))   # neighbours beside each other
    figure.add_trace(go.Scatter(x=across, y=values, customdata=columns(names), mode="markers", showlegend=False, xaxis="x2",
                                yaxis="y2", hovertemplate="%{customdata[0]}: %{y:.4f}<extra></extra>",
                                marker={"symbol": "circle-open", "size": 8, "color": VERMILLION, "line": {"width": 2}}))
    for value in (floor, ceiling, others):
        if value is not None:
            figure.add_shape(type="line", xref="x2 domain", yref="y2", x0=-0.3, x1=1.4, y0=value, y1=value,
                             line={"color": GREY, "width": 2, "dash": "dot"})
    words = [(floor, f"random masks<br>{floor:.3f}")]
    if ceiling is not None:   # one label for two lines: they lie close to each other
        words.append((ceiling, f"half the text each:<br>same domain {ceiling:.3f}<br>two domains {others:.3f}"))
    for value, text in words:
        figure.add_annotation(xref="x2 domain", yref="y2", x=1.5, y=value, text=text, showarrow=False, xanchor="left", align="left",
                              font={"size": 11})


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


def similarity_sides(sides: Mapping[str, np.ndarray], labels: Sequence[str], floor: float,
                     measure: str = "jaccard") -> Chart | None:
    """Two or three similarity matrices of masks of the same names beside each other, in one order, on one scale that names chance.

    Args:
        sides: {name: (masks, masks)}, as `analysis.similarity.similarity` makes them.
        labels: of the masks, the same on every side.
        floor: what random masks share.

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
    marks = {1.0: "the same", floor: f"random masks {floor:.3f}"}
    # the names of the squares stand above them
    figure = new_figure(height=170 + 46 * max(n, 4), margin={"t": 34}, coloraxis={"colorscale": AMOUNTS, "cmin": low, "cmax": 1, "colorbar": {
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
    table = table.assign(floor=floor)
    alt = (f"{MEASURE_NAMES[measure]} of {counted(n, 'mask')}. " + " ".join(
        f"{name}: from {v.min():.3f} ({labels[a[v.argmin()]]} and {labels[b[v.argmin()]]}) to {v.max():.3f} ({labels[a[v.argmax()]]} and "
        f"{labels[b[v.argmax()]]})." for name, v in values.items()) + f" Two random masks share {floor:.3f}.")
    how = ("Both squares have one scale and one order, so that colours compare across them; the scale marks what random masks share.")
    return Chart(f"{MEASURE_NAMES[measure][0].upper()}{MEASURE_NAMES[measure][1:]}: {', '.join(n.lower() for n in sides)}", figure, table, how, alt)


def similarity_profile(matrices: Mapping[str | int, np.ndarray], labels: Sequence[str], what: str, floors: Mapping[str | int, float],
                       halves: Mapping[str | int, Halves] | None = None, measure: str = "jaccard") -> Chart | None:
    """Similarity through the layers or over the modules: the mean pair with the lowest and the highest, between floor and ceiling.

    Args:
        matrices: {group: (masks, masks)}, as `analysis.similarity.similarity` makes it.
        labels: of the masks.
        what: what the groups are: "module" or "layer".
        floors: {group: what random masks share}.
        halves: as `similarity_heatmap` has them, by group.

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
                          "floor": [floors[g] for g in groups], **{name: [np.nan if not halves else _mean(getattr(halves[g], side)[a, b]) for g in groups]
                                                                   for name, side in (("halves", "other"), ("ceiling", "same"))}})
    figure = new_figure(height=400)
    mean = table["mean"].to_numpy()
    bars = {"error_y": {"array": table["highest"] - mean, "arrayminus": mean - table["lowest"], "symmetric": False, "color": BLUE,
                        "thickness": 2}} if len(a) > 1 else {}
    figure.add_trace(go.Scatter(
        x=x, y=mean, name="mean of all pairs, lowest to highest" if bars else plain(f"{labels[0]} and {labels[1]}"), mode="lines+markers",
        line={"color": BLUE}, marker={"size": 9, "color": BLUE}, customdata=table[["lowest", "highest", "floor"]].to_numpy(), **bars,
        hovertemplate=f"{what} %{{x}}<br>{MEASURE_NAMES[measure]} %{{y:.4f}} (%{{customdata[0]:.4f}} to %{{customdata[1]:.4f}})<br>"
                      f"random masks %{{customdata[2]:.4f}}<extra></extra>"))
    for column, name, colour, dash in (("ceiling", f"same domain, {HALF}", GREEN, "dash"), ("halves", f"two domains, {HALF}", ORANGE, "dashdot"),
                                       ("floor", "two random masks", GREY, "dot")):
        if table[column].notna().any():
            figure.add_trace(go.Scatter(x=x, y=table[column].to_numpy(), name=name, mode="lines", line={"color": colour, "dash": dash, "width": 2},
                                        hovertemplate=f"{name}<br>{what} %{{x}}: %{{y:.4f}}<extra></extra>"))
    figure.update_xaxes(title=what, **({"dtick": max(1, math.ceil(len(groups) / 16))} if numbers else {"type": "category"}))
    figure.update_yaxes(title=MEASURE_NAMES[measure])
    ends = [f"{table['mean'][i]:.3f} ({what} {table[what][i]})" for i in (table["mean"].idxmin(), table["mean"].idxmax())]
    alt = (f"{MEASURE_NAMES[measure]} of {counted(len(labels), 'mask')} by {what}, mean of all pairs: from {ends[0]} to {ends[1]}. Two random masks share {table['floor'].mean():.3f}"
           + (f"; from half the text each, masks of one domain {table['ceiling'].mean():.3f}, of two {table['halves'].mean():.3f}."
              if halves else "."))
    how = "The lowest line is chance: what two random masks would share." + (
        " The two dashed lines compare on equal terms, masks from half the text each: where they part, two domains differ by more than two "
        "samples of one domain's text." if halves else "")
    return Chart(f"Where in the model do the masks differ? By {what}", figure, table, how, alt)


def pair_dots(pairs: pd.DataFrame, measure: str = "jaccard", floor: float | None = None) -> Chart | None:
    """Every two masks as a dot with its interval, between the random floor and the same-domain ceiling; click carries the pair.

    Args:
        pairs: rows of one group, as `analysis.similarity.pairs` makes them: a, b, jaccard, low, high, floor, corrected, changed. Where they
            are known, ceiling and halves: what masks from half the text share, of the same domain and of the two.
        measure: a column of `pairs`; only "jaccard" has an interval.
        floor: what random masks share, in the same measure, where it is neither "jaccard" nor "corrected", whose floors are known.

    Returns:
        None where there is no pair, or all masks are identical.
    """
    if len(pairs) == 0 or (pairs[measure] == 1).all():
        return None
    table = pairs.assign(pair=[f"{a} · {b}" for a, b in zip(pairs["a"], pairs["b"], strict=True)])
    table = table.assign(**{c: np.nan for c in ("ceiling", "halves") if c not in table})
    table = table.sort_values(measure, kind="stable", ignore_index=True)
    values, names = table[measure].to_numpy(), [plain(p) for p in table["pair"]]
    floors = {"jaccard": table["floor"].to_numpy(), "corrected": np.zeros(len(table))}.get(
        measure, np.full(len(table), np.nan if floor is None else floor))
    limits = [("random masks", floors, "left"), (f"same domain, {HALF}", table["ceiling"].to_numpy(dtype=np.float64), "right")]
    halves = table["halves"].to_numpy(dtype=np.float64)
    bars = measure == "jaccard" and bool(table["low"].notna().any())
    # the legend in the top line of the figure: what stands at the lines has the next
    figure = new_figure(height=180 + 26 * len(table), margin={"t": 76}, legend={"yref": "container", "y": 1, "yanchor": "top"})
    for words, limit, side in limits:
        _limit(figure, words, limit, names, side)
    if np.isfinite(halves).any():
        figure.add_trace(go.Scatter(x=halves, y=names, mode="markers", name=f"the two domains, {HALF}",
                                    marker={"size": 11, "symbol": "circle-open", "color": VERMILLION, "line": {"width": 2}},
                                    hovertemplate=f"%{{y}}<br>{HALF}: %{{x:.4f}}<extra></extra>"))
    figure.add_trace(go.Scatter(
        x=values, y=names, mode="markers", marker={"size": 10, "color": BLUE}, name="the two domains, all their text",
        showlegend=bool(np.isfinite(halves).any()),
        customdata=columns(table["a"], table["b"], table["low"], table["high"], table["floor"], table["changed"]),
        hovertemplate=f"%{{y}}<br>{MEASURE_NAMES[measure]} %{{x:.4f}}<br>Jaccard over matrices, 95 %: %{{customdata[2]:.4f}} to "
                      "%{customdata[3]:.4f}<br>random masks, Jaccard: %{customdata[4]:.4f}<br>%{customdata[5]:,} decisions differ"
                      "<extra></extra>",
        error_x={**error_bars(values, table["low"], table["high"]), "color": BLUE} if bars else None))
    marks = np.concatenate([values, halves, *(limit for _, limit, _ in limits)])
    figure.update_xaxes(title=MEASURE_NAMES[measure], range=[np.nanmin(marks) - 0.03, max(1.0, np.nanmax(marks)) + 0.02])
    figure.update_yaxes(title="pair of masks", categoryorder="array", categoryarray=names)
    floor, ceiling = (_mean(limit) for _, limit, _ in limits)
    ends = [f"{values[i]:.3f} ({table['pair'].iloc[i]})" for i in (0, -1)]
    alt = (f"{counted(len(table), 'pair')} of masks by {MEASURE_NAMES[measure]}: from {ends[0]} to {ends[1]}."
           + (f" Two random masks share {floor:.3f}." if floor is not None else "")
           + (f" From half the text each, masks of one domain share {ceiling:.3f}." if ceiling is not None else "")
           + (f" Those of the two domains share {_mean(halves):.3f}." if _mean(halves) is not None else ""))
    how = "At 1 two masks are equal" + (", at the line “random masks” they share no more than chance." if floor is not None else ".")
    how += (f" On equal terms, {HALF}: where the open circle lies at the mark “same domain”, the two domains differ no more than two samples of "
            "one domain's text; to the left of it, they do.") if ceiling is not None else ""
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
        figure.add_annotation(x=value, yref="paper", y=1, yshift=14 * (side == "right"), text=f"{words} {value:.3f}", showarrow=False, xanchor=side,
                              yanchor="bottom")   # one above the other: on a narrow page they would meet
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

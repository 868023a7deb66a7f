"""The lesson's own figures: a tile of single weights that writes its arithmetic out, compensation column by column, what λ changes."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import (AMOUNTS, AROUND, BLUE, CELL_TEXT, FAINT, GREY, INK, ORANGE, VERMILLION, Chart, click_targets, columns,
                            level_line, listed, log_axis, look, new_figure, number, percent)
from analysis.lesson.numbers import Compensation
from dpruner.formulas import DEFAULT_LAM

TILE = 32
MARK = 11   # pixels of a cell's outline in a tile of 32


def tile(shown: np.ndarray, origin: tuple[int, int], values: dict[str, np.ndarray], hover: str, *, title: str, quantity: str, how: str,
         around_zero: bool = False, chosen: tuple[int, int] | None = None, flipped: np.ndarray | None = None,
         removed: np.ndarray | None = None,
         axes: tuple[str, str] = ("column (input)", "row (output)")) -> Chart:
    """A rectangle of one matrix as coloured cells; hover writes the cell's arithmetic out, a click carries its row and column.

    Args:
        shown: (rows, columns), what the colour says; amounts are shown by their logarithm, what lies around zero is not.
        origin: first row and column.
        values: {name: (rows, columns)} that `hover` speaks of, in the order of `customdata[2]` on; 0 and 1 are row and column.
        hover: Plotly template of a cell.
        quantity: what is shown, in words.
        chosen: (row, column) of the matrix, to be framed.
        flipped: bool (rows, columns), cells to be outlined.
        removed: bool (rows, columns), cells to be crossed out.
    """
    y, x = (i.reshape(-1) for i in np.indices(shown.shape))
    rows, inputs = y + origin[0], x + origin[1]
    with np.errstate(divide="ignore"):
        z = shown if around_zero else np.where(shown > 0, np.log10(shown.astype(np.float64)), np.nan)
    figure = new_figure(height=560, margin={"t": 10, "r": 10})
    few = np.nanquantile(z, (0.02, 0.98)) if np.isfinite(z).any() else (0, 1)   # single outliers would take up the scale
    colours = {"colorscale": AROUND, "zmid": 0} if around_zero else {"colorscale": AMOUNTS, "zmin": float(few[0]), "zmax": float(few[1])}
    figure.add_trace(go.Heatmap(x=np.arange(shown.shape[1]) + origin[1], y=np.arange(shown.shape[0]) + origin[0], z=z.astype(np.float32),
                                hoverinfo="skip", colorbar=flat_bar(quantity if around_zero else f"{quantity} (power of ten)"), **colours))
    for flags, marker in ((removed, {"symbol": "x-thin", "size": 6, "line": {"color": GREY, "width": 1}}),
                          (flipped, {"symbol": "square-open", "size": MARK, "color": VERMILLION, "line": {"width": 2.5}})):
        if flags is not None and flags.any():
            r, c = np.nonzero(flags)
            figure.add_trace(go.Scatter(x=c + origin[1], y=r + origin[0], mode="markers", marker=marker, hoverinfo="skip",
                                        showlegend=False))
    figure.add_trace(click_targets(inputs, rows,
                                   columns(rows, inputs, *(np.asarray(v, dtype=np.float64).reshape(-1) for v in values.values())),
                                   hover, size=12))
    if chosen is not None:
        for colour, width in (("white", 5), (BLUE, 3)):   # to be seen on all colours of the scale
            figure.add_shape(type="rect", x0=chosen[1] - 0.5, x1=chosen[1] + 0.5, y0=chosen[0] - 0.5, y1=chosen[0] + 0.5,
                             line={"color": colour, "width": width})
    figure.update_xaxes(title=axes[0], showgrid=False, constrain="domain", range=[origin[1] - 0.5, origin[1] + shown.shape[1] - 0.5])
    figure.update_yaxes(title=axes[1], showgrid=False, constrain="domain", scaleanchor="x",
                        range=[origin[0] + shown.shape[0] - 0.5, origin[0] - 0.5])
    table = pd.DataFrame({"row": rows, "column": inputs, **{name: np.asarray(v).reshape(-1) for name, v in values.items()}})
    marked = "" if flipped is None else f" {int(flipped.sum())} cells are outlined."
    alt = (f"{quantity} of {shown.size:,} cells, rows {origin[0]} to {rows[-1]}, columns {origin[1]} to {inputs[-1]}: from "
           f"{number(float(shown.min()))} to {number(float(shown.max()))}.{marked}")
    return Chart(title, figure, table, how, alt)


def flat_bar(title: str) -> dict:
    """A colour bar below the picture, so that a square may be as wide as its place."""
    return {"title": {"text": title, "side": "bottom"}, "orientation": "h", "outlinewidth": 0, "thickness": 10, "y": -0.16,
            "yanchor": "top"}


def compact(made: Chart | None, title: str, height: int = 520) -> Chart | None:
    """A chart for half a page: its colour bar below, under a shorter title."""
    if made is None:
        return None
    figure = go.Figure(made.figure).update_layout(height=height, margin={"t": 10, "l": 50, "r": 10}).update_annotations(font_size=10)
    for trace in figure.select_traces(selector={"type": "heatmap"}):
        trace.update(colorbar=flat_bar(trace.colorbar.title.text))
    return replace(made, title=title, figure=figure)


# ---- compensation


def compensation(found: Compensation, inputs: Sequence[int]) -> Chart:
    """A block of weights pruned column by column, with a play button and a slider; beside it the error with and without compensation.

    Args:
        inputs: which columns of the matrix the block's are.
    """
    steps, rows, across = found.weights.shape
    most = float(np.abs(found.weights).max())
    figure = new_figure(height=510, showlegend=False, margin={"t": 64, "b": 110},
                        xaxis2={"domain": [0.76, 1], "anchor": "y2"}, yaxis2={"anchor": "x2", "side": "right"})
    changes = [_change(found, done) for done in range(steps)]
    weights, crosses, errors = changes[-1]   # complete before anybody presses Play
    figure.add_trace(go.Heatmap(colorscale=AROUND, zmin=-most, zmax=most, xgap=1, ygap=1, texttemplate="%{text}", textfont=CELL_TEXT,
                                showscale=False, **weights,
                                hovertemplate="was %{customdata[0]:.4g}<br>moved by %{customdata[1]:.4g}<br>is %{z:.4g}<extra></extra>"))
    cross = {"symbol": "x-thin", "size": 14, "line": {"color": VERMILLION, "width": 3}}
    figure.add_trace(go.Scatter(mode="markers", hoverinfo="skip", marker=cross, **crosses))
    figure.add_trace(go.Bar(x=["zeros<br>alone", "kept ones<br>move"], xaxis="x2", yaxis="y2", marker={"color": [ORANGE, BLUE]},
                            textposition="outside", cliponaxis=False, hovertemplate="%{y:.3%}<extra></extra>", **errors))
    kinds = ("heatmap", "scatter", "bar")
    figure.frames = [
        go.Frame(name=str(done), traces=[0, 1, 2], data=[{"type": kind, **values} for kind, values in zip(kinds, change, strict=True)])
        for done, change in enumerate(changes)]
    instant = {"duration": 0}
    figure.update_layout(
        xaxis={"domain": [0, 0.7], "title": "column (input of the layer)", "showgrid": False, "tickvals": list(range(across)),
               "ticktext": [str(i) for i in inputs]},
        yaxis={"title": "row (output)", "showgrid": False, "autorange": "reversed", "dtick": 1},
        xaxis2={"showgrid": False}, yaxis2={"title": "share of the output lost", "tickformat": ".0%" if found.plain.max() > 0.05 else ".1%",
                                            "range": [0, 1.15 * max(found.plain.max(), 1e-9)]},
        updatemenus=[{"type": "buttons", "direction": "left", "showactive": False, "bgcolor": "rgba(0,0,0,0)", "font": {"color": INK, "weight": 700}, "x": 0,
                      "y": 1.06, "xanchor": "left", "yanchor": "bottom", "buttons": [
            {"label": "▶ Play", "method": "animate", "args": [None, {"frame": {"duration": 700, "redraw": True}, "transition": instant, "fromcurrent": True}]},
            {"label": "❚❚ Pause", "method": "animate", "args": [[None], {"mode": "immediate", "frame": {**instant, "redraw": False}}]}]}],
        sliders=[{"active": steps - 1, "x": 0, "len": 0.7, "y": -0.2, "currentvalue": {"prefix": "columns done: "}, "steps": [
            {"label": str(done), "method": "animate", "args": [[str(done)], {"mode": "immediate", "transition": instant,
                                                                            "frame": {"duration": 0, "redraw": True}}]}
            for done in range(steps)]}])
    done, r, c = (at.reshape(-1) for at in np.indices(found.weights.shape))
    table = pd.DataFrame({"columns done": done, "row": r, "column": np.asarray(inputs)[c], "weight": found.weights.reshape(-1),
                          "removed": found.removed[r, c] & (c < done), "lost by zeros alone": found.plain[done], "lost with compensation": found.moved[done]})
    alt = (f"A block of {rows} × {across} weights in {steps} steps. In the end {int(found.removed.sum())} are removed: zeros alone lose "
           f"{percent(found.plain[-1], 2)} of the output's mean square, with compensation {percent(found.moved[-1], 2)}.")
    how = ("Press Play, or move the slider. Numbers are weights, orange below zero and violet above. A cross is a removed weight; the columns to "
           "its right move to make up for it, so their colours change. The bars say what the layer's output has lost so far, with the kept weights "
           "left alone and with them moved. The first may even fall: the effects of two removed weights may cancel each other.")
    return Chart("Column by column: remove, and let the rest make up for it", figure, table, how, alt)


def _change(found: Compensation, done: int) -> tuple[dict, dict, dict]:
    """What is new in the three traces after some columns: weights, crosses, the two errors."""
    r, c = np.nonzero(found.removed & (np.arange(found.removed.shape[1]) < done))
    before, now = found.weights[0].astype(np.float32), found.weights[done].astype(np.float32)
    gone = np.zeros(now.shape, dtype=bool)
    gone[r, c] = True
    return ({"z": now, "customdata": np.stack([before, now - before], axis=-1), "text": np.where(gone, "", np.char.mod("%.2f", now.round(2) + 0.0)).tolist()},
            {"x": c if len(c) else [None], "y": r if len(r) else [None]},
            {"y": [found.plain[done], found.moved[done]], "text": [percent(found.plain[done], 2), percent(found.moved[done], 2)]})


# ---- λ


def lambda_curves(table: pd.DataFrame, formula: str, lam: float) -> Chart:
    """Decisions of the whole model that each λ changes against λ = 0, by every formula; the chosen formula and λ are marked.

    Args:
        table: columns formula, lam, from_zero, weights, as `numbers.changed_everywhere` makes them.
    """
    figure = new_figure(height=330)
    for name, rows in table.groupby("formula", sort=False):
        style = look(list(DEFAULT_LAM).index(name))   # the same whichever are there
        share = (rows["from_zero"] / rows["weights"]).to_numpy()
        figure.add_trace(go.Scatter(x=rows["lam"].to_numpy(), y=share, name=name, mode="lines+markers",
                                    customdata=rows["from_zero"].to_numpy(),
                                    line={"color": style["color"], "dash": style["dash"], "width": 4 if name == formula else 2},
                                    marker={"color": style["color"], "symbol": style["symbol"], "size": 8},
                                    hovertemplate=f"{name}, λ = %{{x:g}}<br>%{{customdata:,}} decisions (%{{y:.3g}})<extra></extra>"))
        usual = DEFAULT_LAM[name]
        at = share[np.isclose(rows["lam"], usual)]
        if len(at):
            figure.add_trace(go.Scatter(x=[usual], y=at, mode="markers", showlegend=False,
                                        marker={"symbol": "circle-open", "size": 18, "color": style["color"], "line": {"width": 2}},
                                        hovertemplate=f"{name}'s own λ: {usual:g}<extra></extra>"))
    figure.add_vline(x=lam, line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_xaxes(title="λ, the weight of the general side", type="log", dtick=2, exponentformat="power")
    figure.update_yaxes(title="decisions changed", tickformat=".0%", rangemode="tozero")
    formulas = table.groupby("formula", sort=False)
    told = listed(f"{name} {int(rows['from_zero'][np.isclose(rows['lam'], DEFAULT_LAM[name])].sum()):,}" for name, rows in formulas)
    how = ("How many mask decisions of the whole model differ from those at λ = 0. Rings are each formula's own λ: where a ring lies on "
           "the floor, λ is inert there and general importance decides nothing.")
    return Chart("Where λ decides something", figure, table.reset_index(drop=True), how,
                 f"Decisions that λ changes at each formula's own value: {told}.")


# ---- falling apart


def fall(table: pd.DataFrame, sparsity: float) -> Chart:
    """Perplexity at every sparsity with 95 % intervals, on a logarithmic axis; the present sparsity is marked.

    Args:
        table: columns sparsity, text, value, low, high, n.
    """
    figure = new_figure(height=360)
    for i, (text, rows) in enumerate(table.groupby("text", sort=False)):
        style = look(i)
        figure.add_trace(go.Scatter(
            x=rows["sparsity"].to_numpy(), y=rows["value"].to_numpy(), name=f"{text} text", mode="lines+markers",
            line={"color": style["color"], "dash": style["dash"]}, marker={"color": style["color"], "symbol": style["symbol"], "size": 8},
            error_y={"type": "data", "symmetric": False, "array": (rows["high"] - rows["value"]).to_numpy(),
                     "arrayminus": (rows["value"] - rows["low"]).to_numpy(), "thickness": 1.5},
            customdata=rows[["low", "high", "n"]].to_numpy(),
            hovertemplate="%{x:.0%} removed<br>perplexity %{y:.4g}, 95 %: %{customdata[0]:.4g} to %{customdata[1]:.4g} (n = "
                          "%{customdata[2]})<extra></extra>"))
        figure.add_trace(level_line(float(rows["value"].iloc[0]), 0, 0.9, f"dense, {text}", style["color"]))
    figure.add_vline(x=sparsity, line={"color": GREY, "width": 2})
    figure.update_xaxes(title="sparsity", tickformat=".0%", dtick=0.1)
    figure.update_yaxes(title="perplexity (lower is better)", **log_axis([*table["low"], *table["high"]]))
    ends = table.groupby("text", sort=False)["value"].agg(["first", "last"])
    told = listed(f"{text} text from {number(r['first'])} to {number(r['last'])}" for text, r in ends.iterrows())
    alt = f"Perplexity from 0 to 90 % sparsity: {told}."
    how = "For a long time nothing happens, then everything at once: mind the logarithmic axis. Dashed lines are the dense model."
    return Chart("Perplexity on text the pruning has not seen", figure, table.reset_index(drop=True), how, alt)


# ---- inputs


def own_share(strength: np.ndarray, own: np.ndarray, first: int, chosen: int) -> Chart:
    """How strong some inputs are, and what of it is their own.

    Args:
        strength: (inputs,), diagonal of the dampened H.
        own: (inputs,), `1 / diag(U)²`.
        first: index of the first input.
        chosen: index of the one to be marked.
    """
    inputs = np.arange(len(own)) + first
    figure = new_figure(height=480, barmode="overlay")
    for name, values, colour in (("strength H (with what is added)", strength, FAINT), ("its own, 1/U²", own, BLUE)):
        figure.add_trace(go.Bar(x=inputs, y=values, name=name, marker={"color": colour, "line": {"color": GREY, "width": 1}},
                                hovertemplate=f"input %{{x}}<br>{name}: %{{y:.4g}}<extra></extra>"))
    figure.add_vline(x=chosen, line={"color": VERMILLION, "width": 2, "dash": "dot"})
    figure.update_xaxes(title="input (column of W)", dtick=4)
    figure.update_yaxes(title="mean square, doubled")
    table = pd.DataFrame({"input": inputs, "strength": strength, "own": own, "share": own / strength})
    alt = (f"{len(own)} inputs: of their strength between {percent(float(table['share'].min()), 0)} and "
           f"{percent(float(table['share'].max()), 0)} is their own, and cannot be told from the inputs to their right.")
    how = ("The pale bar is how strong the input is, the blue one what of it the inputs to its right cannot stand in for. The last input "
           "of the matrix has none to its right: all of it counts as its own.")
    return Chart("What is an input's own", figure, table, how, alt)

"""Figures that lay qualities, sizes and texts side by side.

Every function returns a Chart, or None where a chart could not be informative.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import (AMOUNTS, BLUE, FAINT, GREEN, GREY, ORANGE, SKY, VERMILLION, Chart, colour_bar, columns, counted, error_bars,
                            informative, level_line, listed, log_axis, look, new_figure, number, plain)

LINE_CHARACTERS = 96    # of a token strip
TOKEN_CHARACTERS = 24   # a longer token is cut; its hover has it whole


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
            error_y={**error_bars(value, rows["low"], rows["high"]), "color": style["color"]},
            hovertemplate=f"%{{customdata[0]}} for %{{customdata[1]}}<br>{plain(metric)} %{{y:.4g}}, 95 %: %{{customdata[2]:.4g}} to "
                          "%{customdata[3]:.4g} (n = %{customdata[4]:,})<extra></extra>"))
    ends = (table[x].min(), table[x].max()) if along else (-0.5, len(places) - 0.5)
    told = _dense_lines(figure, dense, names if series != "method" else None, series, ends)
    finite = table.loc[np.isfinite(table["value"]), "value"]
    steep = finite.min() > 0 and finite.max() > 5 * finite.min()
    figure.update_yaxes(title=f"{metric} ({'lower' if lower_is_better else 'higher'} is better)", **(log_axis(finite) if steep else {}))
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

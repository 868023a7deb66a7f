"""Figures of single weights: a picture of a rectangle of one or two masks, and a whole matrix at a glance.

Every function returns a Chart, or None where a chart could not be informative.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import (AMOUNTS, BLUE, GREY, ORANGE, PURPLE, VERMILLION, Chart, click_targets, colour_bar, informative, listed,
                            new_figure, percent, plain)
from analysis.overlap import BOTH, NEITHER, ONLY_A, ONLY_B, region_codes
from dpruner.errors import InputError

TILE = 512             # most weights a side
TILE_WITH_TEXT = 128   # most with the values of every weight in the hover: more would not fit into 2 MB
NUMBERS = 2**17        # most of these values
REGION_COLOURS = {BOTH: BLUE, ONLY_A: ORANGE, ONLY_B: PURPLE}   # neither is left clear, so that it is the page's own colour


def mask_tile(a, b, names: tuple[str, ...], matrix: str, origin: tuple[int, int] = (0, 0),
              values: Mapping[str, np.ndarray] | None = None, notes: Sequence[str] = ()) -> Chart:
    """Single weights, a pixel each: kept by both masks, only by one, by neither; or, of one mask alone, kept and removed.

    Args:
        a, b: bool (rows, columns) of a rectangle of two masks, at most 512 a side; `b` may be None.
        names: of the masks.
        matrix: its name in words.
        origin: first row and column of the rectangle.
        values: {name: (rows, columns) numbers, or (rows, columns, 2) lowest and highest} for the hover, such as w, G, S, rank; for at most
            128 × 128 weights and 2¹⁷ numbers in all.
        notes: lines that end every weight's hover, such as thresholds.

    Raises:
        InputError: the rectangle is empty or too large.
    """
    codes = region_codes(a, a if b is None else b)
    values = {name: np.asarray(v, dtype=np.float32) for name, v in (values or {}).items()}
    most = TILE_WITH_TEXT if values else TILE
    if codes.ndim != 2 or not 0 < min(codes.shape) or max(codes.shape) > most or sum(v.size for v in values.values()) > NUMBERS:
        raise InputError("The weights cannot be shown",
                         f"a picture of {' × '.join(map(str, codes.shape))} weights is empty or too large for a page",
                         f"choose at most {most} × {most}")
    who = ({BOTH: "kept", NEITHER: "removed"} if b is None else
           {BOTH: "both", ONLY_A: f"only {names[0]}", ONLY_B: f"only {names[1]}", NEITHER: "neither"})
    row, column = origin
    counts = np.bincount(codes.reshape(-1), minlength=4)
    figure = new_figure(height=600)
    figure.add_trace(_tile_image(codes, who, origin, values, notes))
    for code, name in who.items():
        marker = {"color": REGION_COLOURS[code]} if code else {"color": "rgba(0,0,0,0)", "line": {"color": GREY, "width": 1}}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=f"{plain(name)} ({counts[code]:,})", hoverinfo="skip",
                                    marker={"symbol": "square", "size": 12, **marker}))
    figure.update_xaxes(title="column (input)", showgrid=False, constrain="domain", range=[column - 0.5, column + codes.shape[1] - 0.5])
    figure.update_yaxes(title="row (output)", showgrid=False, constrain="domain", range=[row + codes.shape[0] - 0.5, row - 0.5])
    y, x = (i.reshape(-1) for i in np.indices(codes.shape))
    kept = {f"kept by {name}": (codes.reshape(-1) & bit) > 0 for name, bit in zip(names, (1, 2), strict=False)}
    table = pd.DataFrame({"row": row + y, "column": column + x, **kept,
                          **{part: numbers for name, v in values.items() for part, numbers in _parts(name, v).items()}})
    shares = listed(f"{name} {counts[code]:,} ({percent(counts[code] / codes.size)})" for code, name in who.items())
    where = f"rows {row} to {row + codes.shape[0] - 1} and columns {column} to {column + codes.shape[1] - 1}"
    how = ("Every pixel is one weight: coloured where it is kept. " if b is None else
           "Every pixel is one weight; its colour says which mask keeps it. ") + "Where it is removed, the page shines through."
    alt = f"Picture of {where} of {matrix}. By who keeps them: {shares}."
    return Chart(f"Single weights of {matrix}: {listed(names)}", figure, table, how, alt)


def _tile_image(codes: np.ndarray, who: Mapping[int, str], origin: tuple[int, int], values: Mapping[str, np.ndarray],
                notes: Sequence[str]) -> go.Image:
    """The pixels, with the numbers of every weight in the hover where they are few enough."""
    hover, more = "row %{y:,}, column %{x:,}", {}
    if values:
        more["customdata"] = np.concatenate([v.reshape(*codes.shape, -1) for v in values.values()], axis=-1)
        at = 0
        for name, v in values.items():
            ends = [f"%{{customdata[{at + i}]:.6~g}}" for i in range(1 if v.ndim == 2 else 2)]
            hover, at = f"{hover}<br>{plain(name)}: {' to '.join(ends)}", at + len(ends)
    if max(codes.shape) <= TILE_WITH_TEXT:
        more["text"] = np.array([plain(who.get(code, "")) for code in range(4)], dtype=object)[codes]
        hover += "<br>%{text}"
    hover += "".join(f"<br>{plain(note)}" for note in notes)
    return go.Image(source=_png(codes), x0=origin[1], y0=origin[0], hovertemplate=hover + "<extra></extra>", **more)


def _parts(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """A value, or the two ends of a range, as columns of a table."""
    if values.ndim == 2:
        return {name: values.reshape(-1)}
    return {f"{name}, {end}": values[..., i].reshape(-1) for i, end in enumerate(("lowest", "highest"))}


def mask_overview(shares: np.ndarray, row_edges: np.ndarray, column_edges: np.ndarray, *, title: str, quantity: str, how: str,
                  frame: tuple[int, int, int, int] | None = None) -> Chart | None:
    """A whole matrix at a glance, as rectangles; a click carries their first row, last row, first column and last column.

    Args:
        shares, row_edges, column_edges: as `analysis.glance.cell_shares` makes them, of a mask, of disagreement, or of a brushed region.
        quantity: what the share is of, in words.
        frame: (first row, last row, first column, last column) to be framed.

    Returns:
        None where all rectangles show the same.
    """
    if not informative(shares):
        return None
    first, last = [row_edges[:-1], column_edges[:-1]], [row_edges[1:] - 1, column_edges[1:] - 1]
    (y, x), (r, c) = ((start + stop) / 2 for start, stop in zip(first, last, strict=True)), np.indices(shares.shape)
    r, c = r.reshape(-1), c.reshape(-1)
    figure = new_figure(height=520)
    figure.add_trace(go.Heatmap(x=x, y=y, z=shares.astype(np.float32), colorscale=AMOUNTS, hoverinfo="skip",
                                colorbar=colour_bar(quantity, tickformat=".0%")))
    corners = np.stack([first[0][r], last[0][r], first[1][c], last[1][c]], axis=1).astype(np.int32)
    figure.add_trace(click_targets(
        x[c], y[r], np.column_stack([corners, shares.reshape(-1)]),
        "rows %{customdata[0]:,} to %{customdata[1]:,}<br>columns %{customdata[2]:,} to %{customdata[3]:,}<br>"
        f"{plain(quantity)}: %{{customdata[4]:.2%}}", size=8))
    if frame is not None:
        figure.add_shape(type="rect", y0=frame[0] - 0.5, y1=frame[1] + 0.5, x0=frame[2] - 0.5, x1=frame[3] + 0.5,
                         line={"color": VERMILLION, "width": 3})
    figure.update_xaxes(title="column (input)", showgrid=False, range=[-0.5, column_edges[-1] - 0.5])
    figure.update_yaxes(title="row (output)", showgrid=False, range=[row_edges[-1] - 0.5, -0.5])
    table = pd.DataFrame(corners, columns=["first_row", "last_row", "first_column", "last_column"]).assign(share=shares.reshape(-1))
    ends = []
    for at in (table["share"].idxmin(), table["share"].idxmax()):
        top, bottom, left, right = corners[at]
        ends.append(f"{percent(table['share'][at])} (rows {top} to {bottom}, columns {left} to {right})")
    alt = (f"Overview of {int(row_edges[-1]):,} rows and {int(column_edges[-1]):,} columns, {quantity}: from {ends[0]} to {ends[1]}.")
    return Chart(title, figure, table, how, alt)


def _png(codes: np.ndarray) -> str:
    """A picture of region codes as a data URI: a palette of four colours, the first of them clear (PNG, ISO 15948)."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    palette = b"".join(bytes.fromhex(REGION_COLOURS.get(code, "#000000")[1:]) for code in range(4))
    height, width = codes.shape
    rows = np.zeros((height, width + 1), dtype=np.uint8)   # each row begins with its filter, 0: none
    rows[:, 1:] = codes
    data = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)) + chunk(b"PLTE", palette)
            + chunk(b"tRNS", b"\0\xff\xff\xff") + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")

"""What all figures share: the Chart, colours that colour-blind people can tell apart in light and dark, numbers in words."""

import html
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

# Okabe and Ito 2008, without black and yellow, which vanish on a dark or a light page
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
AMOUNTS, AROUND = "Cividis", "PuOr"   # for amounts, and where there is a middle
FAINT = "rgba(128,128,128,0.25)"
# figures in the cells of a heatmap: thin ones vanish on the middle of a colour scale; without a size they fit the cell, also on a phone
CELL_TEXT = {"weight": 700}
INK = "#7d7d7d"   # text of exported figures, legible on white and on black; a page's theme puts its own in the template's place

LEGEND = 40   # pixels that a legend takes above the axes; where there is one, a page's figure makes room for it by itself

TEMPLATE = go.layout.Template(layout={
    "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": INK, "size": 13}, "colorway": list(CATEGORIES),
    "xaxis": {"gridcolor": FAINT, "zeroline": False, "automargin": True, "ticks": "", "title": {"standoff": 10}},
    "yaxis": {"gridcolor": FAINT, "zeroline": False, "automargin": True, "ticks": "", "title": {"standoff": 10}},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, "margin": {"l": 60, "r": 20, "t": 12, "b": 50},
    "hovermode": "closest", "height": 420,
})


@dataclass(frozen=True)
class Chart:
    """A figure with all that stands around it on a page.

    Attributes:
        title: says what is seen.
        figure: without the title, so that a page can set it as a heading; `titled` has it, for files.
        table: the data behind it, for CSV.
        how: how to read it, one or two sentences.
        alt: what it shows, with the numbers, for those who do not see it.
    """

    title: str
    figure: go.Figure
    table: pd.DataFrame
    how: str
    alt: str

    def titled(self) -> go.Figure:
        """A copy of the figure with its title, to be saved."""
        copy = go.Figure(self.figure)
        entries = sum(bool(trace.name) and trace.showlegend is not False for trace in copy.data)
        room = 30 + 20 * -(-entries // 5)   # the legend stands between the title and the axes, in lines of about five
        top = max(copy.layout.margin.t or 0, LEGEND) + room
        height = (copy.layout.height or TEMPLATE.layout.height) + room
        if copy.layout.legend.yref == "container":   # it stood where the title comes
            copy.layout.legend.y = 1 - 34 / height
        return copy.update_layout(title={"text": plain(self.title), "x": 0, "xref": "paper", "yref": "container", "y": 1 - 20 / height},
                                  margin={"t": top}, height=height)


def new_figure(**layout) -> go.Figure:
    """An empty figure in the style of all."""
    # no limit to the distance of a hover: every place in a cell of a heatmap counts to the click target in its middle
    return go.Figure(layout={"template": TEMPLATE, "hoverdistance": -1, **layout})


def plain(text) -> str:
    """Text of a user as it is: Plotly takes < and & for markup."""
    return html.escape(str(text), quote=False)


def look(i: int) -> dict:
    """Colour, symbol and dash of the i-th category: no two of the first seven share any of them."""
    return {"color": CATEGORIES[i % len(CATEGORIES)], "symbol": SYMBOLS[i % len(SYMBOLS)], "dash": DASHES[i % len(DASHES)]}


def informative(values, tolerance: float = 1e-9) -> bool:
    """Whether finite values differ from each other: what is equal everywhere needs no chart."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    return finite.size > 1 and bool(np.ptp(finite) > tolerance * max(1.0, np.abs(finite).max()))


def colour_bar(title: str, **more) -> dict:
    return {"title": {"text": plain(title), "side": "right"}, "outlinewidth": 0, "thickness": 14, **more}


def click_targets(x, y, customdata, hovertemplate: str, size: float = 18, **more) -> go.Scatter:
    """Invisible markers that carry hover and click for a heatmap, whose own clicks a page is not told of."""
    unseen = {"marker": {"opacity": 0}}
    return go.Scatter(x=x, y=y, customdata=customdata, hovertemplate=hovertemplate + "<extra></extra>", mode="markers", showlegend=False,
                      marker={"size": size, "symbol": "square", "opacity": 0, "color": GREY}, selected=unseen, unselected=unseen, **more)


def level_line(y: float, start: float, stop: float, name: str, colour: str) -> go.Scatter:
    """A dashed line across; a trace and not a shape, so that the legend names it and a logarithmic axis takes it."""
    return go.Scatter(x=np.array([start, stop], dtype=np.float64), y=np.array([y, y], dtype=np.float64), mode="lines", name=plain(name),
                      line={"color": colour, "dash": "dash", "width": 1.5}, hovertemplate=f"{plain(name)}: %{{y:.4g}}<extra></extra>")


def error_bars(values, low, high) -> dict:
    """Unequal error bars from the bounds of intervals; none where a bound is not known."""
    return {"type": "data", "symmetric": False, "array": np.nan_to_num(np.asarray(high - values, dtype=np.float64)).clip(0),
            "arrayminus": np.nan_to_num(np.asarray(values - low, dtype=np.float64)).clip(0), "thickness": 2}


def log_axis(values) -> dict:
    """A logarithmic axis with whole numbers at 1, 2 and 5 times every power of ten, fewer where there are many powers.

    Args:
        values: positive and finite.
    """
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = [m * 10.0**p for p in range(low, high + 1) for m in ((1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,))]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:,.10g}" for t in ticks]}


def columns(*values) -> np.ndarray:
    """Customdata: one row for each point, as objects, so that numbers stay numbers beside text."""
    table = np.empty((len(values[0]), len(values)), dtype=object)
    for i, column in enumerate(values):
        table[:, i] = np.asarray(column).tolist() if not isinstance(column, list) else column
    return table


def named_counts(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A table to take away: counts that were estimated, and so are no whole numbers, are rounded and say so in their column's name."""
    if pd.api.types.is_integer_dtype(table[column]):
        return table
    return table.assign(**{column: table[column].round().astype(np.int64)}).rename(columns={column: f"{column}_estimated"})


def percent(share: float, digits: int = 1) -> str:
    """A share in words, such as "33.3 %"; "unknown" where it is NaN."""
    return "unknown" if not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, such as "−4.9"; without one where it rounds to nothing."""
    shown = f"{value:+.{digits}f}"
    return shown.replace("-", "−") if float(shown) else shown[1:]


def cell_format(values, share: bool = False) -> str:
    """The d3 format in which values that differ look different: more digits where they lie close together.

    Args:
        share: they are shown as percentages.
    """
    values = np.asarray(values, dtype=np.float64)
    spread = float(np.ptp(values))
    more = math.ceil(-math.log10(spread)) - 1 if 0 < spread < 0.1 else 0
    return f".{more}%" if share else f".{2 + more}f" if np.abs(values).max() <= 1 else ".2g"


def number(value: float) -> str:
    """A figure in words: three significant digits, from a thousand on whole, with separators."""
    if not math.isfinite(value):
        return "unknown"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}"


def counted(n: int, one: str, many: str | None = None) -> str:
    """"1 layer", "32 layers"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(items, most: int = 8) -> str:
    """"a, b and c"; a long list ends with how many more there are."""
    items = [str(i) for i in items]
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

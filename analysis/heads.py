"""What masks keep of the attention heads of a model: layers by heads, a square for each mask."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis.chart import AROUND, CELL_TEXT, Chart, click_targets, colour_bar, columns, counted, informative, listed, new_figure, percent, plain
from analysis.matrices import places

MOST = 4   # squares beside each other


def head_shares(parts: pd.DataFrame, heads: Mapping[str, Sequence]) -> pd.DataFrame:
    """The share kept of every head in the output projections, where all that a head says passes through columns of its own.

    Args:
        parts: columns matrix, part, index, weights and kept, as in stats.parquet.
        heads: {matrix: ("row" or "column", rows or columns of a head)}, as in run.json.

    Returns:
        Columns block, head, weights, kept, kept_share; no rows where the model has no such projections.
    """
    out = [name for name, (axis, _) in heads.items() if axis == "column"]
    found = parts[(parts.part == "head") & parts.matrix.isin(out)].merge(places(out)[["matrix", "block"]], on="matrix")
    found = found.sort_values(["block", "index"], kind="stable", ignore_index=True).rename(columns={"index": "head"})
    return found[["block", "head", "weights", "kept"]].assign(kept_share=found.kept / found.weights)


def head_squares(tables: Mapping[str, pd.DataFrame], labels: Sequence[str], method: str) -> Chart | None:
    """Share kept of every head, layers (down) by heads (across): a square for each domain, empty where its mask is still to come.

    Args:
        tables: {domain: as `head_shares` makes it}, of those that are there.
        labels: all domains, in their order; the first four are drawn.
        method: that made the masks.

    Returns:
        None where no mask is there, or all heads keep the same.
    """
    labels = list(labels)[:MOST]
    tables = {label: tables[label] for label in labels if label in tables and len(tables[label])}
    if not tables or not informative(np.concatenate([t.kept_share for t in tables.values()])):
        return None
    first = next(iter(tables.values()))
    middle = first.kept.sum() / first.weights.sum()
    reach = max(float((t.kept_share - middle).abs().max()) for t in tables.values())
    blocks, heads = int(first.block.max()) + 1, int(first["head"].max()) + 1
    figure = new_figure(height=110 + 20 * max(6, min(blocks, 16)), margin={"t": 30}, coloraxis={
        "colorscale": AROUND, "cmin": middle - reach, "cmax": middle + reach, "colorbar": colour_bar("share kept", tickformat=".0%")})
    for k, label in enumerate(labels):
        suffix, ends = "" if k == 0 else str(k + 1), [(k + 0.04) / len(labels), (k + 0.96) / len(labels)]
        place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        figure.update_layout({
            f"xaxis{suffix}": {"title": "head", "domain": ends, "anchor": f"y{suffix}", "range": [-0.5, heads - 0.5], "showgrid": False,
                               "dtick": max(1, heads // 8)},
            f"yaxis{suffix}": {"title": "layer" if k == 0 else None, "anchor": f"x{suffix}", "range": [blocks - 0.5, -0.5],
                               "showgrid": False, "showticklabels": k == 0, "dtick": max(1, blocks // 8)}})
        words, y, side = (("", 1.01, "bottom") if label in tables else ("<br>still to come", 0.5, "middle"))
        figure.add_annotation(text=f"<b>{plain(label)}</b>{words}", x=sum(ends) / 2, xref="paper", xanchor="center", y=y, yref="paper",
                              yanchor=side, showarrow=False)
        if label in tables:
            t = tables[label]
            figure.add_trace(go.Heatmap(x=t["head"], y=t.block, z=t.kept_share, coloraxis="coloraxis", hoverinfo="skip", xgap=1, ygap=1,
                                        texttemplate="%{z:.0%}" if blocks * heads <= 80 else None, textfont=CELL_TEXT, **place))
            figure.add_trace(click_targets(
                t["head"], t.block, columns(t.kept, t.weights, t.kept_share),
                f"{plain(label)}, layer %{{y}}, head %{{x}}<br>keeps %{{customdata[0]:,}} of %{{customdata[1]:,}} (%{{customdata[2]:.2%}})",
                **place))
    table = pd.concat([t.assign(domain=label) for label, t in tables.items()], ignore_index=True)
    ends = [table.loc[i] for i in (table.kept_share.idxmin(), table.kept_share.idxmax())]
    alt = (f"Share kept of {counted(heads, 'head')} in each of {counted(blocks, 'layer')} by the masks for {listed(tables)}: from "
           + " to ".join(f"{percent(r.kept_share)} (layer {r.block}, head {r['head']}, {r.domain})" for r in ends) + ".")
    how = (f"A matrix keeps {percent(middle, 0)} of its weights, but not each of its heads does: the purple ones are needed more than "
           "most, the orange ones less. Where the squares differ, the domains need other heads.")
    table = table[["domain", "block", "head", "weights", "kept", "kept_share"]]
    return Chart(f"What {method} keeps of every attention head", figure, table, how, alt)

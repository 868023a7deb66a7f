"""How much a domain's mask costs on another domain's text, and whether likeness of the masks predicts it."""

import math
from itertools import permutations

import numpy as np
import pandas as pd

from dpruner.variants import DENSE


def transfer(table: pd.DataFrame) -> pd.DataFrame:
    """How much worse every mask is than the text's own, beside how alike the two masks are.

    Returns:
        Columns mask, text, value (perplexity), excess, low, high (shares, against the text's own mask), verdict, jaccard; texts without a mask
        are left out.
    """
    figures = table[table.low.notna() & (table.method != DENSE)]
    alike = {}
    for r in table[table.metric == "jaccard"].itertuples():
        alike[r.domain, r.task] = alike[r.task, r.domain] = r.value
    rows = []
    for r in figures.itertuples():
        text = r.task.removesuffix("-perplexity")
        if text in set(figures.domain):
            rows.append((r.domain, text, r.value, r.difference, r.difference_low, r.difference_high, r.verdict, alike.get((r.domain, text), math.nan)))
    return pd.DataFrame(rows, columns=["mask", "text", "value", "excess", "low", "high", "verdict", "jaccard"])


def predicts(found: pd.DataFrame) -> tuple[float, float]:
    """Whether like masks serve each other's texts: Spearman's correlation of Jaccard and excess over ordered pairs, and its permutation p-value.

    Domains, not pairs, are permuted (Mantel's test), because the pairs of one domain hang together. One-sided: likeness should mean less excess.

    Returns:
        (correlation, p); NaN with fewer than three domains.
    """
    names = list(dict.fromkeys(found["mask"]))
    if len(names) < 3:
        return math.nan, math.nan
    excess = found.pivot(index="mask", columns="text", values="excess").loc[names, names].to_numpy()
    alike = found.pivot(index="mask", columns="text", values="jaccard").loc[names, names].to_numpy()
    apart = ~np.eye(len(names), dtype=bool)

    def correlation(order) -> float:
        ranks = [pd.Series(m[apart]).rank() for m in (alike[np.ix_(order, order)], excess)]
        return float(ranks[0].corr(ranks[1]))

    orders = list(permutations(range(len(names)))) if len(names) <= 7 else [np.random.default_rng(i).permutation(len(names)) for i in range(5000)]
    mine = correlation(range(len(names)))
    return mine, float(np.mean([correlation(list(order)) <= mine + 1e-12 for order in orders]))

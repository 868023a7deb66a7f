"""Quality, size and speed of pruned models: what differs beyond the noise, and what runs differ in."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from dpruner.errors import InputError
from dpruner.evaluate import Estimate
from dpruner.metrics import PERPLEXITY as METRIC
from dpruner.metrics import difference

DENSE, PERPLEXITY, SPARSITY = "dense", "perplexity", "sparsity of prunable weights"
# settings that do not make two runs two series of a chart
ABOUT_TEXT = ("domains", "methods", "sparsity", "seed", "device", "halves", "evaluate", "eval_seqlen", "eval_documents")
PIECE = 1 << 16   # weights in a row that a sample is made of


def against(losses: pd.DataFrame, domain: str, method: str, other: str) -> dict[str, Estimate]:
    """{text: how far the perplexity of one method is from another's for the same domain, as a share of it}, on the same windows of text.

    Args:
        losses: as of losses.parquet.
        other: a method, or "dense".

    Raises:
        InputError: the two were not judged on the same windows.
    """
    def windows(name):
        return losses[(losses["method"] == name) & (losses["domain"] == ("" if name == DENSE else domain))].rename(columns={"window": "id"})

    mine, theirs = windows(method), windows(other)
    return {text: difference(METRIC, rows, theirs[theirs["text"] == text]) for text, rows in mine.groupby("text", sort=False)}


def against_dense(metrics: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Perplexity of every method for one domain beside the dense model's.

    Args:
        metrics: as of metrics.parquet.

    Returns:
        Columns text, method, value, low, high, n, dense, dense_low, dense_high; empty where nothing was evaluated.
    """
    chosen = metrics[(metrics["metric"] == PERPLEXITY) & (metrics["domain"] == domain)]
    dense = chosen[chosen["method"] == DENSE].set_index("text")[["value", "low", "high"]]
    table = chosen[(chosen["method"] != DENSE) & chosen["text"].isin(dense.index)][["text", "method", "value", "low", "high", "n"]]
    return table.join(dense.rename(columns={"value": "dense", "low": "dense_low", "high": "dense_high"}), on="text").reset_index(drop=True)


# ---- several runs


def differing(settings: Mapping[str, Mapping]) -> pd.DataFrame:
    """The settings in which runs differ, and no others.

    Args:
        settings: {run: its config}.

    Returns:
        Columns setting, then one for each run, values as text; settings a run does not know are "–".
    """
    names = dict.fromkeys(name for config in settings.values() for name in config)
    rows = [{"setting": name, **{run: _shown(config, name) for run, config in settings.items()}} for name in names]
    return pd.DataFrame([row for row in rows if len(set(list(row.values())[1:])) > 1], columns=["setting", *settings])


def _shown(config: Mapping, name: str) -> str:
    value = config.get(name, "–")
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "default" if value is None else str(value)


def side_by_side(metrics: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Perplexities of several runs, one column for each run, "104 (95 to 116), n = 58"; nothing where a run has no such figure.

    Args:
        metrics: {run: its metrics.parquet}.
    """
    columns = {}
    for run, table in metrics.items():
        chosen = table[table["metric"] == PERPLEXITY]
        columns[run] = {(r.domain, r.text, r.method): f"{r.value:.1f} ({r.low:.1f} to {r.high:.1f}), n = {r.n}" for r in chosen.itertuples()}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    return pd.DataFrame([{"pruned for": d, "text": t, "method": m, **{run: column.get((d, t, m), "") for run, column in columns.items()}}
                         for d, t, m in keys], columns=["pruned for", "text", "method", *metrics])


def over_sparsity(runs: Mapping[str, tuple[Mapping, pd.DataFrame]], domain: str, text: str) -> tuple[pd.DataFrame, list[str]]:
    """Perplexity on one text of all runs that were judged on the same windows of it, for a chart against sparsity.

    Args:
        runs: {run: (config, metrics)} of one model; the first says what "the same windows" are: the same dense perplexity and count.

    Returns:
        (rows as of metrics.parquet with columns run, sparsity, series added, dense once; runs left out because they were judged otherwise).
        A series is a method, with the settings that differ between the runs apart from sparsity.
    """
    found, left_out, mine = [], [], None
    labels = {run: {} for run in runs}
    for row in differing({run: config for run, (config, _) in runs.items()}).to_dict("records"):
        if row["setting"] not in ABOUT_TEXT:
            for run in runs:
                labels[run][row["setting"]] = row[run]
    for run, (_, metrics) in runs.items():
        rows = metrics[(metrics["metric"] == PERPLEXITY) & (metrics["domain"] == domain) & (metrics["text"] == text)]
        dense = rows[rows["method"] == DENSE]
        if dense.empty:
            continue
        judged = (float(dense["value"].iloc[0]), int(dense["n"].iloc[0]))
        mine = mine or judged
        if judged[1] != mine[1] or not math.isclose(judged[0], mine[0], rel_tol=1e-3):
            left_out.append(run)
            continue
        share = metrics[(metrics["metric"] == SPARSITY) & (metrics["domain"] == domain)].set_index("method")["value"]
        words = "".join(f" · {name} {value}" for name, value in labels[run].items())
        for row in rows.to_dict("records"):
            if row["method"] != DENSE:
                found.append({**row, "run": run, "sparsity": float(share[row["method"]]), "series": row["method"] + words})
            elif not found or found[0]["method"] != DENSE:
                found.insert(0, {**row, "run": run, "sparsity": 0.0, "series": DENSE})
    return pd.DataFrame(found), left_out


# ---- sizes


def compressed_share(tensors: Iterable[torch.Tensor], precision: torch.dtype, budget: int = 1 << 25) -> tuple[float, float]:
    """What zlib leaves of weights, measured; of evenly spread pieces where there are more bytes than the budget.

    Args:
        tensors: the weights as they are.
        precision: they are stored in.
        budget: bytes to compress at most, about.

    Returns:
        (compressed bytes as a share of the bytes before, share of all bytes that was measured).
    """
    tensors = list(tensors)
    total = sum(t.numel() for t in tensors) * precision.itemsize
    step = max(1, math.ceil(total / budget))   # of every so many pieces one is taken
    before = after = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        pieces = flat.split(PIECE)[::step] if step > 1 else [flat]
        for piece in pieces:
            data = piece.to(precision).cpu().contiguous().view(torch.uint8).numpy().tobytes()
            before, after = before + len(data), after + len(zlib.compress(data))
    return after / max(before, 1), before / max(total, 1)


def size_table(dense: int, removed: int, item: int, mask: int, shares: tuple[float, float] | None = None) -> pd.DataFrame:
    """Bytes of the dense and of the pruned model in each way of storing them.

    Args:
        dense: bytes of the checkpoint's files.
        removed: weights that are zero.
        item: bytes of one weight.
        mask: bytes of the packed mask.
        shares: what compression leaves of the dense and of the pruned weights, where it was measured.

    Returns:
        Columns name, kind, bytes.
    """
    rows = [("dense", "as it is stored", dense), ("pruned", "as it is stored", dense),
            ("pruned", "kept weights + packed mask", dense - removed * item + mask)]
    if shares:
        rows += [(name, "compressed (zlib)", round(dense * share)) for name, share in zip(("dense", "pruned"), shares, strict=True)]
    return pd.DataFrame([*rows, ("pruned", "packed mask alone", mask)], columns=["name", "kind", "bytes"])


# ---- speed


def speed_ratio(dense: Sequence[float], pruned: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast, from measurements in turn: geometric mean of the rounds' ratios with its 95 % interval (Student's t on logs).

    Args:
        dense, pruned: tokens per second of each round, at least two.

    Raises:
        InputError: fewer than two rounds, or not as many of each.
    """
    if len(dense) != len(pruned) or len(dense) < 2:
        raise InputError("The speeds cannot be compared", "an interval needs two rounds or more of both", "measure again")
    logs = np.log(np.asarray(pruned, dtype=np.float64) / np.asarray(dense, dtype=np.float64))
    reach = student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return tuple(float(v) for v in np.exp([logs.mean(), logs.mean() - reach, logs.mean() + reach]))

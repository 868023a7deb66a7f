"""What a mask keeps, counted: per matrix, head, row and column."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from dpruner.masks import Scores, as_rows
from dpruner.model import heads_of, prunable_linears, stored_transposed

PARTS = pd.CategoricalDtype(["column", "head", "matrix", "row"])


def matrix_stats(model: nn.Module, masks: Mapping[str, torch.Tensor], scores: Scores | None = None) -> pd.DataFrame:
    """Counts of every matrix and of its parts.

    Args:
        masks: {full parameter name: BoolTensor as stored, True = kept}.
        scores: what the mask was made from, if it is known.

    Returns:
        One row per matrix and part: matrix, part ("matrix", "row", "column", "head"; in the (out, in) sense), index of the part (0 for the
        matrix), weights, kept, and mean score (NaN where unknown). Names are categories: a large model has millions of rows.
    """
    heads, linears = heads_of(model), prunable_linears(model)
    matrices, tables = pd.CategoricalDtype(sorted(linears)), []
    for name, module in linears.items():
        transposed = stored_transposed(module)
        kept = as_rows(masks[name], transposed).cpu().numpy()
        score = as_rows(scores[name], transposed).double().cpu().numpy() if scores is not None else np.full(kept.shape, np.nan, dtype=np.float32)
        tables.append(_part(name, matrices, "matrix", kept.reshape(1, -1), score.reshape(1, -1)))
        tables.append(_part(name, matrices, "row", kept, score))
        tables.append(_part(name, matrices, "column", kept.T, score.T))
        if name in heads:
            axis, size = heads[name]
            flat = (kept, score) if axis == "row" else (kept.T, score.T)
            tables.append(_part(name, matrices, "head", *(a.reshape(a.shape[0] // size, -1) for a in flat)))
    return pd.concat(tables, ignore_index=True)


def in_parts(stats: pd.DataFrame, **names: tuple[str, Sequence[str]]) -> pd.DataFrame:
    """The counts of one of several masks, each kind of part together: a large model's millions of rows are then read a part at a time.

    Args:
        stats: of `matrix_stats`.
        names: columns to add, as column=(name, all names that the masks have there).
    """
    named = {column: _always(name, pd.CategoricalDtype(sorted(known)), len(stats)) for column, (name, known) in names.items()}
    return stats.astype({"matrix": "category", "part": PARTS}).sort_values("part", kind="stable", ignore_index=True).assign(**named)


def _always(name: str, names: pd.CategoricalDtype, count: int) -> pd.Categorical:
    """One of some names, so many times."""
    return pd.Categorical.from_codes(np.full(count, names.categories.get_loc(name)), dtype=names)


def _part(name: str, matrices: pd.CategoricalDtype, part: str, kept: np.ndarray, score: np.ndarray) -> pd.DataFrame:
    """One row for each row of `kept` (parts, weights)."""
    return pd.DataFrame({"matrix": _always(name, matrices, len(kept)), "part": _always(part, PARTS, len(kept)),
                         "index": np.arange(len(kept), dtype=np.int32), "weights": np.int64(kept.shape[1]),
                         "kept": kept.sum(1), "score": score.mean(1).astype(np.float32)})

"""The matrices of a model: what their names say, sums over modules and blocks, and reading them from a run one at a time."""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dpruner.errors import InputError
from dpruner.store import opened

GROUPINGS = ("matrix", "module", "block", "model")
WHOLE_MODEL = "model"


def split_name(name: str) -> tuple[int, str]:
    """Block and module that a full parameter name speaks of, by structure: the first whole number in it is the block.

    `model.layers.3.mlp.up_proj.weight` is `(3, "mlp.up_proj")`, `transformer.h.0.attn.c_attn.weight` is `(0, "attn.c_attn")`.

    Raises:
        InputError: there is no number in the name, or nothing behind it.
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    module = ".".join(parts[at + 1:]).removesuffix(".weight") if at is not None else ""
    if module in ("", "weight"):
        raise InputError(f"The matrix {name!r} has no place in the model",
                         "its name does not say which block and which module it belongs to",
                         "give full parameter names such as model.layers.3.mlp.up_proj.weight")
    return int(parts[at]), module


def places(names: Collection[str]) -> pd.DataFrame:
    """Columns matrix, block, module: one row for each name, in the order given."""
    found = [split_name(n) for n in names]
    return pd.DataFrame({"matrix": list(names), "block": np.array([b for b, _ in found], dtype=np.int64), "module": [m for _, m in found]})


def in_order(names: Collection[str]) -> list[str]:
    """Names by block (2 before 10), inside a block in the order given."""
    return sorted(names, key=lambda n: split_name(n)[0])


def group_of(name: str, by: str) -> str | int:
    """The group a matrix counts to: its own name, its module, its block (a whole number), or "model".

    Raises:
        InputError: `by` is none of GROUPINGS.
    """
    if by not in GROUPINGS:
        raise InputError(f"Matrices cannot be grouped by {by!r}", "there are four groupings", f"choose one of {', '.join(GROUPINGS)}")
    if by == "matrix":
        return name
    if by == "model":
        return WHOLE_MODEL
    block, module = split_name(name)
    return block if by == "block" else module


def groups(names: Sequence[str], by: str) -> dict[str | int, list[str]]:
    """{group: its matrices}; blocks in their order, modules in the order of their first matrix."""
    found = {}
    for name in in_order(names):
        found.setdefault(group_of(name, by), []).append(name)
    return found


def summed(values: Mapping[str, np.ndarray], by: str) -> dict[str | int, np.ndarray]:
    """Sums of counts over the matrices of every group.

    Args:
        values: {matrix: counts}, all of one shape; no sum may pass 2⁶³.

    Returns:
        {group: int64 array of that shape}.
    """
    return {group: np.sum([values[n] for n in members], axis=0, dtype=np.int64) for group, members in groups(list(values), by).items()}


def layers_by_modules(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column of a table as blocks (rows, ascending) times modules (in the order of their first row); NaN where a block lacks a module.

    Args:
        table: columns block, module and `column`, one row for each matrix.
    """
    wide = table.pivot(index="block", columns="module", values=column)
    return wide[list(dict.fromkeys(table["module"]))].sort_index()


def as_array(values, transposed: bool = False) -> np.ndarray:
    """A view (out, in) of a tensor or array shaped as the model stores the weight."""
    array = np.asarray(values)
    return array.T if transposed else array


# ---- from files


def mask_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{matrix: shape as stored} of a mask file, in the order of the model.

    Raises:
        InputError: the file is missing, damaged, or no mask file.
    """
    with opened(Path(path)) as file:
        try:
            shapes = {n: tuple(int(d) for d in shape) for n, shape in json.loads((file.metadata() or {})["shapes"]).items()}
            packed = {n: tuple(file.get_slice(n).get_shape()) for n in shapes}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _no_masks(path) from error
    if set(packed) != set(shapes) or any(packed[n] != (*s[:-1], math.ceil(s[-1] / 8)) for n, s in shapes.items()):
        raise _no_masks(path)
    return shapes


def rank_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{matrix: shape as stored} of a file of ranks, by block.

    Raises:
        InputError: the file is missing or damaged, or holds anything but bytes.
    """
    with opened(Path(path)) as file:
        slices = {n: file.get_slice(n) for n in file.keys()}
        if any(s.get_dtype() != "U8" for s in slices.values()):
            raise InputError(f"The file {path} cannot be read as ranks", "it holds something other than bytes",
                             "give a file of a run's folder ranks/")
        return {n: tuple(slices[n].get_shape()) for n in in_order(slices)}


def require_same(shapes: Sequence[Mapping[str, tuple[int, ...]]], paths: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes that all files share.

    Raises:
        InputError: two files speak of different matrices.
    """
    for other, path in zip(shapes[1:], paths[1:], strict=True):
        if dict(other) != dict(shapes[0]):
            raise InputError(f"{path} and {paths[0]} cannot be compared", "they hold matrices of different names or shapes",
                             "choose masks of one and the same model")
    return dict(shapes[0])


def stream(paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The tensors of several files, matrix by matrix, as arrays that must not be written to.

    Args:
        paths: safetensors files that all hold the matrices.
        names: which matrices, in what order; default those of the first file, by block.

    Yields:
        (name, one array for each file).

    Raises:
        InputError: a file is missing or damaged, or lacks a matrix.
    """
    if names is None:
        with opened(Path(paths[0])) as file:
            names = in_order(file.keys())
    for name in names:
        with contextlib.ExitStack() as stack:   # opened anew for every matrix: the pages a file maps count as memory until it is closed
            arrays = [stack.enter_context(opened(Path(p))).get_tensor(name).numpy() for p in paths]
        yield name, arrays


def rank_matrices(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 ranks as stored) of a file of ranks, one matrix in memory at a time."""
    for name, (ranks,) in stream([path], names):
        yield name, ranks


def read_ranks(path: Path, name: str, rows: slice = slice(None), columns: slice = slice(None), transposed: bool = False) -> np.ndarray:
    """A rectangle of a matrix of ranks, without reading the rest.

    Args:
        rows, columns: without a step, in the (out, in) sense.
        transposed: the weight is stored as (in, out).

    Returns:
        uint8 (rows, columns).

    Raises:
        InputError: the file is missing or damaged, or holds no such matrix.
    """
    first, second = (columns, rows) if transposed else (rows, columns)
    with opened(Path(path)) as file:
        return as_array(file.get_slice(name)[first, second].numpy(), transposed)


def read_mask(path: Path, name: str, rows: slice = slice(None), columns: slice = slice(None), transposed: bool = False) -> np.ndarray:
    """A rectangle of a packed mask, without reading the rest; arguments as for `read_ranks`.

    Returns:
        bool (rows, columns), True = kept.
    """
    shape = mask_shapes(path).get(name)
    if shape is None:
        raise _no_masks(path)
    first, second = (columns, rows) if transposed else (rows, columns)
    start, stop, _ = second.indices(shape[-1])
    if stop <= start:
        raise InputError(f"Nothing of {name} was asked for", f"columns {start} to {stop} are empty", "choose a range inside the matrix")
    with opened(Path(path)) as file:
        bits = file.get_slice(name)[first, start // 8:math.ceil(stop / 8)].numpy()
    mask = np.unpackbits(bits, axis=-1, bitorder="little")[..., start % 8:start % 8 + stop - start].astype(bool)
    return as_array(mask, transposed)


def _no_masks(path: Path) -> InputError:
    return InputError(f"The file {path} cannot be read as masks", "it is damaged or of another format",
                      "give a file of a run's folder masks/")

"""A whole matrix at a glance: what one or two masks keep of it, counted in a grid of near-equal rectangles."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.matrices import mask_shapes, stream
from analysis.overlap import Regions
from analysis.sparsity import at_least, threshold

CELLS = 64   # rectangles a side, at most


class Glance(NamedTuple):
    """Counts of one or two masks in a grid.

    Attributes:
        kept: int64 (masks, a, b), the weights each keeps in every rectangle.
        differ: int64 (a, b), the weights on which they do not agree; of one mask all 0.
        rows, columns: int64 (a + 1,) and (b + 1,), the edges of the rectangles.
    """

    kept: np.ndarray
    differ: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def shares(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(float64 (a, b) counts as shares of the rectangles' weights, rows, columns): what `analysis.tiles.mask_overview` draws."""
        return counts / np.outer(np.diff(self.rows), np.diff(self.columns)), self.rows, self.columns

    @property
    def regions(self) -> Regions:
        """Who keeps how many weights of the whole matrix; of two masks."""
        a, b, differ = (int(counts.sum()) for counts in (*self.kept, self.differ))
        both = (a + b - differ) // 2
        return Regions(both, a - both, b - both, int(self.rows[-1] * self.columns[-1]) - both - differ)


def glance(shape: tuple[int, int], band: Callable[[slice], Sequence[np.ndarray]], cells: int = CELLS) -> Glance:
    """Counts masks that are read row band by row band, so that a band is counted while the processor's cache holds it.

    Args:
        shape: rows and columns of the matrix.
        band: gives the rows of a slice of every mask, one or two, bool or 0/1 bytes (rows, columns).
        cells: at most so many rectangles a side.
    """
    rows, columns = (np.linspace(0, n, min(cells, n) + 1).astype(np.int64) for n in shape)
    found = []
    for start, stop in itertools.pairwise(rows):
        masks = [np.asarray(m).view(np.uint8) for m in band(slice(start, stop))]
        differ = masks[0] ^ masks[-1]   # of one mask: nothing
        found.append([np.add.reduceat(_column_sums(bits), columns[:-1]) for bits in (*masks, differ)])
    *kept, differ = np.moveaxis(np.array(found), 1, 0)
    return Glance(np.array(kept), differ, rows, columns)


def _column_sums(bits: np.ndarray) -> np.ndarray:
    """int64 (columns,); a byte holds the sum of 255 rows, and bytes are added many at a time."""
    return sum(bits[at:at + 255].sum(0, dtype=np.uint8).astype(np.int64) for at in range(0, len(bits), 255))


def cell_shares(flags, cells: int = CELLS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The share of weights that are True in every rectangle of bool (rows, columns), and the rectangles' edges, as `Glance.shares`."""
    flags = np.asarray(flags)
    found = glance(flags.shape, lambda rows: [flags[rows]], cells)
    return found.shares(found.kept[0])


def read_glance(paths: Sequence[Path], name: str, sparsity: float | None, transposed: bool = False) -> Glance:
    """Counts one or two masks of a matrix from their files, each read once and never whole.

    Args:
        paths: files of masks, or of ranks.
        sparsity: at which ranks are cut; None for files of masks.
        transposed: the weight is stored as (in, out).

    Raises:
        InputError: a file is missing or damaged, or holds no such matrix.
    """
    _, stored = next(stream(paths, [name]))
    shape = stored[0].shape if sparsity is not None else mask_shapes(paths[0])[name]
    cut = (partial(np.unpackbits, axis=-1, count=shape[-1], bitorder="little") if sparsity is None else
           partial(at_least, lowest=threshold(sparsity)))
    found = glance(shape, lambda rows: [cut(array[rows]) for array in stored])
    return Glance(found.kept.swapaxes(1, 2), found.differ.T, found.columns, found.rows) if transposed else found

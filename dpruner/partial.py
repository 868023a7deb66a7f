"""What an unfinished run has so far, on disk: a run that was killed at any moment goes on from there, with the same bits."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import torch

from dpruner import store
from dpruner.errors import InputError

SHARE = 0.05   # of a stage's time that may go into saving its state


class Checkpoint:
    """The state of one stage: tensors that every save replaces, and tensors that are final once they are there.

    Saves are as far apart as makes them cost no more than SHARE of the time, so that a small model is saved often and a large one seldom.
    What cannot be written, because the disk is full, is not saved: the stage itself goes on.

    Args:
        folder: of this stage alone, made at the first save; None saves nothing.
    """

    STATE = "state"

    def __init__(self, folder: Path | None = None):
        self.folder, self.last, self.cost = folder, time.monotonic(), 0.0
        self.pending: dict[str, torch.Tensor] = {}
        self.final: list[str] = []   # the files of what is final

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """(steps done, all saved tensors); (0, {}) where nothing was saved or a file is damaged."""
        if self.folder is None or not (path := self._path(self.STATE)).is_file():
            return 0, {}
        try:
            with store.opened(path) as file:
                about = file.metadata() or {}
            # what a save that was cut short has added to them is not among them, and will be made again
            step, self.final = int(about["step"]), json.loads(about["final"])
            return step, {n: t for name in (*self.final, self.STATE) for n, t in store.read_tensors(self._path(name)).items()}
        except (InputError, KeyError, ValueError):
            self.clear()
            self.final = []
            return 0, {}

    def offer(self, step: int, state: Callable[[], Mapping[str, torch.Tensor]], final: Mapping[str, torch.Tensor] | None = None) -> None:
        """Save, if it is time to.

        Args:
            step: how many steps are done.
            state: gives what the next step starts from.
            final: what this step has made and no later one changes.
        """
        if self.folder is None:
            return
        self.pending |= final or {}
        if time.monotonic() - self.last < self.cost / SHARE:
            return
        began = time.monotonic()
        with contextlib.suppress(OSError, InputError):
            if self.pending:
                name = f"final-{step:08d}"
                store.write_tensors(self._path(name), self.pending)
                self.final, self.pending = [*self.final, name], {}
            store.write_tensors(self._path(self.STATE), state(), {"step": str(step), "final": json.dumps(self.final)})
        self.last = time.monotonic()
        self.cost = self.last - began

    def part(self, number: int) -> "Checkpoint":
        """The state of one of several passes of the stage."""
        return Checkpoint(self.folder and self.folder / f"pass {number}")

    def clear(self) -> None:
        """The stage's result is safe elsewhere."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


NOTHING = Checkpoint()   # for whoever does not want to go on later


class Partial:
    """The folder `partial/` of a run: a table for every finished piece, checkpoints of what is not finished; gone when the run is done.

    Args:
        folder: of the run.
        skipped: called with the name of every piece that was finished before.
    """

    BESIDE = ("stats", "losses")   # what a piece puts aside besides its own table

    def __init__(self, folder: Path, skipped: Callable[[str], None] = lambda piece: None):
        self.folder, self.skipped = folder / "partial", skipped
        self.drop_damaged()

    def drop_damaged(self) -> None:
        """Throw away tables that cannot be read or whose mask is lost, and the pieces they belong to: they are made again."""
        for path in self.folder.glob("*.parquet"):
            try:
                store.read_table(path)
            except InputError:
                path.unlink(missing_ok=True)
                what, _, piece = path.stem.partition(" of ")
                if what in self.BESIDE:
                    self._path(piece).unlink(missing_ok=True)
        for path in self.folder.glob("stats of *.parquet"):   # as in a copy that was made while the run went on
            piece = path.stem.removeprefix("stats of ")
            if not store.whole(self.folder.parent / "masks" / f"{piece}.safetensors"):
                self._path(piece).unlink(missing_ok=True)

    def table(self, piece: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table of a piece of the run: as it was found before, or computed and kept."""
        path = self._path(piece)
        if path.is_file():
            self.skipped(piece)
            return store.read_table(path)
        found = compute()
        store.write_table(path, found)
        return found

    def put(self, what: str, piece: str, table: pd.DataFrame) -> None:
        """Keep a table of BESIDE that a piece makes besides its own, before that piece is finished."""
        store.write_table(self._path(f"{what} of {piece}"), table)

    def has(self, what: str, piece: str) -> bool:
        """Whether a piece has put a table."""
        return self._path(f"{what} of {piece}").is_file()

    def get(self, what: str, piece: str) -> pd.DataFrame:
        """The table that a piece has put."""
        return store.read_table(self._path(f"{what} of {piece}"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"

    def checkpoint(self, stage: str) -> Checkpoint:
        """Of a stage that belongs to no other piece."""
        return Checkpoint(self.folder / stage)

    def clear(self) -> None:
        """The run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

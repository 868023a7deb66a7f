"""status.json: what a run is doing, how far it is, and how it ended."""

import contextlib
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from dpruner import memory, signals, turns
from dpruner.errors import InputError
from dpruner.store import Run, write_json

EVERY = 0.25   # seconds between two writes
GOING = ("queued", "running")   # states of a run whose process lives
PATIENCE = 10.0   # seconds a started process gets to be seen, and a cancelled one to end by itself
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your share of the disk is full", errno.EFBIG: "a file may not grow that large here"}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


def alive(status: dict) -> bool:
    """Whether the process that wrote a status still runs; one that was only just started has not written yet."""
    if status.get("pid") is None:
        return abs(time.time() - status.get("born", 0)) < PATIENCE
    return turns.lives(status)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While open, a process that is going to work in a folder writes so into its status, and no other one does.

    Raises:
        InputError: one that lives has written so before.
    """
    with FileLock(turns.root() / "claims.lock"):
        try:
            status = Run(folder).status if (folder / "status.json").is_file() else {}
        except InputError:   # damaged: it is written anew
            status = {}
        mine = turns.identity().items() <= status.items()
        if status.get("state") in GOING and alive(status) and not mine:
            raise InputError(f"{folder.name} is going on already", f"it is {status['state']}, and two at once would be in each other's way",
                             "wait for it, or cancel it")
        yield


def explained(error: BaseException, what: str, advice: Callable[[], str], folder: Path | None = None) -> InputError | None:
    """What a user can mend, in words; None for a fault of this program.

    Args:
        what: went wrong: "The run".
        advice: gives what to do where memory runs out.
        folder: what was written to, where that is known.
    """
    if isinstance(error, KeyboardInterrupt) and isinstance(error.__cause__, InputError):
        return error.__cause__
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError) and error.errno in FULL:
        where = folder or error.filename
        return InputError(f"{what} could not write" + (f" to {where}" if where else ""), FULL[error.errno], "free some space and resume it" if folder
                          else "free some space and start it again")
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        return InputError(f"{what} could not write {str(error.filename)!r}", str(error.strerror).lower(), "mend it, or name another folder")
    if memory.ran_out(error):
        return InputError(f"{what} needs more memory than there is", str(error).splitlines()[0].rstrip(".") if str(error) else "out of memory", advice())
    return None


class Status:
    """Keeps status.json true: queued until a run is in its `with`, running in it, then done, failed or cancelled.

    Args:
        folder: of the run.
        watch: called with this object after every step.
        fresh: the folder is new and holds settings at most: where no status can be written it goes. Any other is claimed at once.

    Attributes:
        plan: [(stage, cost, piece)] in the order the stages come; costs in any unit, for the share done and the time left; a piece is what
            `skip` passes over together.
        about: what the current stage works on, for people to read.
        advice: gives what to do where memory runs out.
        stage, done, total: the current stage and how many of its steps are done.

    Raises:
        InputError: the folder is in another process's hands, or cannot be written to.
    """

    def __init__(self, folder: Path, watch: Callable[["Status"], None] | None = None, fresh: bool = False):
        self.folder, self.path, self.plan, self.watch = folder, folder / "status.json", [], watch
        self.place: dict = {}   # in the queue of a device, while it waits there
        self.fresh, self.over = fresh, False   # whether its end is told
        self.at, self.began, self.written = -1, time.monotonic(), float("-inf")
        self.given = 0.0   # share of the work that an earlier process has done
        self.about, self.advice = "", lambda: f"free some memory, or let it go on with a limit: resume {self.folder.name} --memory …"
        self.stage, self.done, self.total = "starting", 0, 1
        self.record = next((folder / name for name in ("run.json", "experiment.json") if (folder / name).is_file()), folder)
        if not fresh:
            with claimed(folder):
                self._begin("queued")

    def queue(self, device: object, ahead: int) -> bool:
        """The run waits.

        Args:
            device: what it waits for.
            ahead: how many are before it.

        Returns:
            Whether that is news.
        """
        place = {"device": str(device), "ahead": ahead}
        if place == self.place:
            return False
        self.stage, self.place = "waiting for the device", place
        self._begin("queued")
        return True

    def __enter__(self) -> "Status":
        self.began, self.stage, self.place = time.monotonic(), "loading model and text", {}
        self._begin("running")
        return self

    def _begin(self, state: str) -> None:
        try:
            self._write(state)
            self.fresh = False
        except OSError as error:
            if self.fresh:
                self.over = True
                shutil.rmtree(self.folder, ignore_errors=True)
            raise explained(error, "The run", self.advice, self.folder) or error

    def __exit__(self, kind, error, trace) -> None:
        if self.over:   # an outer `with` of the same
            return
        self.over = True
        if not self.record.exists():   # what was written since would look like a run
            shutil.rmtree(self.folder, ignore_errors=True)
        if error is None:
            self._write("done")
            return
        problem = explained(error, "The run", self.advice, self.folder)
        cancelled = isinstance(error, KeyboardInterrupt) and problem is None
        said = problem or InputError(f"The run stopped in the stage {self.stage!r}", f"{kind.__name__}: {error}".rstrip(".: "),
                                     "report it with its settings")
        with contextlib.suppress(OSError):   # the disk that failed the run may fail its status too; the error still reaches the caller
            self._write("cancelled" if cancelled else "failed", None if cancelled else
                        {"what": said.what, "why": said.why, "what to do": said.fix})
        if problem is not None and problem is not error:
            raise problem from error

    def step(self, stage: str, done: int, total: int) -> None:
        """Some steps of a stage are done. After `done` = 0 and after the last step the plan moves on to its next stage of that name.

        A stage that does not begin at 0 goes on from where an earlier process left it.
        """
        begins = done == 0 or self.done >= self.total
        if begins:
            before = self.share
            self.at = next((i for i in range(self.at + 1, len(self.plan)) if self.plan[i][0] == stage), self.at)
        self.stage, self.done, self.total, self.place = stage, done, total, {}
        if begins and done:
            self.given += self.share - before
        if not self.record.exists():
            raise InputError(f"The run {self.folder.name} cannot go on", "its folder was deleted", "start a new one")
        if self.watch:
            self.watch(self)
        if time.monotonic() - self.written >= EVERY:
            self._write("running")

    def skip(self, piece: str) -> None:
        """All stages of a piece, and those before it, were done by an earlier process."""
        before = self.share
        self.at = max((i for i, planned in enumerate(self.plan) if planned[2] == piece), default=self.at)
        self.stage, self.done, self.total = self.plan[self.at][0] if self.at >= 0 else self.stage, 1, 1
        self.given += max(0.0, self.share - before)

    def between(self, stage: str) -> None:
        """A stage of the plan is done, and something short comes before the next one."""
        self.stage, self.done, self.total = stage, 1, 1
        self._write("running")

    @property
    def share(self) -> float:
        """Share of the planned work that is done, 0..1."""
        cost = [c for _, c, _ in self.plan]
        if self.at < 0 or not sum(cost):
            return 0.0
        return (sum(cost[:self.at]) + cost[self.at] * self.done / max(self.total, 1)) / sum(cost)

    @property
    def eta(self) -> float | None:
        """Seconds left at the pace so far; None before there is a pace."""
        worked = self.share - self.given
        return (time.monotonic() - self.began) * (1 - self.share) / worked if worked > 0 else None

    def _write(self, state: str, error: dict | None = None) -> None:
        over = state == "done"
        if not self.record.exists():
            return
        write_json(self.path, {"state": state, "stage": self.stage, "about": self.about, "done": self.done, "total": self.total,
                               "progress": 1.0 if over else round(self.share, 4),
                               "eta_seconds": 0.0 if over else self.eta and round(self.eta, 1),
                               "elapsed_seconds": round(time.monotonic() - self.began, 1), "error": error, **self.place,
                               "asked_by": signals.asked_by(), **turns.identity()})
        self.written = time.monotonic()

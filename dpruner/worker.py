"""One run as its own process: a queue per device, progress and the end in status.json, cancelling.

The process outlives whoever asked for it. All that is known of a job lies in its run folder, so any page, shell or notebook finds it again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from dpruner import store
from dpruner.config import RunConfig
from dpruner.errors import InputError
from dpruner.status import Status, identity
from dpruner.store import Run

POLL = 0.3        # seconds between two looks at the queue
PATIENCE = 10.0   # seconds a cancelled process gets to end by itself, and a started one to be seen
LOG = "log.txt"
WAITING = {"state": "queued", "stage": "starting", "about": "", "done": 0, "total": 1, "progress": 0.0, "eta_seconds": None,
           "elapsed_seconds": 0.0, "error": None}
DIED = {"what": "The run stopped in the middle", "why": "its process ended without a word, killed or out of memory",
        "what to do": "start it again, with less memory in use or a smaller model if it ends so once more"}

_children: list[subprocess.Popen] = []   # kept to be reaped: a child that nobody waits for still looks alive


def submit(config: RunConfig, runs: str | Path = "runs", cache: str | Path = "cache") -> Run:
    """Put a run into the queue of its device and return at once.

    Args:
        config: what to do; checked here.
        runs, cache: as `pipeline.run` takes them.

    Returns:
        The run, queued.

    Raises:
        InputError: a setting cannot work, or no folder can be made.
    """
    config.check()
    run = store.new_run(runs, config.title)
    store.write_json(run.folder / "run.json", {"config": config.to_dict(), "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    store.write_json(run.folder / "status.json", {**WAITING, "pid": None, "born": time.time()})
    package = str(Path(__file__).parents[1])   # the process must find this package from wherever the paths in the config are meant
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # threads that wait for each other spin far shorter than by default: the browser and the server want the processors too
    environment = {"GOMP_SPINCOUNT": "3000", **os.environ, "PYTHONPATH": path}
    with open(run.folder / LOG, "ab") as log:   # a pipe that nobody reads would stall the job once it is full
        _children.append(subprocess.Popen([sys.executable, "-m", "dpruner.worker", str(run.folder), str(cache)], stdin=subprocess.DEVNULL,
                                          stdout=log, stderr=log, start_new_session=True, env=environment))
    return run


def state(run: Run) -> dict:
    """status.json as it is true now: a run whose process is gone has failed, and is told so from then on.

    Raises:
        InputError: the run folder is gone or its status is damaged.
    """
    _children[:] = [child for child in _children if child.poll() is None]
    status = run.status
    if status["state"] in ("queued", "running") and not _alive(status):
        status = run.status   # it may have ended between the two looks
        if status["state"] in ("queued", "running"):
            status = {**status, "state": "failed", "error": DIED}
            with contextlib.suppress(OSError):
                store.write_json(run.folder / "status.json", status)
    return status


def _alive(status: dict) -> bool:
    """Whether the process that wrote a status still runs; one that was only just started has not written yet."""
    if status.get("pid") is None:
        return time.time() - status.get("born", 0) < 3 * PATIENCE
    try:
        process = psutil.Process(status["pid"])
        # a pid is given out again after a restart of the machine: the process must be as old as the status says
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - status.get("pid_born", process.create_time())) < 2
    except psutil.NoSuchProcess:
        return False


def cancel(run: Run) -> None:
    """End a queued or running run: ask, wait a little, then insist. Its finished files stay."""
    status = state(run)
    if status["state"] not in ("queued", "running"):
        return
    deadline = time.time() + PATIENCE
    while status["pid"] is None and time.time() < deadline:   # just submitted: its process is still starting
        time.sleep(POLL)
        status = state(run)
    with contextlib.suppress(psutil.NoSuchProcess, TypeError):
        process = psutil.Process(status["pid"])
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=PATIENCE)
        for stubborn in left:
            stubborn.kill()
    if run.status["state"] in ("queued", "running"):
        store.write_json(run.folder / "status.json", {**run.status, "state": "cancelled"})


@contextlib.contextmanager
def turn(folder: Path, device: str, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold a device for one run; the runs that came first go first.

    Args:
        folder: of the run; its neighbours are the queue.
        device: such as "cpu" or "cuda:0".
        waiting: called with how many runs are ahead, again and again until it is this one's turn.
    """
    born = Run(folder).status["born"]
    lock = FileLock(folder.parent / f".{device.replace(':', '-')}.lock")
    while True:
        ahead = [r for r in store.find_runs(folder.parent) if r.id != folder.name and _waits_for(r, device, before=born)]
        if not ahead:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                break
        waiting(max(1, len(ahead)))
        time.sleep(POLL)
    try:
        yield
    finally:
        lock.release()


def _waits_for(run: Run, device: str, before: float) -> bool:
    try:
        status = state(run)
    except InputError:   # deleted or damaged meanwhile: nobody has to wait for it
        return False
    return status["state"] == "queued" and status.get("device", device) == device and status["born"] < before


def work(folder: Path, cache: Path) -> None:
    """The job's own process: wait for the device, then run."""
    from dpruner import pipeline   # torch and transformers: seconds in which the status already tells that the job lives
    from dpruner.loading import pick_device
    run = Run(folder)
    config = RunConfig.from_dict(run.config)
    try:
        device = str(pick_device(config.device))
    except InputError as error:
        with Status(folder):
            raise error

    def waiting(ahead: int) -> None:
        store.write_json(folder / "status.json", {**run.status, "stage": "waiting for the device", "device": device, "ahead": ahead})

    try:
        with turn(folder, device, waiting):
            pipeline.run(config, folder=folder, cache=cache)
    except KeyboardInterrupt:
        if run.status["state"] not in ("cancelled", "done"):
            store.write_json(folder / "status.json", {**run.status, "state": "cancelled"})
        raise


def main() -> int:
    """`python -m dpruner.worker FOLDER CACHE`; what goes wrong stands in status.json, and in the log for developers."""
    folder, cache = map(Path, sys.argv[1:3])
    store.write_json(folder / "status.json", {**Run(folder).status, **identity()})
    try:
        from dpruner.loading import quiet_libraries
        with quiet_libraries():
            work(folder, cache)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

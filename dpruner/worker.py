"""One run as its own process: progress and the end in status.json, waiting its turn, cancelling, going on.

The process outlives whoever asked for it. All that is known of a job lies in its run folder, so any page, shell or notebook finds it again.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from dpruner import signals, store, turns
from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.loading import pick_device
from dpruner.memory import available_memory, parse_size
from dpruner.status import GOING, PATIENCE, alive, claimed
from dpruner.store import WAITING, Run
from dpruner.units import size

if TYPE_CHECKING:   # it imports everything, which a starting page need not wait for
    from dpruner.experiments import Experiment

LOG = "log.txt"
OVER = ("failed", "cancelled")   # states from which a run can go on

_children: dict[int, subprocess.Popen] = {}   # kept to be reaped, as one that nobody waits for looks alive, and to know how it ended


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
    pick_device(config.device)
    run = store.new_run(runs, config.title, config.to_dict())
    start(run, ["dpruner.worker", str(run.folder), str(cache)], config.device)
    return run


def submit_experiment(experiment: "Experiment", cache: str | Path = "cache") -> None:
    """Put an experiment into the queue of its device, new or to go on; `state` and `cancel` take it like a run.

    Raises:
        InputError: it is going on already, its files are not what they were, or its settings do not work here.
    """
    config = RunConfig.from_dict(experiment.config)
    if (experiment.folder / "status.json").is_file() and state(experiment)["state"] in GOING:
        raise InputError(f"The experiment {experiment.id} is going on already", "it has not ended yet", "wait for it, or cancel it")
    experiment.require_same_files()
    pick_device(config.device)
    start(experiment, ["dpruner.worker", str(experiment.folder), str(cache)], config.device)


def resume(run: Run, cache: str | Path = "cache", memory: str | None = None) -> None:
    """Put a run that failed, was cancelled or has lost files into the queue again: it goes on from what it has.

    Args:
        memory: a new limit for it, which changes no bit; default the one it has.

    Raises:
        InputError: it is done, still going, damaged, or its settings do not work here any more; or the limit cannot be kept.
    """
    config = to_go_on(run, memory)
    if memory is not None:
        store.write_json(run.folder / "run.json", {**run.record, "config": config.to_dict()})
    start(run, ["dpruner.worker", str(run.folder), str(cache)], config.device)


def to_go_on(run: Run, memory: str | None = None) -> RunConfig:
    """The settings of a run that failed or was cancelled, or whose files are damaged: then it is one that has not ended from now on.

    Args:
        memory: as `resume` takes it.

    Raises:
        InputError: as `resume`.
    """
    status = state(run)
    lost = damaged_files(run) if status["state"] == "done" else []
    if status["state"] not in OVER and not lost:
        raise InputError(f"The run {run.id} cannot go on", f"it is {status['state']}" + (" and whole" if status["state"] == "done" else ""),
                         "choose one that failed, was cancelled or has lost files")
    run.require_own_files()
    config = RunConfig.from_dict(run.config)
    if memory is not None:
        config = dataclasses.replace(config, memory=memory)
    config.check()
    pick_device(config.device)
    if memory is not None:
        from dpruner import estimate   # it imports everything
        estimate.plan_of(config)
    if lost:
        (run.folder / store.LAST).unlink(missing_ok=True)
    return config


def damaged_files(run: Run) -> list[str]:
    """Files of a finished run that are missing or cannot be read, by their paths in its folder; they are opened, not read to their end.

    Raises:
        InputError: run.json is missing or damaged.
    """
    config = run.config
    tensors = {*(run.path("masks", method, split_domain(d)[0]) for method in config["methods"] for d in config["domains"]),
               *run.folder.glob("*/*@*.safetensors")}
    files = [*tensors, *(run.folder / name for name in store.TABLES)]
    return sorted(str(path.relative_to(run.folder)) for path in files if not store.whole(path))


def start(run: Run, module: list[str], device: str | None) -> None:
    """The process of a run, with its place in the queue of its device.

    Args:
        module: what the process is, as `python -m` takes it, with its arguments; it calls `process`.

    Raises:
        InputError: it is going on already.
    """
    status = {**WAITING, "pid": None, "born": time.time(), "asked_by": "SIGTERM"}   # which it hears from its first moment
    with claimed(run.folder):
        store.write_json(run.folder / "status.json", status)
    package = str(Path(__file__).parents[1])   # the process must find this package from wherever the paths in the config are meant
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # threads that wait for each other spin far shorter than by default: the browser and the server want the processors too
    environment = {"GOMP_SPINCOUNT": "3000", **os.environ, "PYTHONPATH": path}
    with open(run.folder / LOG, "ab") as log:   # a pipe that nobody reads would stall the job once it is full
        child = subprocess.Popen([sys.executable, "-m", *module], stdin=subprocess.DEVNULL,
                                 stdout=log, stderr=log, start_new_session=True, env=environment)
    _children[child.pid] = child
    with contextlib.suppress(psutil.NoSuchProcess, OSError):   # it may die, or be cancelled, before it can write who it is
        store.write_json(run.folder / "status.json", {**status, **turns.identity(child.pid)})
        turns.take_ticket(pick_device(device), child.pid)   # taken here, so that runs go in the order they were asked for


def state(run: Run) -> dict:
    """status.json as it is true now: a run whose process is gone has failed, and is told so from then on.

    Raises:
        InputError: the run folder is gone or its status is damaged.
    """
    status = run.status
    if status["state"] in GOING and turns.elsewhere(status):
        return {**status, "state": "failed", "error": {
            "what": "The run cannot be seen from here", "why": f"it was {status['state']} on the machine {status['machine']!r}",
            "what to do": "look there; if it has ended, or this is a copy, resume it: what it has is kept"}}
    if status["state"] in GOING and not alive(status):
        status = run.status   # it may have ended between the two looks
        if status["state"] in GOING:
            status = {**status, "state": "failed", "error": died(run, _exit_code(status["pid"]), began=status["pid"] is not None)}
            with contextlib.suppress(OSError):
                store.write_json(run.folder / "status.json", status)
    for child in list(_children.values()):
        child.poll()
    return status


def _exit_code(pid: int | None) -> int | None:
    """How a process that is gone has ended, where this one started it; its last threads may take a moment to follow the first."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return _children[pid].wait(1) if pid in _children else None


def died(run: Run, code: int | None = None, began: bool = True) -> dict:
    """What is said of a run or an experiment whose process ended without a word.

    Args:
        code: its exit code, where it is known; negative for a signal.
        began: whether it had written who it is.
    """
    how = {None: "its process ended without a word, killed or out of memory or with the whole machine",
           -signal.SIGKILL: "its process was killed, by the system if memory ran out"}
    return {"what": "The run stopped in the middle" if began else "The run died before it began", "why": how.get(code, f"its process ended with code {code}"),
            "what to do": "resume it: what it has is kept" + _sparingly(run)}


def _sparingly(run: Run) -> str:
    """How to resume with a limit that is tighter than before: a run without one keeps to what is free."""
    try:
        config = RunConfig.from_dict(run.config)
        config.check()
        most = parse_size(config.memory) if config.memory else available_memory(str(pick_device(config.device)))
    except (InputError, RuntimeError):   # its settings are damaged or those of another machine, or its device is
        return ""
    limit = f"--memory {size(0.75 * most).replace('.0', '').replace(' ', '')}"
    how = f"the same command with {limit}" if is_experiment(run.folder) else f"`python -m dpruner resume {run.id} {limit}`"
    return f"; if it ends so once more, with a limit on its memory: {how}"


def cancel(run: Run) -> None:
    """End a queued or running run. What it has stays, and it can go on later."""
    status = state(run)
    if status["state"] not in GOING:
        return
    deadline = time.time() + PATIENCE
    while status["pid"] is None and time.time() < deadline:   # just submitted: its process is about to be
        time.sleep(turns.POLL)
        status = state(run)
    if status["pid"] is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            _end(run, psutil.Process(status["pid"]), getattr(signal, status.get("asked_by", "SIGINT")))
    if run.status["state"] in GOING:
        store.write_json(run.folder / "status.json", {**run.status, "state": "cancelled"})


def _end(run: Run, process: psutil.Process, number: int) -> None:
    """Ask a process to end its run, wait a little, then insist.

    What this process did not start may have other things to do, such as a notebook: it is left alone once its run has ended.

    Args:
        number: of the signal that it hears.
    """
    def to_end() -> bool:
        return process.pid in _children or run.status["state"] in GOING

    left, deadline = [process, *process.children(recursive=True)], time.time() + PATIENCE
    process.send_signal(number)
    while left and to_end() and time.time() < deadline:
        _, left = psutil.wait_procs(left, timeout=turns.POLL)
    if to_end():
        for stubborn in left:
            stubborn.kill()
        psutil.wait_procs(left, timeout=PATIENCE)


def is_experiment(folder: Path) -> bool:
    """Whether a folder is one of an experiment, not of a run."""
    return (folder / "experiment.json").is_file()


def work(folder: Path, cache: Path) -> None:
    """The job's own process: wait for the device, then run."""
    from dpruner import experiments, pipeline   # after the status tells that the job lives
    how = {"cache": cache, "waiting": lambda ahead: None}   # the status says it
    if is_experiment(folder):
        experiments.conduct(experiments.Experiment(folder), **how)
    else:
        pipeline.run(RunConfig.from_dict(Run(folder).config), folder=folder, **how)


def process(folder: Path, job: Callable[[], None]) -> int:
    """A job in this process; what goes wrong stands in status.json, and in the log for developers."""
    run = Run(folder)
    store.write_json(folder / "status.json", {**run.status, **turns.identity()})
    try:
        from dpruner.loading import quiet_libraries
        with signals.heard(), quiet_libraries():
            job()
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if run.status["state"] not in ("cancelled", "done"):
            store.write_json(folder / "status.json", {**run.status, "state": "cancelled"})
        print("Cancelled.", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """`python -m dpruner.worker FOLDER CACHE`."""
    folder, cache = map(Path, sys.argv[1:3])
    return process(folder, lambda: work(folder, cache))


if __name__ == "__main__":
    sys.exit(main())

"""The demonstration run: there is always something real to look at."""

from filelock import FileLock

from app import state
from dpruner import RunConfig, store, worker

CONFIG = RunConfig(domains=("healthcare", "legal", "finance"), methods=("dpruner", "magnitude", "random"), nsamples=16, eval_documents=2)


def ensure() -> None:
    """Start the demonstration where there is no run at all; two browsers that come at once start one."""
    if store.find_runs(state.RUNS):
        return
    state.RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(state.RUNS / ".demo.lock"):
        if not store.find_runs(state.RUNS):
            worker.submit(CONFIG, state.RUNS, state.CACHE)

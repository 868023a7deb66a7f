"""One run by several processes, on the CPU with gloo: the bits of one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import SMALL
from test_resume import content
from test_worker import WAIT, busy, gone, listening, wait_for  # noqa: F401 (a fixture among them)

from dpruner import RunConfig, pipeline, store, worker
from dpruner.store import Run

ROOT = Path(__file__).parents[1]
CASES = {   # between them every kind of work that is shared out
    "walk": {"methods": ("dpruner", "sparsegpt"), "compensate": "walk"},
    "static": {"methods": ("dpruner", "wanda"), "formula": "taylor", "general_mode": "static", "dtype": "float16"},
}
SAMPLES = {"nsamples": 17, "seqlen": 128}   # three passes of 8, 8 and 1 for a walk; 17 gradients


def torchrun(n: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "-m", "dpruner", *arguments], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)


def config_of(llama, **more) -> RunConfig:
    return RunConfig(model=str(llama), domains=("legal",), **SMALL | SAMPLES | {"device": "cpu", "evaluate": False} | more)


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """Runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    return {name: pipeline.run(config_of(llama, **case), runs=root / "runs", cache=root / "cache") for name, case in CASES.items()}


@pytest.mark.parametrize(("n", "name"), [(1, "walk"), (2, "walk"), (3, "walk"), (2, "static")])
def test_several_processes_end_with_the_bits_of_one(n, name, llama, tmp_path, alone):
    """In the last round of gradients one process is left without a batch, of the walk's passes one process of two has one more."""
    store.write_json(tmp_path / "config.json", config_of(llama, **CASES[name]).to_dict())
    done = torchrun(n, ["prune", "--config", "config.json", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / json.loads(done.stdout)["folder"])   # one process alone has spoken
    assert len(store.find_runs(tmp_path / "runs")) == 1 and run.record["device"]["processes"] == n
    found, wanted = content(run), content(alone[name])
    assert [f for f in {*found, *wanted} if found.get(f) != wanted.get(f)] == []


def test_what_is_wrong_is_said_once_and_nobody_is_left_waiting(llama, tmp_path):
    done = torchrun(2, ["prune", "--model", str(llama), "--domain", "no-such", "--device", "cpu"], tmp_path)
    assert done.returncode != 0 and done.stderr.count("The domain 'no-such' is not known") == 1


@pytest.fixture
def started(llama, tmp_path):
    """Start a run of two processes; gives torchrun, and their ids in their order. What is left at the end is ended."""
    begun = []

    def start(name):
        store.write_json(tmp_path / "config.json", config_of(llama, **CASES[name]).to_dict())
        begun.append(subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dpruner", "prune", "--config", "config.json"],
                                      cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
                                      preexec_fn=listening))
        run, = wait_for(lambda: store.find_runs(tmp_path / "runs"))
        return begun[0], run, sorted(child.pid for child in psutil.Process(begun[0].pid).children())

    yield start
    for process in begun:
        for each in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def test_a_shared_run_waits_for_its_turn_and_is_listed_and_cancelled_like_any(started, tmp_path, busy):
    torchrun, run, _ = started("walk")
    status = wait_for(lambda: (s := worker.state(run)).get("ahead") and s)
    assert (status["state"], status["ahead"], len(store.find_runs(tmp_path / "runs"))) == ("queued", 1, 1)
    worker.cancel(run)
    _, said = torchrun.communicate(timeout=WAIT)
    assert torchrun.returncode == 1 and run.status["state"] == "cancelled"
    assert said.count("Waiting for the device: 1 before it.") == said.count("Stopped: what it has finished is kept") == 1
    assert "unexpectedly" not in said


@pytest.mark.parametrize(("killed", "said"), [(0, "its process ended without a word"), (1, "one of its 2 processes has ended, killed or out of memory")])
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on_alone(killed, said, started, alone, tmp_path):
    torchrun, run, pids = started("walk")
    wait_for(lambda: run.status["state"] == "running")
    os.kill(pids[killed], signal.SIGKILL)
    _, printed = torchrun.communicate(timeout=WAIT)
    assert all(map(gone, pids)) and worker.state(run)["state"] == "failed" and worker.state(run)["error"]["why"].startswith(said)
    assert printed.count(f"The run stopped in the middle: {said}") == 1 and "unexpectedly" not in printed and "Stopped" not in printed
    pipeline.run(worker.to_go_on(run), folder=run.folder, cache=tmp_path / "cache")
    found, wanted = content(run), content(alone["walk"])
    assert [f for f in {*found, *wanted} if found.get(f) != wanted.get(f)] == []

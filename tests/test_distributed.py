"""One run by several processes, on the CPU with gloo: the masks of one process, but for ties that the order of sums decides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from dpruner import RunConfig, pipeline, store
from dpruner.store import Run

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-4   # of the decisions
CASES = {   # between them every kind of work that is shared out
    "static": {"methods": ("dpruner", "wanda"), "general_mode": "static"},
    "sequential": {"methods": ("dpruner", "sparsegpt"), "compensate": "walk"},
}


def torchrun(n: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "-m", "dpruner", *arguments], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def config_of(llama, **more) -> RunConfig:
    return RunConfig(model=str(llama), domains=("legal",), **SMALL | {"nsamples": 5, "device": "cpu", "evaluate": False} | more)


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """Runs of one process."""
    root = tmp_path_factory.mktemp("alone")
    return {name: pipeline.run(config_of(llama, **case), runs=root / "runs", cache=root / "cache") for name, case in CASES.items()}


def differing(a: Run, b: Run) -> float:
    """Share of all decisions that two runs took otherwise."""
    changed = [a.masks(*pair)[n] ^ mask for pair in b.pairs() for n, mask in b.masks(*pair).items()]
    return sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed)


@pytest.mark.parametrize(("n", "name"), [(1, "sequential"), (2, "sequential"), (3, "static")])
def test_several_processes_choose_what_one_does(n, name, llama, tmp_path, alone, one_thread):
    """Of five sequences two processes leave one without a batch in the last round, and three leave one of them."""
    store.write_json(tmp_path / "config.json", config_of(llama, **CASES[name]).to_dict())
    done = torchrun(n, ["prune", "--config", "config.json", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / json.loads(done.stdout)["folder"])   # one process alone has spoken
    assert len(store.find_runs(tmp_path / "runs")) == 1 and run.pairs() == alone[name].pairs()
    assert run.record["device"].get("processes", 1) == n
    assert differing(run, alone[name]) <= (TOLERANCE if n > 1 else 0)


def test_what_is_wrong_is_said_once_and_nobody_is_left_waiting(llama, tmp_path):
    done = torchrun(2, ["prune", "--model", str(llama), "--domain", "no-such", "--device", "cpu"], tmp_path)
    assert done.returncode != 0 and done.stderr.count("The domain 'no-such' is not known") == 1

"""One run by several processes, on the CPU with gloo: the bits of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from test_resume import content

from dpruner import RunConfig, pipeline, store
from dpruner.store import Run

ROOT = Path(__file__).parents[1]
CASES = {   # between them every kind of work that is shared out
    "walk": {"methods": ("dpruner", "sparsegpt"), "compensate": "walk"},
    "static": {"methods": ("dpruner", "wanda"), "formula": "taylor", "general_mode": "static", "dtype": "float16"},
}
SAMPLES = {"nsamples": 17, "seqlen": 128}   # three passes of 8, 8 and 1 for a walk; 17 gradients


def torchrun(n: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "-m", "dpruner", *arguments], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def config_of(llama, **more) -> RunConfig:
    return RunConfig(model=str(llama), domains=("legal",), **SMALL | SAMPLES | {"device": "cpu", "evaluate": False} | more)


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory):
    """Runs of one process, of one thread as those of torchrun."""
    root, before = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    found = {name: pipeline.run(config_of(llama, **case), runs=root / "runs", cache=root / "cache") for name, case in CASES.items()}
    torch.set_num_threads(before)
    return found


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

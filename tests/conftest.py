"""What several test files share: tiny models in folders, and one small finished run."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from families import tiny, tiny_tokenizer

from dpruner import RunConfig, pipeline, report, store

# tiny tensors are slower on several threads than on one, and much slower where the cores are busy; other numbers of threads, other last bits
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
settings.register_profile("hostile", max_examples=10_000)   # of `make hostile`

SMALL = {"nsamples": 4, "seqlen": 16, "eval_documents": 1, "eval_seqlen": 128}


def save(model, folder: Path, tokenizer=None) -> Path:
    """A model and a tokenizer that fits it, as a folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def queue(tmp_path_factory):
    """A queue of their own: the tests wait for nobody's runs, and nobody waits for theirs."""
    os.environ["DPRUNER_QUEUE"] = str(tmp_path_factory.mktemp("queue"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """Folder of a tiny llama, float32. Not to be written to."""
    return save(tiny("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def small(llama, tmp_path_factory) -> SimpleNamespace:
    """A finished run of two domains and three methods on the tiny llama. Not to be written to.

    Attributes:
        run, config: the Run, and the RunConfig it was asked for.
        runs, cache: the folders it wrote to.
        summary: what report.summary says of it.
        seen: (stage, share of the work done) at every step that was reported.
    """
    root = tmp_path_factory.mktemp("small")
    config = RunConfig(model=str(llama), domains=("healthcare", "legal"), methods=("dpruner", "magnitude", "random"), **SMALL)
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = pipeline.run(config, runs=root / "runs", cache=root / "cache", watch=lambda status: seen.append((status.stage, status.share)))
    torch.set_num_threads(before)
    return SimpleNamespace(run=run, config=config, runs=root / "runs", cache=root / "cache", summary=report.summary(run), seen=seen)


@pytest.fixture
def run(small, tmp_path, monkeypatch) -> store.Run:
    """A copy of the small run, the only one that the app sees."""
    from app import state
    shutil.copytree(small.runs, tmp_path / "runs")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(state, "CACHE", small.cache)
    return store.Run(tmp_path / "runs" / small.run.id)


@pytest.fixture(scope="session")
def lesson(llama, tmp_path_factory) -> SimpleNamespace:
    """The lesson of the page Learn on the tiny llama, complete, where the app looks for it. Not to be written to.

    Attributes:
        run, config: its folder as a Run, and its settings.
        runs, cache: folders to be given to the app; there is no run.
    """
    from analysis.lesson import prepare
    from app.lesson import job
    root = tmp_path_factory.mktemp("lesson")
    config = RunConfig(model=str(llama), domains=("healthcare", "legal", "finance"), methods=("dpruner", "magnitude", "random"), **SMALL)
    run = store.Run(root / "cache" / "lesson" / job.key())
    store.write_json(run.folder / "run.json", {"config": config.to_dict()})
    store.write_json(run.folder / "status.json", {"state": "queued"})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    prepare.prepare(run.folder, root / "runs", root / "cache")
    torch.set_num_threads(before)
    return SimpleNamespace(run=run, config=config, runs=root / "runs", cache=root / "cache")


@pytest.fixture(scope="session")
def starter():
    """(model, tokenizer) of the starter, float32. Not to be changed."""
    from dpruner import load_model
    return load_model("starter", device="cpu")

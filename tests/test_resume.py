"""A run that is killed at any moment goes on where it was, and ends with the same bits."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from dpruner import InputError, RunConfig, cli, leftovers, partial, pipeline, store, worker
from dpruner.partial import Checkpoint
from dpruner.store import Run

METHODS = ("dpruner", "magnitude", "wanda")
RUNS = {   # between them they pass through every stage there is
    "after": {"methods": METHODS, "compensate": "after"},
    "walk": {"methods": ("dpruner", "sparsegpt"), "compensate": "walk"},
    "finetune": {"methods": ("dpruner", "domain", "general"), "formula": "taylor", "finetune": True, "epochs": 2},
}
KILLS = 7   # of each, 21 in all


def work(folder: Path, cache: Path, config: dict) -> None:
    """What a process does that is about to be killed: everything is saved at every step, so that every kind of file is caught half-way."""
    partial.SHARE = float("inf")
    pipeline.run(RunConfig.from_dict(config), folder=folder, cache=cache)


@pytest.fixture(scope="module")
def processes():
    """A context whose processes start at once: the libraries are loaded in the server they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpruner", "test_resume"])
    with pytest.MonkeyPatch.context() as patch:   # a new process runs the main module, and AppTest leaves the app as that
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        first = context.Process(target=time.sleep, args=(0,))   # which waits for the server; the kills are to hit runs
        first.start()
        first.join()
        yield context


def content(run: Run) -> dict[str, bytes]:
    """Every file of a finished run that must not depend on its history, by its place."""
    files = {str(p.relative_to(run.folder)): p for p in run.folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("run.json", "status.json")}


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_it_ends_with_the_same_bits(name, llama, tmp_path, processes):
    config = RunConfig(model=str(llama), domains=("healthcare", "legal"), **SMALL | {"device": "cpu"} | RUNS[name]).to_dict()

    def started(folder):
        process = processes.Process(target=work, args=(folder, tmp_path / f"cache of {folder.name}", config))
        process.start()
        return process

    whole = store.new_run(tmp_path, "whole")
    process = started(whole.folder)
    began = time.monotonic()
    process.join(60)
    length = time.monotonic() - began
    assert process.exitcode == 0 and whole.status["state"] == "done"

    kills, moments = 0, random.Random(name)
    while kills < KILLS:
        run = store.new_run(tmp_path, "killed")
        for _ in range(20):
            process = started(run.folder)
            process.join(moments.uniform(0, 0.8 * length))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            if run.folder.joinpath("status.json").is_file() and run.status["state"] == "done":
                break
        else:
            process = started(run.folder)
            process.join(60)
        assert run.status["state"] == "done", run.status["error"]
        found, wanted = content(run), content(whole)
        assert [n for n in {*found, *wanted} if found.get(n) != wanted.get(n)] == []


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    checkpoint = Checkpoint(tmp_path / "stage")
    assert checkpoint.load() == (0, {})
    checkpoint.offer(3, lambda: {"x": torch.arange(4)}, {"done": torch.ones(2)})
    step, saved = checkpoint.load()
    assert step == 3 and saved["x"].tolist() == [0, 1, 2, 3] and saved["done"].tolist() == [1, 1]
    for path in (tmp_path / "stage").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert Checkpoint(tmp_path / "stage").load() == (0, {})


@pytest.mark.parametrize("missing", range(3))
def test_a_checkpoint_of_which_a_file_is_missing_is_passed_over(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SHARE", float("inf"))
    checkpoint = Checkpoint(tmp_path / "stage")
    for step in range(1, 4):
        checkpoint.offer(step, lambda: {}, {f"block {step}": torch.ones(1)})
    sorted((tmp_path / "stage").glob("final-*"))[missing].unlink()
    again = Checkpoint(tmp_path / "stage")
    assert again.load() == (0, {})
    again.offer(1, lambda: {}, {"block 1": torch.zeros(1)})
    step, saved = Checkpoint(tmp_path / "stage").load()
    assert step == 1 and saved == {"block 1": torch.zeros(1)}


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(partial.time, "monotonic", lambda: clock[0])
    saved = []

    def slow():   # a save that takes a second, of steps that take a tenth
        clock[0] += 1
        saved.append(clock[0])
        return {"x": torch.zeros(1)}

    checkpoint = Checkpoint(tmp_path / "stage")
    for step in range(1, 1001):
        clock[0] += 0.1
        checkpoint.offer(step, slow)
    assert len(saved) / clock[0] == pytest.approx(partial.SHARE, rel=0.2)


def test_what_is_final_is_written_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SHARE", float("inf"))
    checkpoint = Checkpoint(tmp_path / "stage")
    for step in range(1, 4):
        checkpoint.offer(step, lambda step=step: {"state": torch.tensor(step)}, {f"block {step}": torch.tensor(step)})
    assert len(list((tmp_path / "stage").glob("final-*"))) == 3
    step, saved = Checkpoint(tmp_path / "stage").load()
    assert step == 3 and {n: int(t) for n, t in saved.items()} == {"block 1": 1, "block 2": 2, "block 3": 3, "state": 3}


def test_a_run_of_another_model_does_not_go_on(small, tmp_path):
    config = small.config
    run = store.new_run(tmp_path, "run")
    record = small.run.record
    store.write_json(run.folder / "run.json", {**record, "model": {**record["model"], "fingerprint": "another"}})
    with pytest.raises(InputError, match="cannot go on: its model is not what it was"):
        pipeline.run(config, folder=run.folder, cache=tmp_path / "cache")
    assert run.status["state"] == "failed"


class Full:
    """A disk that is full from the n-th file of tensors on, until it is emptied; every file that it refuses lies there half-way first."""

    def __init__(self, monkeypatch, after: int):
        self.left, self.real = after, store.save_file
        monkeypatch.setattr(store, "save_file", self.save)

    def save(self, tensors, path, metadata):
        self.left -= 1
        if self.left < 0:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.real(tensors, path, metadata)


def finished(config, folder: Path) -> Run:
    """A run from its beginning, or from where it was, to its end."""
    pipeline.run(config, folder=folder, cache=folder.with_name(f"cache of {folder.name}"))
    return Run(folder)


@pytest.fixture(scope="module")
def brief(llama):
    return RunConfig(model=str(llama), domains=("legal",), methods=("dpruner", "wanda"), compensate="after", **SMALL | {"device": "cpu"})


@pytest.fixture(scope="module")
def whole(brief, tmp_path_factory):
    return finished(brief, store.new_run(tmp_path_factory.mktemp("whole"), "run").folder)


@pytest.mark.parametrize("after", [0, 2, 7, 19])
def test_a_disk_that_was_full_for_a_while_changes_no_bit(after, brief, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SHARE", float("inf"))
    run, disk = store.new_run(tmp_path, "run"), Full(monkeypatch, after)
    with pytest.raises(InputError, match="the disk is full; free some space and resume it"):
        finished(brief, run.folder)
    assert run.status["state"] == "failed" and not list(tmp_path.rglob("*.tmp"))
    disk.left = 10**6
    assert content(finished(brief, run.folder)) == content(whole)


def killed_while_it_writes(folder: Path) -> None:
    with store.replacing(folder / "general" / "G.safetensors") as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_was_writing_to_the_cache_is_cleared(processes, tmp_path):
    process = processes.Process(target=killed_while_it_writes, args=(tmp_path,))
    process.start()
    process.join(60)
    with store.replacing(tmp_path / "general" / "other.safetensors") as own:
        own.write_bytes(b"half")
        assert len(list(tmp_path.rglob(".*.tmp"))) == 2
        leftovers.clear(tmp_path)
        assert list(tmp_path.rglob(".*.tmp")) == [own]


def test_killed_while_it_tidies_up_it_is_as_finished_as_before(brief, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SHARE", float("inf"))
    run = store.new_run(tmp_path, "run")

    def killed(folder, **_):
        for path in sorted(folder.rglob("*"))[::2]:
            path.is_file() and path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(partial.shutil, "rmtree", killed)
        finished(brief, run.folder)
    assert run.status["state"] == "cancelled" and (run.folder / "partial").is_dir()
    monkeypatch.setattr(pipeline, "pruned_models", None)   # nothing is computed again
    assert content(finished(brief, run.folder)) == content(whole)
    assert run.status["state"] == "done"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_files_that_were_torn_are_made_again(share, brief, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "SHARE", float("inf"))
    run = store.new_run(tmp_path, "run")

    def stop(status):
        if status.share >= share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(brief, folder=run.folder, cache=tmp_path / "cache of " / run.id, watch=stop)
    assert run.status["state"] == "cancelled"
    torn = [p for where in ("partial", "masks", "weights") for p in (run.folder / where).rglob("*") if p.is_file()]
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[:-20])
    assert content(finished(brief, run.folder)) == content(whole)


def test_a_mask_that_an_unfinished_run_has_lost_is_made_again(brief, whole, tmp_path):
    """As in a copy of its folder that was made while it went on."""
    run = store.new_run(tmp_path, "run")

    def stop(status):
        if (run.folder / "partial" / "dpruner@legal.parquet").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(brief, folder=run.folder, cache=tmp_path / "cache of " / run.id, watch=stop)
    run.path("masks", "dpruner", "legal").unlink()
    assert content(finished(brief, run.folder)) == content(whole)


def test_files_that_a_finished_run_has_lost_are_made_anew(brief, whole, tmp_path):
    folder = tmp_path / "runs" / whole.id
    shutil.copytree(whole.folder, folder)
    run, masks = store.Run(folder), next((folder / "masks").iterdir())
    assert worker.damaged_files(run) == []
    masks.write_bytes(masks.read_bytes()[:-20])
    (folder / "stats.parquet").write_bytes(b"PAR1")
    (folder / "losses.parquet").unlink()
    assert worker.damaged_files(run) == ["losses.parquet", f"masks/{masks.name}", "stats.parquet"]
    assert content(finished(worker.to_go_on(run), folder)) == content(whole) and worker.damaged_files(run) == []


def killed_while_it_plans(runs: Path, config: dict) -> None:
    pipeline.planned_work = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    pipeline.run(RunConfig.from_dict(config), runs=runs, cache=runs.parent / "cache")


def test_a_run_that_was_killed_before_it_knew_its_plan_is_listed_and_goes_on(brief, whole, tmp_path, processes, capsys):
    process = processes.Process(target=killed_while_it_plans, args=(tmp_path / "runs", brief.to_dict()))
    process.start()
    process.join(60)
    run, = store.find_runs(tmp_path / "runs")
    assert worker.state(run)["state"] == "failed" and run.status["stage"] == "loading model and text"
    assert cli.main(["resume", "last", "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == run.id and content(run) == content(whole)


def test_a_killed_run_goes_on_from_the_command_line(brief, whole, tmp_path, capsys):
    run = store.new_run(tmp_path / "runs", "run")
    store.write_json(run.folder / "run.json", {"config": brief.to_dict()})
    store.write_json(run.folder / "status.json", {**worker.WAITING, "state": "running", "pid": 2**22, "pid_born": 0.0})   # nobody has this id
    assert cli.main(["runs", "--runs", str(tmp_path / "runs")]) == 0
    assert "failed. The run stopped in the middle" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    resume = ["resume", "last", "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--json", "--memory"]
    for limit, said in (("1MB", "does not fit into 1MB of memory"), ("much", "The memory 'much' is not known")):
        assert cli.main([*resume, limit]) == 1
        assert said in capsys.readouterr().err and before == {path: path.read_bytes() for path in run.folder.iterdir()}
    assert cli.main([*resume, "2GB"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == run.id and content(run) == content(whole) and run.config["memory"] == "2GB"
    assert cli.main(["resume", "last", "--runs", str(tmp_path / "runs")]) == 1
    assert "cannot go on: it is done" in capsys.readouterr().err

"""Runs as processes of their own: the queue, cancelling, what is said of one that died. Few processes: each has torch to import."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from dpruner import InputError, RunConfig, cli, evaluations, experiments, pipeline, signals, status, store, turns, worker
from dpruner.memory import parse_size
from dpruner.store import Run

BRIEF = {"domains": ("legal",), "nsamples": 4, "seqlen": 16, "evaluate": False, "halves": False, "general_mode": "static", "device": "cpu"}
ENDLESS = BRIEF | {"finetune": True, "epochs": 200_000}
WAIT = 120   # seconds, for machines that have other things to do


def wait_for(what, seconds: float = WAIT):
    """The first true value of `what()`."""
    deadline = time.time() + seconds
    while not (found := what()):
        assert time.time() < deadline, "it did not happen"
        time.sleep(0.1)
    return found


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def sentence(status: dict) -> str:
    return f"{status['error']['what']}: {status['error']['why']}; {status['error']['what to do']}."


@pytest.fixture
def runs(tmp_path):
    """A folder for runs; what still runs at the end is ended."""
    yield tmp_path / "runs"
    for run in store.find_runs(tmp_path / "runs"):
        pid = run.status["pid"]
        if run.status["state"] in ("queued", "running") and pid not in (None, os.getpid()):
            psutil.Process(pid).kill()


def written(folder, **status) -> Run:
    """A run folder as a process left it."""
    store.write_json(folder / "run.json", {"config": RunConfig().to_dict()})
    store.write_json(folder / "status.json", {**worker.WAITING, "born": time.time(), **status})
    return Run(folder)


def test_runs_wait_for_the_device_in_their_order_and_a_waiting_one_can_be_cancelled(llama, runs, tmp_path, monkeypatch):
    runs.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model").symlink_to(llama)
    monkeypatch.chdir(tmp_path / "elsewhere")   # paths are meant from here, and the package is found all the same
    with turns.turn(torch.device("cpu"), print):          # somebody else works on the device
        first = worker.submit(RunConfig(model="model", **BRIEF), "../runs", "../cache")
        second = worker.submit(RunConfig(model="model", **BRIEF), "../runs", "../cache")
        third = worker.submit(RunConfig(model="no-such-model", **BRIEF), "../runs", "../cache")
        assert worker.state(third)["state"] == "queued"
        waiting = "waiting for the device"
        wait_for(lambda: all(worker.state(r)["stage"] == waiting for r in (first, second, third)))
        assert [worker.state(r)["ahead"] for r in (first, second, third)] == [1, 2, 3]
        assert cli._told(worker.state(second)) == "queued, 2 before it on cpu"
        assert {worker.state(r)["state"] for r in (first, second, third)} == {"queued"}
        pid = worker.state(second)["pid"]
        worker.cancel(second)
        assert worker.state(second)["state"] == "cancelled" and gone(pid)
        wait_for(lambda: worker.state(third)["ahead"] == 2, 10)   # the cancelled one is waited for no longer
    wait_for(lambda: worker.state(first)["state"] == "done")
    assert first.pairs() == [("dpruner", "legal")]
    assert (tmp_path / "cache" / "general").is_dir() and store.find_runs(runs)[-1].id == first.id
    wait_for(lambda: worker.state(third)["state"] == "failed")
    assert sentence(worker.state(third)).startswith("The model 'no-such-model' could not be loaded: ")
    wait_for(lambda: (third.folder / worker.LOG).read_text())   # written when the status tells already that it failed
    assert sentence(worker.state(third)) in (third.folder / worker.LOG).read_text()
    assert (first.folder / worker.LOG).read_text() == ""
    ended, began = ((r.folder / "status.json").stat().st_mtime for r in (first, third))
    assert ended <= began - worker.state(third)["elapsed_seconds"] + 0.2   # one at a time
    assert worker.state(second)["state"] == "cancelled"


@pytest.fixture
def busy(tmp_path, monkeypatch):
    """The CPU in the hands of another process, which gives it back when it is told to."""
    monkeypatch.setenv("DPRUNER_QUEUE", str(tmp_path / "queue"))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    turns.take_ticket(torch.device("cpu"), other.pid)
    yield lambda: other.communicate(b"end\n")
    other.kill()
    other.wait()


def waiting_run(llama, runs, busy, then, **settings) -> list[dict]:
    """A run that waits in this process; the states that others see of it, as soon as it waits and when it has ended."""
    seen = []

    def waiting(ahead):
        seen.append(worker.state(store.open_run("last", runs)) | {"counted": ahead})
        then()

    try:
        pipeline.run(RunConfig(**BRIEF | {"model": str(llama)} | settings), runs=runs, cache=runs / "cache", waiting=waiting)
    except (KeyboardInterrupt, InputError):
        pass
    run, = store.find_runs(runs)   # and no second folder
    return [*seen, worker.state(run) | {"pairs": run.pairs()}]


def test_a_run_that_waits_in_a_shell_or_notebook_is_seen_and_goes_on_in_the_same_folder(llama, runs, busy):
    waiting, after = waiting_run(llama, runs, busy, busy)
    assert (waiting["state"], waiting["stage"], waiting["device"]) == ("queued", "waiting for the device", "cpu")
    assert (waiting["ahead"], waiting["counted"], waiting["pid"]) == (1, 1, os.getpid())
    assert (after["state"], after["pairs"]) == ("done", [("dpruner", "legal")]) and "ahead" not in after


def test_a_run_that_waits_ends_as_it_is_told_to_or_with_what_is_wrong(llama, runs, busy):
    def interrupted():
        raise KeyboardInterrupt

    _, after = waiting_run(llama, runs, busy, interrupted)
    assert (after["state"], after["error"], after["pairs"]) == ("cancelled", None, [])
    _, after = waiting_run(llama, runs / "wrong", busy, busy, model="no-such-model")
    assert after["state"] == "failed" and sentence(after).startswith("The model 'no-such-model' could not be loaded: ")


def test_an_evaluation_waits_for_its_turn_too_and_whoever_has_it_does_not_wait_for_himself(small, tmp_path, busy):
    run, ahead = Run(shutil.copytree(small.run.folder, tmp_path / "run")), []
    found = evaluations.evaluate(run, limit=2, methods=["random"], domains=["legal"], waiting=lambda count: (ahead.append(count), busy()))
    assert ahead == [1] and set(found.method) == {"dense", "random"}
    with turns.turn(torch.device("cpu"), ahead.append), turns.turn(torch.device("cpu"), ahead.append):
        assert ahead == [1]


def listening() -> None:
    """A test run in the background, or by nohup, hands down what it does not hear."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_DFL)


def in_the_background() -> None:
    """As `command &` in a script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture
def shell(llama, runs, tmp_path, busy):
    """Start a run that waits in a shell; gives its process and the run."""
    def start(before):
        options = ["--model", str(llama), "--domain", "legal", "--device", "cpu", "--runs", str(runs), "--cache", str(tmp_path / "cache")]
        process = subprocess.Popen([sys.executable, "-m", "dpruner", "prune", *options], stderr=subprocess.PIPE, text=True, preexec_fn=before)
        run, = wait_for(lambda: store.find_runs(runs))
        wait_for(lambda: worker.state(run)["stage"] == "waiting for the device")
        return process, run

    return start


def test_an_experiment_that_waits_says_so(llama, tmp_path, busy):
    experiment, seen = experiments.prepared("formulas", RunConfig(model=str(llama), **BRIEF), values=["balanced"], root=tmp_path), []

    def waiting(ahead):
        seen.append(worker.state(experiment))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiments.conduct(experiment, cache=tmp_path / "cache", waiting=waiting)
    waits, = seen
    assert (waits["state"], waits["stage"], waits["ahead"], waits["about"]) == ("queued", "waiting for the device", 1, "0 of 2 points done")
    assert worker.state(experiment)["state"] == "cancelled"


@pytest.mark.parametrize("before", [listening, in_the_background])
def test_a_shell_says_that_it_waits_and_its_run_can_be_cancelled_from_anywhere(before, shell, runs, capsys):
    process, run = shell(before)
    if before is in_the_background:
        process.send_signal(signal.SIGINT)   # a ctrl-C that is meant for something else
    assert cli.main(["cancel", "last", "--runs", str(runs)]) == 0 and capsys.readouterr().out == f"{run.id}: cancelled\n"
    assert worker.state(run)["state"] == "cancelled" and process.wait(WAIT) == 1
    waits, stopped = process.stderr.read().splitlines()[-2:]   # it was asked, and not killed
    assert waits == "Waiting for the device: 1 before it." and stopped.startswith("Stopped: what it has finished is kept")
    assert cli.main(["cancel", run.id, "--runs", str(runs)]) == 1
    assert capsys.readouterr().err == f"{run.id} cannot be cancelled: it is cancelled; choose one that waits or runs.\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_terminal_that_closes_or_a_time_limit_ends_a_run_as_ctrl_c_does(name, shell):
    process, run = shell(listening)
    for _ in range(2):   # a batch system tells a process and what has started it
        process.send_signal(getattr(signal, name))
    assert process.wait(WAIT) == 1 and run.status["state"] == "cancelled"
    assert process.stderr.read().splitlines()[-1].startswith("Stopped: what it has finished is kept; `python -m dpruner resume ")


def test_what_ignores_a_closing_terminal_goes_on(monkeypatch):
    before, usual = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)   # as nohup does
    try:
        with signals.heard():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt), signals.heard():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN   # heard once
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, usual)


def test_a_notebook_outlives_the_run_that_is_cancelled_in_it(llama, runs, tmp_path, busy):
    config = RunConfig(model=str(llama), **BRIEF)
    cells = ("from dpruner import RunConfig, pipeline\n"
             f"try: pipeline.run(RunConfig.from_dict({config.to_dict()!r}), runs={str(runs)!r}, cache={str(tmp_path)!r})\n"
             "except KeyboardInterrupt: print('the next cell', flush=True)\n"
             "input()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    notebook = subprocess.Popen([sys.executable, "-c", cells], **pipes, text=True, preexec_fn=listening)
    run, = wait_for(lambda: store.find_runs(runs))
    wait_for(lambda: (run.folder / "status.json").is_file())
    worker.cancel(run)
    assert worker.state(run)["state"] == "cancelled" and notebook.stdout.readline() == "the next cell\n"
    notebook.communicate("end\n", WAIT)
    assert notebook.returncode == 0


def test_a_process_that_dies_before_it_can_write_is_noticed(llama, runs, tmp_path):
    run = worker.submit(RunConfig(model=str(llama), **BRIEF), runs, tmp_path / "cache")
    psutil.Process(worker.state(run)["pid"]).kill()
    assert wait_for(lambda: (s := worker.state(run))["state"] == "failed" and s, 10)["error"]["why"].startswith("its process was killed")


def test_cancelling_what_never_came_to_be_ends_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 0.5)
    run = written(tmp_path / "run", pid=None, born=time.time())
    worker.cancel(run)   # an id that is not there is not that of this process
    assert worker.state(run)["state"] == "cancelled"


def test_a_running_run_can_be_cancelled(llama, runs, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)   # as in a server that a shell has put into the background
    run = worker.submit(RunConfig(model=str(llama), **ENDLESS), runs, tmp_path / "cache")
    signal.signal(signal.SIGINT, before)
    status = wait_for(lambda: (s := worker.state(run))["stage"] == "domain importance" and s)
    assert status["state"] == "running" and status["total"] == 200_000 and not gone(status["pid"])
    worker.cancel(run)
    after = worker.state(run)
    assert (after["state"], after["error"]) == ("cancelled", None) and gone(status["pid"])
    assert "Cancelled." in (run.folder / worker.LOG).read_text()   # it was asked, and not killed
    worker.cancel(run)   # once more changes nothing
    assert worker.state(run) == after
    with turns.turn(torch.device("cpu"), lambda ahead: pytest.fail("the device is not free")):
        pass


def test_a_killed_run_has_failed_and_says_so_from_then_on(llama, runs, tmp_path):
    run = worker.submit(RunConfig(model=str(llama), **ENDLESS), runs, tmp_path / "cache")
    pid = wait_for(lambda: (s := worker.state(run))["state"] == "running" and s["pid"])
    os.kill(pid, signal.SIGKILL)
    status = wait_for(lambda: (s := worker.state(run))["state"] == "failed" and s, 10)
    assert sentence(status).startswith("The run stopped in the middle: its process was killed, by the system if memory ran out; resume it: what it has "
                                       f"is kept; if it ends so once more, with a limit on its memory: `python -m dpruner resume {run.id} --memory ")
    assert run.status["state"] == "failed"   # written down, for readers that do not ask for the process
    with turns.turn(torch.device("cpu"), lambda ahead: pytest.fail("the device is not free")):
        pass


def test_a_process_id_that_was_given_out_again_is_no_sign_of_life(tmp_path):
    me = turns.identity()
    alive = written(tmp_path / "alive", state="running", **me)
    assert worker.state(alive)["state"] == "running"
    other = written(tmp_path / "other", state="running", **me | {"pid_born": me["pid_born"] - 1000})
    assert sentence(worker.state(other)).startswith("The run stopped in the middle: its process ended without a word")
    assert worker.state(alive)["state"] == "running"


@pytest.mark.parametrize(("limit", "advised"), [("8GB", "6 GB"), ("1GiB", "805 MB"), (None, "9.2 GB")])
def test_a_run_that_died_is_advised_a_limit_below_the_one_it_had_or_what_is_free(limit, advised, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "available_memory", lambda device: 12_300_000_000)
    run = written(tmp_path / "run")
    store.write_json(run.folder / "run.json", {"config": RunConfig(device="cpu", memory=limit).to_dict()})
    option = f"--memory {advised.replace(' ', '')}"
    assert worker.died(run)["what to do"].endswith(f": `python -m dpruner resume run {option}`")
    args = cli.parser().parse_args(["resume", "run", *option.split()])   # which can be followed
    assert parse_size(args.memory) < parse_size(limit or "12.3GB")
    store.write_json(run.folder / "experiment.json", {"name": "formulas", "config": run.config})
    assert worker.died(experiments.Experiment(run.folder))["what to do"].endswith(f": the same command with {option}")


@pytest.mark.parametrize("config", [{"memory": 8}, {"memory": "much"}, {"device": "abacus"}, {"nonsense": 1}, "nonsense"])
def test_a_run_that_died_with_damaged_settings_is_still_told_of(config, tmp_path):
    run = written(tmp_path / "run", state="running", pid=2**22, pid_born=0.0)
    store.write_json(run.folder / "run.json", {"config": config})
    assert worker.state(run)["error"]["what to do"] == "resume it: what it has is kept"


def test_a_clock_that_is_set_back_makes_no_process_another(monkeypatch):
    me, real = turns.identity(), psutil._psplatform.boot_time
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: real() - 3600)   # the system reckons it from the clock
    assert turns.lives(me) and turns.identity() == me


def test_what_runs_on_another_machine_is_not_told_as_dead(tmp_path):
    run = written(tmp_path / "run", state="running", **turns.identity() | {"machine": "another"})
    before = run.status
    assert sentence(worker.state(run)).startswith("The run cannot be seen from here: it was running on the machine 'another'; look there; if it has ended")
    assert run.status == before and worker.to_go_on(run)   # a copy of its folder


def test_one_process_at_a_time_works_in_a_folder(llama, tmp_path, busy):
    config = RunConfig(model=str(llama), **BRIEF)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    experiment = experiments.prepared("formulas", config, values=["balanced"], root=tmp_path)
    run = written(tmp_path / "run", state="running", **turns.identity(other.pid))
    store.write_json(experiment.folder / "status.json", run.status)
    for attempt in (lambda: pipeline.run(config, folder=run.folder, cache=tmp_path), lambda: experiments.conduct(experiment, cache=tmp_path),
                    lambda: worker.start(run, ["dpruner.worker"], "cpu"), lambda: worker.start(experiment, ["dpruner.worker"], "cpu")):
        with pytest.raises(InputError, match="is going on already: it is running, and two at once"):
            attempt()
    assert run.status["pid"] == other.pid == experiment.status["pid"]
    other.communicate(b"end\n")
    with status.claimed(run.folder):
        pass
    store.write_json(run.folder / "status.json", {**worker.WAITING, "pid": None, "born": time.time()})   # whose process is just being started
    with pytest.raises(InputError, match="is going on already: it is queued"), status.claimed(run.folder):
        pass


def test_a_run_that_died_before_its_first_status_is_told_as_any_that_died(llama, tmp_path, capsys):
    config = RunConfig(model=str(llama), **BRIEF)
    run = store.new_run(tmp_path / "runs", "run", config.to_dict())
    assert worker.state(run)["state"] == "queued"   # it may be about to begin
    os.utime(run.folder / "run.json", (0, 0))
    assert cli.main(["runs", "--runs", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out.startswith(f"{run.id}: failed. The run died before it began: its process ended without a word")
    pipeline.run(worker.to_go_on(run), folder=run.folder, cache=tmp_path / "cache")
    assert run.status["state"] == "done" and run.pairs() == [("dpruner", "legal")]


def test_a_run_whose_folder_is_deleted_ends_and_leaves_nothing(llama, tmp_path):
    def deleted(now):
        if now.share > 0.3:
            shutil.rmtree(now.folder, ignore_errors=True)

    with pytest.raises(InputError, match="cannot go on: its folder was deleted; start a new one"):
        pipeline.run(RunConfig(model=str(llama), **BRIEF), runs=tmp_path / "runs", cache=tmp_path / "cache", watch=deleted)
    assert not any((tmp_path / "runs").iterdir())


def test_a_process_that_ended_is_no_sign_of_life_even_before_it_is_reaped(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert worker.state(written(tmp_path / "run", state="running", pid=child.pid))["state"] == "failed"
    child.wait()


@pytest.mark.parametrize(("age", "state"), [(0, "queued"), (1000, "failed")])
def test_a_run_that_was_just_submitted_has_a_while_to_show_itself(age, state, tmp_path):
    assert worker.state(written(tmp_path / "run", pid=None, born=time.time() - age))["state"] == state


def test_tickets_of_the_dead_and_files_of_others_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DPRUNER_QUEUE", str(tmp_path))
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive, elsewhere = turns.take_ticket(cpu, child.pid), turns.take_ticket(gpu, child.pid)
    (alive.parent / "0-dead.ticket").write_text('{"pid": 4194304}')
    (alive.parent / "0-nonsense.ticket").write_text("{")
    ahead = []

    def waiting(count):
        ahead.append(count)
        child.communicate(b"end\n")

    with turns.turn(cpu, waiting):
        assert ahead == [1] and not list(tmp_path.glob("cpu-0/0-*.ticket"))
    assert elsewhere.is_file() and not alive.exists() and not list(tmp_path.glob("cpu-0/*.ticket"))


def test_a_cancelled_run_goes_on_and_a_finished_one_does_not(llama, runs, tmp_path):
    run = written(runs / "run", state="cancelled", pid=os.getpid())
    store.write_json(run.folder / "run.json", {"config": RunConfig(model=str(llama), **BRIEF).to_dict()})
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(InputError, match="does not fit into 1MB of memory"):
        worker.resume(run, tmp_path / "cache", memory="1MB")
    assert before == {path: path.read_bytes() for path in run.folder.iterdir()}
    worker.resume(run, tmp_path / "cache", memory="2GB")
    wait_for(lambda: worker.state(run)["state"] == "done")
    assert run.pairs() == [("dpruner", "legal")] and run.config["memory"] == "2GB"
    with pytest.raises(InputError, match="cannot go on: it is done and whole; choose one that failed, was cancelled"):
        worker.resume(run, tmp_path / "cache")


def test_settings_that_cannot_work_are_refused_before_there_is_a_folder(runs):
    with pytest.raises(InputError, match="sparsity 1.5"):
        worker.submit(RunConfig(sparsity=1.5), runs)
    assert not runs.exists()


def test_a_deleted_or_damaged_run_folder_is_one_sentence(tmp_path):
    run = written(tmp_path / "run")
    (run.folder / "status.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        worker.state(run)
    shutil.rmtree(run.folder)
    with pytest.raises(InputError, match="was not found"):
        worker.state(run)


def test_an_experiment_is_a_process_like_a_run(llama, tmp_path):
    config = RunConfig(model=str(llama), **BRIEF | {"eval_documents": 1, "eval_seqlen": 64})
    experiment = experiments.prepared("formulas", config, values=["balanced"], root=tmp_path)
    worker.submit_experiment(experiment, tmp_path / "cache")
    with pytest.raises(InputError, match="going on already"):
        worker.submit_experiment(experiment, tmp_path / "cache")
    assert wait_for(lambda: worker.state(experiment)["state"] not in ("queued", "running"))
    assert worker.state(experiment)["state"] == "done", (experiment.folder / worker.LOG).read_text()
    assert set(experiment.results().series) == {"dense", "dpruner", "dpruner, after"}

"""The page Run: what it says of runs that wait, run, fail and end, and the form for a new one."""

import dataclasses
import gzip
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from streamlit.testing.v1 import AppTest
from transformers import AutoModelForCausalLM, LlamaConfig

from app import state, uploads
from dpruner import InputError, RunConfig, cli, estimate, hub, store, worker
from dpruner.model import count_weights, skipped_weights
from dpruner.store import Run

MAIN = str(Path(__file__).parents[1] / "app" / "main.py")


@pytest.fixture
def runs(small, tmp_path, monkeypatch) -> Path:
    """A folder with the small finished run; nothing that is submitted starts."""
    folder = tmp_path / "runs"
    shutil.copytree(small.runs, folder)
    monkeypatch.setattr(state, "RUNS", folder)
    monkeypatch.setattr(state, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    return folder


@pytest.fixture
def submitted(monkeypatch) -> list[RunConfig]:
    """What was asked to be run."""
    found = []

    def submit(config, runs, cache):
        config.check()
        found.append(config)
        return written(Path(runs) / f"20300101-00000{len(found)}-new", state="queued", config=config)

    monkeypatch.setattr(worker, "submit", submit)
    return found


def opened(**session) -> AppTest:
    """The page, first drawn with these widget values."""
    at = AppTest.from_file(MAIN, default_timeout=60)
    for key, value in session.items():
        at.session_state[f"run-{key}"] = value
    return calm(at.run())


def calm(at: AppTest) -> AppTest:
    assert not at.exception, at.exception
    return at


def written(folder: Path, config: RunConfig | None = None, **status) -> Run:
    """A run folder whose process is this one."""
    store.write_json(folder / "run.json", {"config": (config or RunConfig()).to_dict()})
    me = {"pid": os.getpid(), "pid_born": psutil.Process().create_time(), "born": time.time()}
    store.write_json(folder / "status.json", {**worker.WAITING, **me, **status})
    return Run(folder)


def words(at: AppTest) -> str:
    """All that is written on the page."""
    return "\n".join(str(e.value) for kind in (at.markdown, at.caption, at.error, at.warning, at.info, at.text, at.code) for e in kind)


def start(at: AppTest):
    return at.button(key="run-start")


# What is found


def test_the_newest_finished_run_is_summed_up(runs, small):
    at = opened()
    quality, alike = at.dataframe[0].value, at.dataframe[1].value
    row = next(r for r in small.summary["rows"] if (r["method"], r["domain"]) == ("dpruner", "legal"))["perplexity"]["legal"]
    assert list(quality.columns) == ["Text", "Pruned for", "dense", "dpruner", "magnitude", "random"] and len(quality) == 4
    shown = quality[(quality.Text == "legal") & (quality["Pruned for"] == "legal")].dpruner.item()
    assert shown == f"{row['value']:.0f} ({row['low']:.0f} to {row['high']:.0f})"
    found = next(s for s in small.summary["similarity"] if s["method"] == "dpruner")
    assert alike.to_dict("records") == [{"Domains": "healthcare · legal", "Method": "dpruner", "Random": f"{found['floor']:.3f}",
                                         "Jaccard": f"{found['jaccard']:.3f}", "Same domain": f"{found['ceiling']:.3f}"}]
    changed = small.summary["lambda"]["legal"]
    assert f"**{changed['changed'] / changed['of']:.2%}** of the mask decisions for legal" in words(at)


def test_a_waiting_and_a_running_run_say_where_they_are(runs):
    written(runs / "20300101-a", state="running", stage="domain importance", about="legal", done=3, total=8, progress=0.42,
            eta_seconds=95.0)
    written(runs / "20300102-b", device="cpu", ahead=2)
    (runs / "20300101-a" / "log.txt").write_text("first\nlast words\n")
    at = opened(**{"log-20300101-a": True})
    assert "**20300102-b** waits: 2 runs before it on cpu." in words(at)
    bar = at.get("progress")[0]
    assert bar.proto.value == 42 and bar.proto.text == "domain importance · legal · step 4 of 8 · 42% · about 2 min left"
    assert "first\nlast words" in words(at)


def test_cancel_ends_the_run_it_stands_beside(runs, monkeypatch):
    written(runs / "20300101-a", state="running")
    written(runs / "20300102-b")
    ended = []
    monkeypatch.setattr(worker, "cancel", lambda run: (ended.append(run.id), written(run.folder, state="cancelled")))
    at = opened()
    calm(at.button(key="run-cancel-20300102-b").click().run())
    assert ended == ["20300102-b"] and "**20300102-b** was cancelled" in words(at) and "**20300101-a** is running" in words(at)


def test_failed_killed_and_damaged_runs_are_one_sentence_each_and_the_page_goes_on(runs):
    gated = {"what": "The model 'x' could not be loaded", "why": "it is gated", "what to do": "log in"}
    written(runs / "20300101-failed", state="failed", error=gated)
    written(runs / "20300102-killed", state="running", pid=2**22 - 1)
    written(runs / "20300103-damaged")
    (runs / "20300103-damaged" / "status.json").write_text("{")
    at = opened()
    assert "**20300101-failed** The model 'x' could not be loaded: it is gated; log in." in words(at)
    assert "**20300102-killed** The run stopped in the middle: " in words(at)
    assert "**20300103-damaged** The file" in words(at) and "it is damaged or of another format; delete it and run again." in words(at)
    assert len(at.error) == 3 and at.dataframe and not start(at).disabled


def test_old_failures_are_not_told_again_once_a_later_run_is_finished(runs):
    written(runs / "20000101-failed", state="failed", error={"what": "Old", "why": "so", "what to do": "nothing"})
    assert not opened().error


def test_a_damaged_table_of_the_newest_run_is_one_sentence(runs, small):
    (runs / small.run.id / "metrics.parquet").write_bytes(b"no table")
    at = opened()
    assert "metrics.parquet cannot be read" in at.error[0].value and not start(at).disabled


def test_when_a_run_ends_the_page_shows_it(runs, small):
    at = opened(active={small.run.id})   # it was running when this session last looked
    assert at.session_state["run-active"] == set() and at.dataframe


def test_the_demonstration_is_started_once_where_there_is_no_run(tmp_path, monkeypatch, submitted):
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    at = opened()
    opened()
    assert [c.domains for c in submitted] == [("healthcare", "legal", "finance")] and not start(at).disabled
    assert "waits: it is just starting." in words(at)


# Every run


def test_the_command_repeats_the_run(runs, small, monkeypatch):
    at = opened()
    shown = at.code[0].value.split()
    args = cli.parser().parse_args(shown[3:])
    assert shown[:3] == ["python", "-m", "dpruner"] and (args.runs, args.cache) == (str(state.RUNS), str(state.CACHE))
    assert cli.settings(args, {}) == small.config == RunConfig.from_dict(small.run.config)


@pytest.mark.parametrize("changes", [
    {"halves": False, "evaluate": False, "lam": 0.0, "finetune": True, "seed": 3, "dtype": "bfloat16", "compensate": "after"},
    {"model": "/a folder/it's", "domains": ("my texts=/tmp/a b.csv",), "column": "the text", "revision": "abc", "granularity": "2:4"},
])
def test_the_command_gives_back_every_setting(changes, runs):
    config = dataclasses.replace(RunConfig(), **changes)
    written(runs / "20300101-odd", config=config, state="cancelled")
    shown = shlex.split(opened(shown="20300101-odd").code[0].value)
    assert cli.settings(cli.parser().parse_args(shown[3:]), {}) == config


def test_a_run_is_deleted_after_it_was_confirmed_and_never_while_it_runs(runs, small):
    running = written(runs / "20300101-a", state="running")
    at = opened(shown=small.run.id)
    assert (runs / small.run.id).is_dir()
    calm(at.button(key="run-delete").click().run())
    assert not list(runs.rglob(f"*{small.run.id}*"))
    calm(at.selectbox(key="run-shown").set_value(running.id).run())
    calm(at.button(key="run-delete").click().run())
    assert running.folder.is_dir() and at.error[-1].value == "The run 20300101-a is still going; cancel it first."


# A new run


def test_start_submits_what_the_fields_say(runs, submitted):
    at = opened()
    at.multiselect(key="run-domains").set_value(["legal", "code"])
    at.multiselect(key="run-methods").set_value(["dpruner", "wanda"])
    at.slider(key="run-sparsity").set_value(60)
    at.selectbox(key="run-formula").set_value("taylor")
    at.number_input(key="run-lam").set_value(0.3)
    at.number_input(key="run-nsamples").set_value(5)
    at.toggle(key="run-halves").set_value(False)
    at.selectbox(key="run-dtype").set_value("bfloat16")
    calm(at.run())
    calm(start(at).click().run())
    assert submitted == [RunConfig(domains=("legal", "code"), methods=("dpruner", "wanda"), sparsity=0.6, formula="taylor", lam=0.3,
                                   nsamples=5, halves=False, dtype="bfloat16", eval_documents=10)]
    assert "**20300101-000001-new** waits" in words(at)


def test_the_paper_recipe_keeps_to_what_the_model_was_built_for(runs, submitted):
    at = opened()
    calm(at.button(key="run-preset-paper").click().run())
    assert at.number_input(key="run-seqlen").value == 512 and not start(at).disabled   # the starter has 512 positions, the paper took 2,048
    calm(start(at).click().run())
    paper = submitted[0]
    assert (paper.finetune, paper.formula, paper.nsamples, paper.epochs, paper.lam) == (True, "release", 128, 5, None)
    calm(at.button(key="run-preset-quick").click().run())
    assert at.number_input(key="run-seqlen").value == 128 and not at.toggle(key="run-finetune").value
    assert at.selectbox(key="run-formula").value == "balanced"


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"source": "folder", "folder": "/no/such/folder"}, "The model '/no/such/folder' was not found: there is no folder of that name"),
    ({"source": "hub", "hub": "nobody/nothing"}, "it is neither a folder nor in the local cache, and the hub cannot be reached"),
    ({"seqlen": 513}, "Sequences of 513 tokens are too long: the model was built for at most 512; set seqlen to 512 or less."),
    ({"granularity": "2:4", "sparsity": 60}, "The sparsity 0.6 and the granularity 2:4 contradict each other"),
    ({"sparsity": 90, "sparsity_of": "model"}, "A sparsity of 0.9 of the whole model cannot be reached"),
    ({"domains": []}, "Choose at least one domain."),
    ({"methods": []}, "Choose at least one method."),
    ({"source": "folder", "folder": ""}, "Name the model first."),
    ({"source": "folder", "folder": "a\0b"}, "was not found"),
    ({"catalogue": ["mednli"], "preview": "mednli"}, "The hub data set 'mednli' cannot be downloaded: it has no public copy"),
])
def test_what_cannot_work_is_said_beside_the_form(fields, sentence, runs):
    assert sentence in words(opened(**fields))


def test_what_cannot_work_cannot_be_started(runs):
    assert start(opened(seqlen=513)).disabled and not start(opened(seqlen=512)).disabled


def test_a_value_that_is_no_choice_gives_way(runs):
    at = AppTest.from_file(MAIN, default_timeout=60)
    at.query_params["run-formula"] = "nonsense"
    at.query_params["run-sparsity"] = "900"
    calm(at.run())
    assert at.selectbox(key="run-formula").value == "balanced" and 0 <= at.slider(key="run-sparsity").value <= 100


def test_too_little_memory_is_said_with_what_would_help(runs, monkeypatch):
    config, model = RunConfig(methods=("dpruner", "magnitude"), eval_documents=10), estimate.blank_model("starter")
    needed = sum(estimate.peak_memory(config, model, "cpu").values())
    monkeypatch.setattr(estimate, "available_memory", lambda device: needed)
    assert not opened().warning
    monkeypatch.setattr(estimate, "available_memory", lambda device: needed - 1)
    said = opened().warning[0].value
    helpful = estimate.remedies(config, model, "cpu", needed - 1)
    assert "not fit into memory" in said and helpful and all(r.words in said for r in helpful)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 10**6)
    assert "No setting changes that" in opened().warning[0].value


def test_the_card_knows_the_model_and_says_what_zeros_are_worth(runs):
    said = words(opened())
    assert "**LlamaForCausalLM** can be pruned: 8 blocks, 9,912,320 of 12,539,200 weights (79%)." in said
    assert "neither smaller nor faster" in said


# Files of the user


def test_files_that_are_brought_become_domains_with_a_column_each(runs, submitted):
    table = pd.DataFrame([{"id": i, "title": f"title {i}", "body": f"body of contract {i}. " * 20} for i in range(6)])
    at = opened()
    at.file_uploader(key="run-upload").upload("../../My contracts!.csv", table.to_csv(index=False).encode(), "text/csv")
    calm(at.run())
    saved = uploads.saved(runs)
    assert len(saved) == 1 and saved[0].parent.parent == runs / "uploads" and saved[0].name == "My-contracts.csv"
    column = at.selectbox(key=f"run-column-{saved[0].relative_to(runs / 'uploads')}")
    assert column.options == ["title", "body"]
    calm(column.set_value("body").run())
    calm(at.selectbox(key="run-preview").set_value("My-contracts").run())
    assert at.text[0].value.startswith("body of contract 0.")
    calm(start(at).click().run())
    label, path = submitted[0].domains[-1].split("=")
    assert label == "My-contracts" and Path(path).is_absolute()
    assert json.loads(Path(path).read_text().splitlines()[2])["text"].startswith("body of contract 2")
    calm(at.multiselect(key="run-files").set_value([]).run())
    assert at.multiselect(key="run-files").value == []   # taken out, it stays out, though the uploader still holds it


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.exe", b"x", "its type is not supported"),
    ("a.parquet.gz", b"x", "its type is not supported"),
    ("a.txt", b"", "it is empty"),
    ("a.txt", b"x" * 101, "is too large"),
    ("a.txt.gz", gzip.compress(b"x" * 1001), "is too large"),
    ("a.txt.gz", b"no gzip", "it is no complete gzip file"),
])
def test_files_are_checked_again_on_the_server(name, content, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "LARGEST", 100)
    with pytest.raises(InputError, match=sentence):
        uploads.save(name, content, tmp_path)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["../../etc/passwd.txt", "..\\..\\x.txt", "run.json", "…….md", "a=b.csv", "/abs.txt", "x" * 500 + ".txt"])
def test_names_of_files_are_made_safe(name, tmp_path):
    path = uploads.save(name, b"text", tmp_path)
    assert path.parent.parent == tmp_path / "uploads" and path.read_bytes() == b"text" and len(path.name) < 80 and "=" not in str(path.name)
    assert uploads.save(name, b"text", tmp_path) == path and uploads.saved(tmp_path) == [path] and not store.find_runs(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"{\n"), ("a.parquet", b"nothing"), ("a.csv", b'"a,b\n')])
def test_a_table_that_is_none_is_one_sentence(name, content, tmp_path):
    with pytest.raises(InputError, match="is not a well-formed"):
        uploads.text_columns(uploads.save(name, content, tmp_path))


# What it will take


def test_a_model_without_weights_counts_as_the_model_itself(starter):
    blank = estimate.blank_model("starter")
    assert count_weights(blank) == count_weights(starter[0]) and skipped_weights(blank) == {}
    assert all(p.device.type == "meta" for p in blank.parameters())


def test_disk_is_what_the_run_takes(small):
    folders = (small.run.folder / "masks", small.run.folder / "ranks", small.cache)
    taken = sum(p.stat().st_size for folder in folders for p in folder.rglob("*.safetensors"))
    heads = len(list(small.run.folder.rglob("*.safetensors"))) * 5000   # names and shapes, which count in a model this tiny only
    assert taken - heads < estimate.disk(small.config, estimate.blank_model(small.config.model)) < taken


def test_more_work_takes_longer_and_more_memory():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())   # the shapes of LLaMA-2-7B
    speed, base = estimate.Speed(1e14, 1e9), RunConfig(nsamples=128, seqlen=2048, dtype="bfloat16")

    def of(**changes):
        config = dataclasses.replace(base, **changes)
        memory = sum(estimate.peak_memory(config, model, "cuda").values())
        return memory, estimate.seconds(config, model, estimate.Outline(config), speed, "cuda")

    memory, time_ = of()
    assert memory > 2 * 6.74e9 + 4 * 6.47e9   # weights and general importance at the very least
    for changes in ({"finetune": True}, {"domains": ("healthcare", "legal", "finance")}, {"formula": "taylor"}, {"dtype": "float32"}):
        assert of(**changes)[0] >= memory and of(**changes)[1] >= time_
    for changes in ({"halves": False}, {"seqlen": 128}):
        assert of(**changes)[0] < memory and of(**changes)[1] < time_


def test_remedies_fit_and_the_least_harmful_comes_first():
    model, config = estimate.blank_model("starter"), RunConfig(finetune=True, formula="taylor", seqlen=512)
    needed = sum(estimate.peak_memory(config, model, "cpu").values())
    found = estimate.remedies(config, model, "cpu", needed - 1)
    assert found[0].changes == {"halves": False} and all(r.bytes < needed for r in found)
    assert all(sum(estimate.peak_memory(dataclasses.replace(config, **r.changes), model, "cpu").values()) == r.bytes for r in found)
    least = min(r.bytes for r in found)
    together = estimate.remedies(config, model, "cpu", least - 1)
    assert len(together) == 1 and together[0].changes["halves"] is False and together[0].changes["dtype"] == "bfloat16"
    assert estimate.remedies(config, model, "cpu", 10**6) == []

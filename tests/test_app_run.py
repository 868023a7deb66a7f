"""The page Run: what it says of runs that wait, run, fail and end, and the form for a new one."""

import base64
import dataclasses
import gzip
import io
import json
import math
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save
from families import tiny_encoder
from streamlit.testing.v1 import AppTest
from transformers import AutoModelForCausalLM, LlamaConfig

from analysis import heads
from app import sofar, state, uploads
from dpruner import InputError, RunConfig, cli, estimate, hub, loading, pipeline, store, turns, worker
from dpruner.calibration import load_texts
from dpruner.model import count_weights, skipped_weights
from dpruner.store import Run
from dpruner.units import size

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
    me = {**turns.identity(), "born": time.time()}
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
                                         "Jaccard": f"{found['jaccard']:.3f}", "Half text: two domains": f"{found['halves']:.3f}",
                                         "Half text: same domain": f"{found['ceiling']:.3f}"}]
    assert any(m.value == f"##### {PARTING}" for m in at.markdown) and "The domains part most in layer" in words(at)
    changed = small.summary["lambda"]["legal"]
    assert f"**{100 * changed['changed'] / changed['of']:.2f} %** of the mask decisions for legal" in words(at)


def test_a_waiting_and_a_running_run_say_where_they_are(runs):
    written(runs / "20300101-a", state="running", stage="domain importance", about="legal", done=3, total=8, progress=0.42,
            eta_seconds=95.0)
    written(runs / "20300102-b", device="cpu", ahead=2)
    (runs / "20300101-a" / "log.txt").write_text("first\nlast words\n")
    at = opened(**{"log-20300101-a": True})
    assert "**20300102-b** waits: 2 runs before it on cpu." in words(at)
    written(runs / "20300103-c", device="cpu", ahead=1)
    said = words(calm(at.run()))
    assert said.index("**20300101-a** is running") < said.index("**20300103-c** waits: 1 run ") < said.index("**20300102-b** waits")   # as they will go
    bar = at.get("progress")[0]
    assert bar.proto.value == 42 and bar.proto.text == "domain importance · legal · step 4 of 8 · 42 % · about 2 min left"
    assert "first\nlast words" in words(at)
    written(runs / "20300101-a", state="running", progress=1.0, eta_seconds=0.0)
    assert calm(at.run()).get("progress")[0].proto.text.endswith("100 % · nearly done")


@pytest.fixture
def ended(runs, monkeypatch):
    """A run that goes and one that waits; ids of those that are cancelled."""
    written(runs / "20300101-a", state="running")
    written(runs / "20300102-b")
    found = []
    monkeypatch.setattr(worker, "cancel", lambda run: (found.append(run.id), written(run.folder, state="cancelled")))
    return found


def test_cancel_ends_the_run_it_stands_beside(ended):
    at = opened()
    calm(at.button(key="run-cancel-20300102-b").click().run())
    assert ended == ["20300102-b"] and "**20300102-b** was cancelled" in words(at) and "**20300101-a** is running" in words(at)


def test_a_cancel_that_was_pressed_while_another_run_ended_is_not_lost(runs, ended):
    at = opened()
    written(runs / "20300101-a", state="cancelled")   # the page does not know it yet
    calm(at.button(key="run-cancel-20300102-b").click().run())
    assert ended == ["20300102-b"]


def test_what_a_cancelled_run_has_left_is_told_as_it_is(runs):
    written(runs / "20300101-a", state="cancelled", stage="waiting for the device")
    written(runs / "20300102-b", state="cancelled", stage="domain importance")
    (runs / "20300101-a" / worker.LOG).write_text("Cancelled.")
    (runs / "20300102-b" / "partial").mkdir()
    at = opened()
    assert "**20300101-a** was cancelled before it had finished anything." in words(at)
    assert "**20300102-b** was cancelled. What it had finished is still in its folder." in words(at)


def test_failed_killed_and_damaged_runs_are_one_sentence_each_and_the_page_goes_on(runs):
    gated = {"what": "The model 'x' could not be loaded", "why": "it is gated", "what to do": "log in"}
    written(runs / "20300101-failed", state="failed", error=gated)
    written(runs / "20300102-killed", state="running", pid=2**22 - 1)
    written(runs / "20300103-damaged")
    (runs / "20300103-damaged" / "status.json").write_text("{")
    at = opened()
    assert "**20300101-failed** · The model 'x' could not be loaded: it is gated; log in." in words(at)
    assert "**20300102-killed** · The run stopped in the middle: " in words(at)
    assert "**20300103-damaged** · The file" in words(at) and "it is damaged or of another format; delete its folder and run again." in words(at)
    assert len(at.error) == 3 and at.dataframe and not start(at).disabled


def test_old_failures_are_not_told_again_once_a_later_run_is_finished(runs):
    written(runs / "20000101-failed", state="failed", error={"what": "Old", "why": "so", "what to do": "nothing"})
    assert not opened().error


def test_a_damaged_table_of_the_newest_run_is_one_sentence(runs, small):
    (runs / small.run.id / "metrics.parquet").write_bytes(b"no table")
    at = opened()
    assert "metrics.parquet cannot be read" in at.error[0].value and not start(at).disabled


DAMAGED = ("status.json", "run.json", "metrics.parquet", "stats.parquet", "masks", "ranks", "edges")
READ = {"run": {"metrics.parquet", "masks"}, "layers": {"stats.parquet", "edges", "masks"},
        "overlap": {"metrics.parquet", "ranks", "edges", "masks"},
        "similarity": {"masks"}, "explore": {"masks"}, "generate": {"masks"}, "results": {"metrics.parquet", "masks"}}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_a_sentence_on_the_pages_that_read_it_and_they_go_on(what, runs, small):
    older = runs / "20000101-older"   # another run to fall back on
    shutil.copytree(runs / small.run.id, older)
    path = runs / small.run.id / what
    for file in path.glob("*") if path.is_dir() else [path]:
        file.write_bytes(b'{"state": "x"}')   # well-formed JSON, but no status and no record
    for page, read in READ.items():
        at = AppTest.from_file(MAIN, default_timeout=60)
        at.switch_page(f"views/{page}.py")
        at.query_params["run"] = small.run.id
        calm(at.run())
        said = [e.value for e in at.error if small.run.id in e.value]
        assert len(said) == len(at.error)
        if what in read or what == "status.json" and page == "run":
            assert said and all(f"{Path(what).stem}" in s and "it is damaged or of another format" in s for s in said)
        elif what not in ("run.json", "status.json"):
            assert not said
        if what == "status.json":   # such a run cannot be chosen; the page Run names it
            assert at.selectbox(key="run").options == [older.name]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"config": []}', '{"config": {}, "model": 3}', "[" * 99_999])
def test_a_record_or_status_that_is_none_is_a_sentence(content, runs, small):
    for name in ("run.json", "status.json"):
        (runs / small.run.id / name).write_text(content)
        at = opened()
        assert f"{name} cannot be read: it is damaged or of another format" in words(at) and not start(at).disabled
        shutil.copy(small.run.folder / name, runs / small.run.id / name)


def test_a_run_without_masks_is_a_sentence(runs, small):
    shutil.rmtree(runs / small.run.id / "masks")
    assert f"The run {small.run.id} holds no masks: its files were deleted" in words(opened())


@pytest.mark.parametrize("page", READ)
def test_a_run_that_is_deleted_while_it_is_shown_gives_way_to_another(page, runs, small, submitted):
    shutil.copytree(runs / small.run.id, runs / "20000101-older")
    at = AppTest.from_file(MAIN, default_timeout=60)
    at.switch_page(f"views/{page}.py")
    calm(at.run())
    assert at.selectbox(key="run").value == small.run.id
    shutil.rmtree(runs / small.run.id)
    calm(at.run())
    assert at.selectbox(key="run").value == "20000101-older" and not at.error
    shutil.rmtree(runs / "20000101-older")
    calm(at.run())
    assert not at.error and len(submitted) == 1   # the demonstration, as on the first day
    assert page == "run" or "There is no finished run yet." in at.info[0].value


def test_a_run_that_ended_badly_can_go_on(runs, monkeypatch):
    gone_on = []
    monkeypatch.setattr(worker, "resume", lambda run, cache, memory: (gone_on.append((run.id, cache, memory)), written(run.folder, state="queued")))
    written(runs / "20300101-a", state="cancelled")
    written(runs / "20300102-b", state="failed", error={"what": "It", "why": "stopped", "what to do": "resume it"})
    at = opened(shown="20300101-a")
    at.text_input(key="run-resume-20300102-b-memory").set_value(" 2GB ")
    calm(at.button(key="run-resume-20300102-b").click().run())
    assert gone_on == [("20300102-b", state.CACHE, "2GB")] and "**20300102-b** waits" in words(at)
    calm(at.button(key="run-resume-shown").click().run())
    assert gone_on[1:] == [("20300101-a", state.CACHE, None)]


def test_what_cannot_go_on_is_said(runs, monkeypatch):
    written(runs / "20300101-a", state="cancelled", config=RunConfig(device="cuda:7"))
    at = opened()
    calm(at.button(key="run-resume-20300101-a").click().run())
    assert at.error[0].value.startswith("The device 'cuda:7' cannot be used")


# What a running run has found so far


def growing(runs: Path, small, pieces: dict[str, pd.DataFrame], masks=()) -> Run:
    """A running run that has so much of the small one."""
    folder = runs / "20300101-growing"
    shutil.copytree(small.run.folder, folder, ignore=shutil.ignore_patterns("*.parquet", "*@*"))
    store.write_json(folder / "run.json", small.run.record)
    for name, table in pieces.items():
        store.write_table(folder / "partial" / f"{name}.parquet", table)
    for name in masks:
        shutil.copy(small.run.folder / "masks" / f"{name}.safetensors", folder / "masks")
    me = turns.identity()
    store.write_json(folder / "status.json", {**worker.WAITING, **me, "state": "running", "stage": "domain importance", "about": "legal"})
    return Run(folder)


PARTING = "Where do the domains part?"   # of the latest result


def charts(at: AppTest) -> dict[str, dict]:
    """{title: figure} of the runs that are under way."""
    titles = [m.value.removeprefix("##### ") for m in at.markdown if m.value.startswith("##### ")]
    found = dict(zip(titles, (json.loads(c.proto.spec) for c in at.get("plotly_chart")), strict=True))
    return {title: figure for title, figure in found.items() if title != PARTING}


def test_before_there_is_a_figure_it_says_what_is_done_and_shows_what_is_read(runs, small):
    growing(runs, small, {})
    at = opened()
    assert ("The model **llama** loses **50 %** of its prunable weights, twice, each time from the full model, for **healthcare** and "
            "**legal**.") in words(at)
    assert "**Now:** for every weight, what removing it would cost on text of this domain" in words(at) and not charts(at)
    assert [c.value for c in at.caption if "It reads" in c.value] == ["It reads **healthcare**, such as", "It reads **legal**, such as"]
    text = load_texts("legal")[0]
    assert at.text[1].value.endswith(" …") and text.split()[:9] == at.text[1].value.split()[:9]


def test_what_is_found_grows_with_every_file(runs, small):
    metrics, stats = small.run.metrics(), small.run.stats()
    metrics, stats = metrics.set_index("method", drop=False), stats[stats.method == "dpruner"].set_index("domain", drop=False)
    mine = metrics.loc["dpruner"][metrics.loc["dpruner"].domain == "healthcare"]
    pieces = {"dense": metrics.loc["dense"], "dpruner@healthcare": mine, "stats of dpruner@healthcare": stats.loc["healthcare"]}
    run = growing(runs, small, pieces, ["dpruner@healthcare", "random@healthcare"])
    at = opened()
    heads, pairs = charts(at).values()
    assert list(charts(at)) == ["What dpruner keeps of every attention head", "Every pair of masks between chance and sameness"]
    assert len(heads["data"]) == 2 and "legal</b><br>still to come" in heads["layout"]["annotations"][1]["text"]
    assert "healthcare · healthcare by random" in str(pairs["layout"]["yaxis"]["categoryarray"])
    quality = next(d.value for d in at.dataframe if d.value.eq("…").any(axis=None))
    assert list(quality.columns) == ["Text", "Pruned for", "dense", "dpruner"]
    value = mine[(mine.text == "general") & (mine.metric == "perplexity")].value
    assert quality[(quality["Pruned for"] == "healthcare") & (quality.Text == "general")].dpruner.item().startswith(f"{value.item():.0f} (")
    assert quality[quality["Pruned for"] == "legal"].dpruner.tolist() == ["…", "…"]

    store.write_table(run.folder / "partial" / "stats of dpruner@legal.parquet", stats.loc["legal"])
    store.write_table(run.folder / "partial" / "halves@legal.parquet", metrics[metrics.metric == "jaccard ceiling"])
    for name in ("legal", "healthcare~1", "healthcare~2", "legal~1", "legal~2"):
        shutil.copy(small.run.folder / "masks" / f"dpruner@{name}.safetensors", run.folder / "masks")
    heads, pairs = charts(calm(at.run())).values()
    assert len(heads["data"]) == 4 and "still to come" not in str(heads["layout"]["annotations"])
    assert len(pairs["layout"]["yaxis"]["categoryarray"]) == 2 and "same domain" in str(pairs)
    found = next(s for s in small.summary["similarity"] if s["method"] == "dpruner")
    for name, value in (("all their text", "jaccard"), ("from half the text each", "halves")):
        points = next(t for t in pairs["data"] if t.get("name") == f"the two domains, {name}")
        told = dict(zip(points["y"], numbers(points["x"]), strict=True))
        assert told["healthcare · legal"] == pytest.approx(found[value])

    (run.folder / "masks" / "dpruner@legal.safetensors").write_bytes(b"torn")
    (run.folder / "partial" / "dense.parquet").write_bytes(b"torn")
    assert len(charts(calm(at.run()))) == 2 and not at.error   # what cannot be read is not there yet


def numbers(values) -> list[float]:
    """Numbers of a figure as they travel: plain, or packed."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist() if isinstance(values, dict) else values


def test_the_share_of_a_head_is_what_its_columns_keep(small):
    places, masks = small.run.record["model"]["heads"], small.run.masks("dpruner", "legal")
    stats = small.run.stats()
    found = heads.head_shares(stats[(stats.method == "dpruner") & (stats.domain == "legal")], places)
    name = "model.layers.1.self_attn.o_proj.weight"
    axis, size = places[name]
    assert axis == "column" and set(found.block) == {0, 1, 2}
    for row in found[found.block == 1].itertuples():
        part = masks[name][:, row.head * size:(row.head + 1) * size]
        assert (row.kept, row.weights) == (int(part.sum()), part.numel()) and row.kept_share == row.kept / row.weights
    made = heads.head_squares({"legal": found}, ["healthcare", "legal"], "dpruner")
    assert made.table.domain.unique().tolist() == ["legal"] and f"{found.kept_share.max():.1%}".replace("%", " %") in made.alt
    assert heads.head_squares({}, ["legal"], "dpruner") is None
    assert heads.head_squares({"legal": found.assign(kept_share=0.5)}, ["legal"], "dpruner") is None


def test_every_stage_is_explained():
    source = "".join(path.read_text() for path in Path(store.__file__).parent.glob("*.py"))
    stages = set(re.findall(r'stage="([a-z ]+)"', source)) | {"loading model and text", "domain importance", "compensation"}
    assert stages <= set(sofar.NOW)


def test_when_a_run_ends_the_page_shows_it_and_the_sidebar_follows(runs, small):
    shutil.copytree(runs / small.run.id, runs / "29991231-newer")
    at = opened()
    assert at.selectbox(key="run").value == "29991231-newer"
    at.session_state["run-active"] = {small.run.id}   # it was running when this session last looked
    calm(at.run())
    assert at.session_state["run-active"] == set() and at.dataframe and at.selectbox(key="run").value == small.run.id
    calm(at.selectbox(key="run").set_value("29991231-newer").run())
    assert at.selectbox(key="run").value == "29991231-newer"


def test_the_demonstration_is_started_once_where_there_is_no_run(tmp_path, monkeypatch, submitted):
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    at = opened()
    opened()
    assert [c.domains for c in submitted] == [("healthcare", "legal", "finance")] and not start(at).disabled
    assert "waits: its process is starting." in words(at)


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
    deletes = [b.key for b in at.button if b.label == "Yes, delete it"]
    calm(at.button(key=f"run-delete-{small.run.id}").click().run())
    assert [b.key for b in at.button if b.label == "Yes, delete it"] != deletes, "a second click must not reach the next run"
    assert not list(runs.rglob(f"*{small.run.id}*"))
    calm(at.selectbox(key="run-shown").set_value(running.id).run())
    assert "This run is not over: the top of the page shows how far it is." in words(at)
    calm(at.button(key=f"run-delete-{running.id}").click().run())
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
    at.selectbox(key="run-baseline_calibration").set_value("mix")
    at.text_input(key="run-memory").set_value("16GB")
    calm(at.run())
    calm(start(at).click().run())
    assert submitted == [RunConfig(domains=("legal", "code"), methods=("dpruner", "wanda"), sparsity=0.6, formula="taylor", lam=0.3,
                                   nsamples=5, halves=False, dtype="bfloat16", baseline_calibration="mix", memory="16GB", eval_documents=10)]
    assert "**20300101-000001-new** waits" in words(at)
    assert at.session_state["_run-started"] == "20300101-000001-new", "the page goes to its top, where the run is seen"


def test_a_negative_weight_of_the_general_side_is_refused(runs, submitted):
    at = opened()
    at.number_input(key="run-lam").set_value(-1.0)
    calm(at.run())
    assert start(at).disabled and "lam" in words(at) and "-1" in words(at)


def test_an_amount_of_memory_that_is_none_is_refused(runs, submitted):
    at = opened()
    at.text_input(key="run-memory").set_value("plenty")
    calm(at.run())
    assert start(at).disabled and "The memory 'plenty' is not known" in words(at)


def test_the_memory_limit_stands_in_the_address(runs, submitted):
    at = AppTest.from_file(MAIN, default_timeout=60)
    at.query_params["run-memory"] = "16GB"
    assert calm(at.run()).text_input(key="run-memory").value == "16GB"
    calm(start(at).click().run())
    assert submitted[0].memory == "16GB"


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
    ({"source": "folder", "folder": "a\0b"}, "it holds characters that cannot be written"),
    ({"catalogue": ["mednli"], "preview": "mednli"}, "The hub data set 'mednli' cannot be downloaded: it has no public copy"),
])
def test_what_cannot_work_is_said_beside_the_form(fields, sentence, runs):
    assert sentence in words(opened(**fields))


def test_what_cannot_work_cannot_be_started(runs):
    assert start(opened(seqlen=513)).disabled and not start(opened(seqlen=512)).disabled


def test_a_model_that_cannot_be_pruned_is_one_sentence(runs, llama, tmp_path, monkeypatch, submitted):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(llama)
    (tmp_path / "file").touch()
    save(tiny_encoder(), tmp_path / "encoder")
    for name, config in (("new", '{"model_type": "nothing-of-this-name"}'), ("torn", "{"),
                         ("odd", '{"model_type": "llama", "hidden_size": "x"}'),
                         ("seq2seq", '{"model_type": "t5"}'), ("code", '{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").touch()
    at = opened(source="folder")
    for folder, sentence in {
        "file": "was not found: there is no folder of that name", "~": "holds no model: it has no config.json", "~/no": "was not found",
        "~nobody/x": "was not found", "x" * 5000: "was not found", "/dev/null": "was not found",
        "encoder": "BertLMHeadModel cannot be pruned here: later tokens change its earlier predictions, so it is an encoder",
        "seq2seq": "t5 is not a decoder that predicts the next token", "new": "its architecture is not known to the installed transformers",
        "torn": "is not a valid JSON file", "odd": "hidden_size", "code": "it wants to run its own code, which is never allowed here",
    }.items():
        calm(at.text_input(key="run-folder").set_value(folder).run())
        assert len(at.error) == 1 and sentence in at.error[0].value and start(at).disabled, folder
    for folder in ("mine", "./mine", "~/mine", str(llama)):
        calm(at.text_input(key="run-folder").set_value(folder).run())
        calm(start(at).click().run())
        assert not at.error and Path(submitted[-1].model).is_absolute() and Path(submitted[-1].model).samefile(llama)


def test_a_hub_id_that_is_none_is_one_sentence(runs):
    at = opened(source="hub")
    for name in ("a/b/c", "a b", "../no-folder-of-this-name", "-", "é/ü", "x" * 300, "https://huggingface.co/a/b", "~", "a\0b", "a/b:c", "nobody/nothing"):
        calm(at.text_input(key="run-hub").set_value(name).run())
        assert len(at.error) == 1 and any(said in at.error[0].value for said in ("was not found", "could not be loaded", "cannot be written")), name
        assert start(at).disabled


@pytest.mark.parametrize(("field", "value", "said"), [
    ("nsamples", -5, "a count of 1 or more"), ("seqlen", 1, "a count of 2 or more"), ("epochs", 0, "a count of 1 or more"),
    ("seed", -1, "a count of 0 or more"), ("eval_documents", 0, "a count of 1 or more")])
def test_a_number_that_cannot_be_used_is_said_and_nothing_can_be_started(runs, submitted, field, value, said):
    at = opened()
    before = at.number_input(key=f"run-{field}").value
    at = calm(at.number_input(key=f"run-{field}").set_value(value).run())
    assert f"{field} = {value} cannot be used: it is {said}; give a larger number." in [e.value for e in at.error] and start(at).disabled
    at = calm(at.number_input(key=f"run-{field}").set_value(before).run())
    assert [e.value for e in at.error] == [] and not start(at).disabled and submitted == []


def test_numbers_that_only_a_changed_browser_sends_do_not_get_through(runs, submitted):
    at = opened()
    at.number_input(key="run-lam").set_value(math.nan)
    at.slider(key="run-sparsity").set_value(150)
    calm(at.run())
    calm(start(at).click().run())
    assert submitted == [RunConfig(methods=("dpruner", "magnitude"), eval_documents=10)]   # the defaults


def test_nonsense_in_the_address_gives_way(runs, small):
    at = AppTest.from_file(MAIN, default_timeout=60)
    nonsense = {"source": "zzz", "domains": "nonsense", "catalogue": "zz", "methods": "zz", "sparsity": "999", "sparsity_of": "zz",
                "granularity": "9:1", "formula": "nonsense", "lam": "much", "nsamples": "many", "seqlen": "-", "epochs": "abc",
                "finetune": "maybe", "halves": "?",
                "evaluate": "", "general_mode": "x", "eval_documents": "nan", "seed": "1e30", "device": "zz", "dtype": "zz",
                "compensate": "zz", "baseline_calibration": "zz", "shown": "../.."}
    for name, value in nonsense.items():
        at.query_params[f"run-{name}"] = value
    for name, value in {"run": "nonsense", "method": "x", "domain": "x", "block": "x", "module": "x", "sparsity": "-1", "new": "x"}.items():
        at.query_params[name] = value
    calm(at.run())
    assert not at.error and not start(at).disabled
    values = {name: at.session_state[f"run-{name}"] for name in nonsense}
    assert values == {"source": "starter", "domains": ["healthcare", "legal"], "catalogue": [], "methods": ["dpruner", "magnitude"],
                      "sparsity": 50, "sparsity_of": "prunable", "granularity": "matrix", "formula": "balanced", "lam": None,
                      "nsamples": 64, "seqlen": 128,
                      "epochs": 5, "finetune": False, "halves": True, "evaluate": True, "general_mode": "sequential", "eval_documents": 10,
                      "seed": 0, "device": None, "dtype": None, "compensate": "none", "baseline_calibration": "general", "shown": small.run.id}
    assert {name: at.session_state[name] for name in state.KEYS} == {
        "run": small.run.id, "method": "dpruner", "domain": "healthcare", "block": 0, "module": "self_attn.q_proj", "sparsity": 50}


@pytest.mark.parametrize("source", ["Hugging Face hub", "A folder on this machine"])
def test_the_address_restores_the_form(source, runs):
    at = AppTest.from_file(MAIN, default_timeout=60)
    field = {"Hugging Face hub": "run-hub", "A folder on this machine": "run-folder"}[source]
    for name, value in {"run-source": source, field: "some/where", "run-nsamples": "7", "run-methods": "wanda"}.items():
        at.query_params[name] = value
    calm(at.run())
    assert at.text_input(key=field).value == "some/where" and at.number_input(key="run-nsamples").value == 7
    assert at.multiselect(key="run-methods").value == ["wanda"] and "some/where" in at.error[0].value


def test_too_little_memory_is_said_with_what_would_help(runs, monkeypatch):
    config, model = RunConfig(methods=("dpruner", "magnitude"), eval_documents=10), loading.blank_model("starter")
    needed = sum(estimate.peak_memory(config, model, "cpu").values())
    monkeypatch.setattr(estimate, "available_memory", lambda device: needed)
    at = opened()
    assert not at.warning and "wait in files" not in words(at)
    monkeypatch.setattr(estimate, "available_memory", lambda device: needed - 1)
    at = opened()
    assert not at.warning and f"It would take {size(needed)}: so weights, scores and masks of about" in words(at)
    monkeypatch.setattr(estimate, "available_memory", lambda device: 10**6)
    assert "no setting changes that" in opened().warning[0].value
    config = dataclasses.replace(config, seqlen=512)
    least = sum(estimate.peak_memory(config, model, "cpu", estimate.plan_of(config, model)).values())
    monkeypatch.setattr(estimate, "available_memory", lambda device: least + 10**6)
    said = estimate.cautions(dataclasses.replace(config, memory="16GB"), model, "cpu", estimate.Plan())   # more than there is
    assert len(said) == 1 and "keep to a limit" in said[0]
    monkeypatch.setattr(estimate, "available_memory", lambda device: least - 10**6)
    at = opened(seqlen=512)
    said = at.warning[0].value
    helpful = estimate.remedies(config, model, "cpu", least - 10**6)
    assert "not fit into memory" in said and helpful and all(r.words in said for r in helpful)


def test_the_card_knows_the_model_and_says_what_zeros_are_worth(runs):
    said = words(opened())
    assert "**LlamaForCausalLM** can be pruned: 8 blocks, 9,912,320 of 12,539,200 weights (79 %)." in said
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


def test_a_file_that_was_brought_can_be_deleted_once_no_run_reads_it(runs, submitted):
    at = opened()
    at.file_uploader(key="run-upload").upload("secret.txt", (b"A paragraph of words. " * 9 + b"\n\n") * 99, "text/plain")
    calm(at.run())
    path, = uploads.saved(runs)
    config = RunConfig(domains=("legal", f"secret={path.absolute()}"))
    for going in (True, False):
        written(runs / "20300101-a", config, state="running" if going else "cancelled")
        calm(at.button(key=f"run-file-delete-{path.relative_to(runs / 'uploads')}").click().run())
        assert [e.value for e in at.error] == ["The file 'secret.txt' cannot be deleted: the run 20300101-a reads it; wait until it has ended, or cancel "
                                               "it."] * going
        assert path.is_file() == going
    assert not path.parent.exists() and not start(at).disabled   # nor does it come back, though the uploader still holds it
    calm(at.run())
    assert not uploads.saved(runs)


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.exe", b"x", "its type is not supported"),
    ("a.parquet.gz", b"x", "its type is not supported"),
    ("a.txt", b"", "it is empty"),
    ("a.txt", b"x" * 101, "is too large"),
    ("a.txt.gz", gzip.compress(b"x" * 1001, mtime=0), "is too large"),
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


def parquet(**columns) -> bytes:
    stream = io.BytesIO()
    pd.DataFrame(columns).to_parquet(stream)
    return stream.getvalue()


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.txt", b"", "'a.txt' cannot be used: it is empty"),
    ("a.txt.gz", b"\x1f\x8b\x08\0broken", "'a.txt.gz' cannot be read: it is no complete gzip file"),
    ("a.txt", bytes(range(256)), "'a.txt' cannot be read: it is binary, not text"),
    ("a.csv", "h\xe9,b\nx,y\n".encode("latin-1"), "'a.csv' cannot be read: it is not UTF-8 text; save it as UTF-8."),
    ("a.csv", b"a,b\n1,2\n", "'a.csv' cannot be read: none of its columns (a, b) holds text"),
    ("a.csv", b'"a,b\n', "'a.csv' cannot be read: it is not a well-formed csv file"),
    ("a.csv", b"a\n", "'a.csv' cannot be read: it has no rows"),
    ("a.parquet", b"PAR1", "'a.parquet' cannot be read: it is not a well-formed parquet file"),
    ("a.parquet", parquet(text=["word " * 99] * 9)[:-9], "'a.parquet' cannot be read: it is not a well-formed parquet file"),
    ("a.parquet", parquet(n=[1, 2]), "'a.parquet' cannot be read: none of its columns (n) holds text"),
    ("a.jsonl", b'{"text": "a"}\n{', "'a.jsonl' cannot be read: it is not a well-formed json file"),
    ("a.json", b"null", "'a.json' cannot be read: it is not a well-formed json file: its row 1 is null, not an object"),
    ("a.json", b'{"a":' * 99_999, "'a.json' cannot be read: it is not a well-formed json file (maximum recursion depth"),
    ("a.md", b" \n", "No text was found in 'a.md': all of it is blank"),
    ("a.txt", b"Two words.", "No text of 'a.txt' can be held out: it takes 5 documents"),
    ("a.csv", b"text,n\nTwo words.,1\n", "No text of 'a-text-982d.jsonl' can be held out"),
])
def test_a_file_that_cannot_be_used_is_one_sentence(name, content, sentence, runs, submitted):
    at = opened()
    at.file_uploader(key="run-upload").upload(name, content, "text/plain")
    calm(at.run())
    assert len(at.error) == 1 and sentence in at.error[0].value
    if not uploads.saved(runs):   # refused at the door: the form is as it was
        assert not start(at).disabled
        return
    assert start(at).disabled
    calm(at.multiselect(key="run-files").set_value([]).run())
    assert not at.error and not start(at).disabled


def test_one_bad_file_does_not_keep_out_the_others(runs, submitted):
    at = opened()
    for name, content in (("bad.csv", b"a\n1\n"), ("empty.txt", b""), ("good.txt", (b"A paragraph of words. " * 9 + b"\n\n") * 99)):
        at.file_uploader(key="run-upload").upload(name, content, "text/plain")
    calm(at.run())
    assert len(at.error) == 2 and start(at).disabled and "Take bad.csv out of *Your files* first" in words(at)
    assert at.selectbox(key="run-preview").options == ["healthcare", "legal", "good"]
    calm(at.multiselect(key="run-files").set_value([n for n in at.session_state["run-files"] if n.startswith("good")]).run())
    calm(start(at).click().run())
    assert [d.split("=")[0] for d in submitted[0].domains] == ["healthcare", "legal", "good"]


# What it will take


def test_a_model_without_weights_counts_as_the_model_itself(starter):
    blank = loading.blank_model("starter")
    assert count_weights(blank) == count_weights(starter[0]) and skipped_weights(blank) == {}
    assert all(p.device.type == "meta" for p in blank.parameters())


@pytest.mark.parametrize("settings", [
    {"methods": ("dpruner", "magnitude", "random")}, {"methods": ("sparsegpt", "magnitude")}, {"methods": ("dpruner", "magnitude"), "compensate": "walk"},
    {"methods": ("dpruner", "magnitude"), "compensate": "walk", "fisher": "domain", "sides": False},
    {"methods": ("sparsegpt", "wanda"), "compensate": "after", "dtype": "bfloat16"}])
def test_disk_is_what_the_run_takes(settings, small, tmp_path):
    config = dataclasses.replace(small.config, evaluate=False, **settings)
    run = pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")
    files = [p for p in tmp_path.rglob("*.safetensors") if p.parent.name != "edges"]
    taken, heads = sum(p.stat().st_size for p in files), len(files) * 5000   # names and shapes, which count in a model this tiny only
    assert run.status["state"] == "done" and taken - heads < estimate.disk(config, loading.blank_model(config.model)) < taken


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
    passing = {"evaluate": False, "formula": "taylor"}   # whose pass with gradients is the worst moment, and not the pruned model
    assert of(seqlen=128, **passing)[0] < of(**passing)[0] and of(evaluate=False)[0] < memory and of(seqlen=128)[1] < time_
    assert of(halves=False)[0] == memory and of(halves=False)[1] < time_   # one set of scores at a time


def test_remedies_fit_and_the_least_harmful_comes_first():
    model, config = loading.blank_model("starter"), RunConfig(finetune=True, formula="taylor", seqlen=512)
    needed = sum(estimate.peak_memory(config, model, "cpu").values())
    found = estimate.remedies(config, model, "cpu", needed - 1)
    assert found[0].changes.keys() == {"memory"} and found[1].changes == {"dtype": "bfloat16"} and all(r.bytes < needed for r in found)
    assert all(sum(estimate.peak_memory(dataclasses.replace(config, **r.changes), model, "cpu").values()) == r.bytes for r in found)
    least = sum(estimate.peak_memory(dataclasses.replace(config, memory="1KB"), model, "cpu").values())   # of the most sparing plan
    within = estimate.remedies(config, model, "cpu", least - 1)
    assert within and all(r.bytes < least and "memory" not in r.changes for r in within)
    assert estimate.remedies(config, model, "cpu", 10**6) == []

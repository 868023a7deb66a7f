"""The page Learn: every step against the engine, a lesson that is still being computed, a sentence of one's own, the user's own run."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest
from pages import figure, shown

from analysis.chart import number
from analysis.lesson import numbers, prepare
from app import demo, resident, state
from app.lesson import counting, job
from dpruner import InputError, store, worker
from dpruner.domain import domain_importance
from dpruner.formulas import FORMULAS
from dpruner.loading import load_model
from dpruner.masks import make_masks
from dpruner.model import prunable_linears
from dpruner.store import Run

MAIN = str(Path(__file__).parents[1] / "app" / "main.py")
STEPS = ("Why", "Linear", "Columns", "Sentence", "Plane", "Sparsity", "Predict", "Similarity", "Speed")


@pytest.fixture
def learn(lesson, small, tmp_path, monkeypatch):
    """The lesson, and beside it one run of the user's own; nothing is started."""
    shutil.copytree(small.runs, tmp_path / "runs")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(state, "CACHE", lesson.cache)
    return lesson


@pytest.fixture
def unfinished(lesson, tmp_path, monkeypatch) -> Run:
    """A lesson of which only the texts are there, its process at work."""
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(state, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(demo, "ensure", lambda: None)
    run = Run(tmp_path / "cache" / "lesson" / job.key())
    shutil.copytree(lesson.run.folder, run.folder)
    for name in set(prepare.PARTS) - {"words.json"}:
        (run.folder / name).unlink()
    store.write_json(run.folder / "status.json", {**worker.WAITING, **worker.turns.identity(), "state": "running", "stage": "ten sparsities",
                                                  "progress": 0.4, "eta_seconds": 21.0})
    return run


def opened(step: str, **session) -> AppTest:
    """The page at a step, drawn with these widget values; underscores in names stand for dashes."""
    page = AppTest.from_file(MAIN, default_timeout=60)
    page.switch_page("views/learn.py")
    page.session_state["learn-step"] = step
    for key, value in session.items():
        page.session_state[f"learn-{key.replace('_', '-')}"] = value
    page.run()
    assert not page.exception, page.exception
    return page


def words(page: AppTest) -> str:
    kinds = (page.markdown, page.caption, page.info, page.error, page.latex, page.success, page.subheader)
    return "\n".join(str(e.value) for kind in kinds for e in kind)


def metrics(page: AppTest) -> dict[str, str]:
    return {m.label: m.value for m in page.metric}


def layer(lesson) -> dict[str, torch.Tensor]:
    return store.read_tensors(lesson.run.folder / "layer.safetensors")


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_complete_without_a_click(learn, step):
    page = opened(step)
    assert not page.error and f"{STEPS.index(step) + 1}. " in page.subheader[0].value
    said = words(page)
    assert "Try." in said and "Check yourself." in said and "On my run" in said
    assert not [c.value for c in page.caption if "{" in c.value], "a name that was not filled in"
    assert step == "Predict" or page.get("plotly_chart")
    assert page.latex and len(page.expander) == 1 and len(page.expander[0].markdown[0].value) > 80   # a formula, and an answer
    assert max((len(e.proto.spec) for e in page.get("plotly_chart")), default=0) < 1_000_000


def test_back_and_next_go_through_all_steps(learn):
    page = opened("Why")
    assert [b.key for b in page.button if b.key in ("learn-back", "learn-next")] == ["learn-next"]
    for at, step in enumerate(STEPS[1:], 1):
        page.button(key="learn-next").click().run()
        assert page.session_state["learn-step"] == step and page.subheader[0].value.startswith(f"{at + 1}. ")
    assert [b.key for b in page.button if b.key in ("learn-back", "learn-next")] == ["learn-back"]
    page.button(key="learn-back").click().run()
    assert page.session_state["learn-step"] == STEPS[-2]


# ---- the steps


def test_why_shows_three_texts_and_their_perplexities(learn):
    found = store.read_json(learn.run.folder / "words.json")
    page = opened("Why", prompt=prepare.PROMPTS[1])
    texts = [e.proto.body for e in page.get("html")]
    for row in found["texts"]:
        assert any(html.escape(row["text"]) in text for text in texts) == (row["prompt"] == prepare.PROMPTS[1])
    said = words(page)
    for row in found["quality"]:
        assert f"Perplexity on {row['text']} text: **{number(row['value'])}** ({number(row['low'])} to {number(row['high'])})" in said


def test_linear_writes_the_chosen_weight_out(learn):
    tensors = layer(learn)
    row, column = 5, 7
    w, d, G = (float(t) for t in (tensors["seen"][row, column], tensors["U"][column, column], tensors["G"][row, column]))
    page = opened("Linear", row=row, column=column, view="d: cost G")
    said = words(page)
    assert w**2 / d**2 == pytest.approx(G, rel=1e-3)
    assert f"G_{{{row},{column}}}" in said and f"{float((tensors['G'] < G).float().mean()):.1%}".replace("%", " %") in said
    cells = figure(page, "learn-tile")["data"][-1]["customdata"]
    here = next(c for c in cells if c[:2] == [row, column])
    assert here[2:] == pytest.approx([w, d, G])
    assert (float((tensors["G"] < G).double().mean()) >= 0.5) == ("would **stay**" in said)


@pytest.mark.parametrize("view, name, cells", [("a: weights W", "W", 32), ("b: inputs H", "H", 32)])
def test_the_tile_moves_with_the_cell_and_shows_the_tensor(learn, view, name, cells):
    tensors = layer(learn)
    edge = tensors["W"].shape[0] - 1
    page = opened("Linear", row=edge, column=edge, view=view)
    made = figure(page, "learn-tile" if name == "W" else "learn-tile-inputs")
    first = edge + 1 - cells
    np.testing.assert_allclose(shown(made["data"][0]["z"]), tensors[name][first:, first:].numpy(), rtol=1e-6)


def test_a_cell_outside_the_matrix_gives_way(learn):
    page = opened("Linear", row=10_000, column=-3)
    assert page.number_input(key="learn-row").value == layer(learn)["W"].shape[0] - 1 and page.number_input(key="learn-column").value == 0


def test_columns_says_what_compensation_saves(learn):
    tensors = layer(learn)
    inputs = numbers.related_inputs(tensors["H"], 12)
    found = numbers.compensation(tensors["W"][:8][:, inputs], tensors["H"][inputs][:, inputs], 0.25)
    page = opened("Columns", share=25)
    assert metrics(page)["Output lost, zeros alone"] == f"{found.plain[-1]:.2%}".replace("%", " %")
    assert metrics(page)["Output lost, with compensation"] == f"{found.moved[-1]:.2%}".replace("%", " %")
    frames = json.loads(next(e.proto.spec for e in page.get("plotly_chart") if e.proto.id.endswith("learn-compensation")))["frames"]
    assert len(frames) == 13


@pytest.mark.parametrize("formula, power", [("balanced", 0), ("release", -1), ("release", 8), ("taylor", 11)])
def test_sentence_outlines_and_counts_what_flips(learn, formula, power):
    tensors, g = layer(learn), store.read_tensors(learn.run.folder / "sentence.safetensors")["g"]
    masks = [numbers.kept_by(formula, lam, tensors["W"], g, tensors["G"], 0.5) for lam in (10.0**power, 0.0)]
    flips = (masks[0] ^ masks[1]).numpy()
    page = opened("Sentence", formula=formula, **{f"power_{formula}": power})
    said = words(page)
    row = next(r for r in store.read_json(learn.run.folder / "flips.json")["rows"] if r["formula"] == formula and np.isclose(r["lam"], 10.0**power))
    assert f"| matrix | **{int(flips.sum()):,}** | {flips.size:,} |" in said and f"| model | **{row['from_zero']:,}** | {row['weights']:,} |" in said
    assert f"| tile | **{int(flips[:32, :32].sum()):,}** | 1,024 |" in said
    outlined = [t for t in figure(page, "learn-tile")["data"] if t["type"] == "scatter" and t["marker"].get("symbol") == "square-open"]
    assert sum(len(shown(t["x"])) for t in outlined) == flips[:32, :32].sum()


def test_a_sentence_of_ones_own_is_read_and_counted(learn):
    text = "The patient needs rest."
    model, tokenizer = load_model(learn.config.model)
    G = store.read_scores(next((learn.cache / "general").glob("*.safetensors")))
    ids = [torch.tensor([tokenizer(text).input_ids])]
    with_G, without = (make_masks(domain_importance(model, ids, G, "balanced", lam).dual, 0.5) for lam in (1.0, 0.0))
    page = opened("Sentence", sentence=text)
    said = words(page)
    assert f"Read as {ids[0].shape[1]} tokens" in said and not page.error
    name = next(iter(prunable_linears(model)))
    assert f"| matrix | **{int((with_G[name] ^ without[name]).sum()):,}** |" in said
    flips, of = sum(int((with_G[n] ^ without[n]).sum()) for n in with_G), sum(m.numel() for m in with_G.values())
    assert f"| model | **{flips:,}** |" in said and "counting" not in said
    curves = {t["name"]: t for t in figure(page, "learn-lambda")["data"] if "lines" in t["mode"]}
    assert set(curves) == set(FORMULAS) and flips / of in list(shown(curves["balanced"]["y"]))


def test_tile_and_matrix_stand_there_before_the_model_is_counted(learn, monkeypatch):
    """General importance is only needed for the model: without it the rest of the page is complete, and says what is missing."""
    def gone(run):
        raise InputError("The whole model cannot be counted", "it is gone", "make it anew")

    monkeypatch.setattr(job, "general", gone)
    page = opened("Sentence", sentence="The patient sleeps badly.")
    said = words(page)
    assert "| tile | **" in said and "| matrix | **" in said and "| model |" not in said
    assert "The whole model cannot be counted: it is gone; make it anew." in said and page.button(key="learn-next") and not page.error


def test_an_interrupted_count_goes_on_and_keeps_nobody_from_the_model(learn, monkeypatch):
    text, counted = "Rest and water help against a cold.", []
    monkeypatch.setattr(counting, "TOLD", 0)
    plain = numbers.changed
    monkeypatch.setattr(numbers, "changed", lambda *args: (counted.append(resident._turn.locked()), plain(*args))[1])
    monkeypatch.setattr(numbers.os, "cpu_count", lambda: 1)

    def click(done, of):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counting.counted(learn.run, text, "taylor", tell=click)
    assert counting.counted(learn.run, text, "taylor") is None
    told, before = [], len(counted)
    found = counting.counted(learn.run, text, "taylor", tell=lambda done, of: told.append((done, of)))
    matrices = told[0][1]
    assert told == [(done, matrices) for done in range(3, matrices)]
    assert len(counted) - before == matrices - 3 and not any(counted)
    assert found.from_zero.tolist() == counting.counted(learn.run, text, "taylor").from_zero.tolist()
    model, tokenizer = load_model(learn.config.model)
    G, ids = store.read_scores(next((learn.cache / "general").glob("*.safetensors"))), [torch.tensor([tokenizer(text).input_ids])]
    masks = [make_masks(domain_importance(model, ids, G, "taylor", lam).dual, 0.5) for lam in (1e11, 0.0)]
    assert found.from_zero.iloc[-1] == sum(int((masks[0][n] ^ masks[1][n]).sum()) for n in G)


@pytest.mark.parametrize("text, said", [(" ", "There is no sentence to read"), ("x" * 399, "too long"), ("rest " * 10_000, "too long"),
                                        ("🙂🙂🙂", "There is no word")])
def test_a_sentence_that_cannot_be_read_is_said_in_one_sentence(learn, text, said):
    page = opened("Sentence", sentence=text)
    assert len(page.error) == 1 and said in page.error[0].value and page.button(key="learn-next") and "Check yourself." in words(page)


def test_plane_counts_the_four_regions(learn):
    tensors = layer(learn)
    general, domain = (make_masks({"": tensors[side]}, s)[""].numpy() for side, s in (("G", 0.75), ("domain", 0.25)))
    page = opened("Plane", general=75, domain=25)
    table = page.dataframe[0].value.set_index("Region").Weights
    assert table["both keep"] == (general & domain).sum() and table["only the domain side keeps"] == (~general & domain).sum()
    assert table["neither keeps"] == (~general & ~domain).sum()
    assert f"both ({(general & domain).sum():,})" in [t.get("name") for t in figure(page, "learn-plane-place")["data"]]


def test_plane_and_similarity_show_the_users_own_run(learn, small):
    page = opened("Plane", mine=True)
    assert "self_attn.q_proj, healthcare" in words(page) and not page.error
    page = opened("Similarity", mine=True)
    found = next(s for s in small.summary["similarity"] if s["method"] == "dpruner")
    assert metrics(page)["Two domains"] == f"{found['jaccard']:.3f}"
    assert [metrics(page)[f"½ text: {n}"] for n in ("1 domain", "2 domains")] == [f"{found[side]:.3f}" for side in ("ceiling", "halves")]


@pytest.mark.parametrize("share", [0, 50, 90])
def test_sparsity_shows_mask_perplexity_and_text_together(learn, share):
    mask = make_masks({"": layer(learn)["dual"]}, share / 100)[""]
    rows = [r for r in store.read_json(learn.run.folder / "fall.json")["rows"] if round(100 * r["sparsity"]) == share]
    page = opened("Sparsity", sparsity=share)
    assert metrics(page)["Weights kept in this matrix"] == f"{int(mask.sum()):,}"
    for row in rows:
        assert float(metrics(page)[f"Perplexity, {row['text']} text"].replace(",", "")) == pytest.approx(row["value"], rel=6e-3)
    assert f"kept ({int(mask.sum()):,})" in [t.get("name") for t in figure(page, "learn-fall-mask")["data"]]


def test_predict_keeps_its_answers_until_one_has_guessed(learn):
    page = opened("Predict")
    assert not page.get("plotly_chart") and not page.success
    page.radio(key="learn-guess-random").set_value(50).run()
    assert "Not 50" in words(page) and len(page.get("plotly_chart")) == 0
    page.radio(key="learn-guess-random").set_value(33).run()
    assert any("Right" in e.value for e in page.success)
    rows = store.read_json(learn.run.folder / "modules.json")["rows"]
    page.toggle(key="learn-reveal").set_value(True).run()
    kept, total = {}, {}
    for row in rows:
        module = row["matrix"].split(".", 3)[3].removesuffix(".weight")
        kept[module], total[module] = kept.get(module, 0) + row["kept"], total.get(module, 0) + row["weights"]
    best = max(kept, key=lambda m: kept[m] / total[m])
    assert f"**{best}** keeps {kept[best] / total[best]:.1%}".replace("%", " %") in words(page)
    assert len(page.get("plotly_chart")) >= 1


def test_similarity_stands_between_floor_and_ceiling(learn):
    both, alone = opened("Similarity"), opened("Similarity", sides="the domain alone")
    shown_both, shown_alone = metrics(both), metrics(alone)
    for figures in (shown_both, shown_alone):
        floor, two, one = (float(figures[name]) for name in ("Floor: random masks", "½ text: 2 domains", "½ text: 1 domain"))
        assert floor == pytest.approx(1 / 3, abs=0.001)
        assert float(figures["Floor to ceiling"].removesuffix(" %")) == pytest.approx(100 * (two - floor) / (one - floor), abs=0.5)
    assert float(shown_both["Two domains"]) > float(shown_alone["Two domains"])   # the open domain is common to all


def test_speed_says_what_was_measured(learn):
    found = store.read_json(learn.run.folder / "cost.json")
    page = opened("Speed")
    assert metrics(page)["Dense"] == f"{np.median(found['speeds']['dense']):.0f} tokens/s" and f"**{found['removed']:,}** weights" in words(page)


# ---- a lesson that is not complete


def test_steps_appear_as_they_are_ready(unfinished):
    page = opened("Why")
    assert not page.info and page.get("plotly_chart") and "1 of 8 parts" in page.get("progress")[0].proto.text
    assert "ten sparsities · about 21 s left" in page.get("progress")[0].proto.text
    page = opened("Plane")
    assert "still being computed" in page.info[0].value and not page.get("plotly_chart") and page.button(key="learn-next")


def test_a_lesson_that_failed_says_so_and_can_go_on(unfinished, monkeypatch):
    started = []
    monkeypatch.setattr(worker, "start", lambda run, module, device: started.append((run.folder, module)))
    error = {"what": "The lesson stopped", "why": "the disk is full", "what to do": "free some space"}
    store.write_json(unfinished.folder / "status.json", {**worker.WAITING, "state": "failed", "error": error})
    page = opened("Why")
    assert page.error[0].value == "The lesson stopped: the disk is full. Mend that if need be, and resume it: what it has is kept." and page.get("plotly_chart")
    page.button(key="learn-resume").click().run()
    assert started == [(unfinished.folder, ["analysis.lesson.prepare", str(unfinished.folder), str(state.RUNS), str(state.CACHE)])]


def test_the_lesson_is_started_once(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "CACHE", tmp_path)
    started = []

    def start(run, module, device):
        store.write_json(run.folder / "status.json", worker.WAITING)
        started.append(module)

    monkeypatch.setattr(worker, "start", start)
    assert job.ensure().folder == job.ensure().folder and len(started) == 1
    assert Run(tmp_path / "lesson" / job.key()).config == demo.CONFIG.to_dict()
    assert prepare.DOMAIN in demo.CONFIG.domains and len(demo.CONFIG.domains) >= 3   # what the lesson's questions rest on


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(state, "CACHE", tmp_path / "file")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(demo, "ensure", lambda: None)
    page = opened("Why")
    assert "The lesson cannot be kept in" in page.error[0].value


def test_a_damaged_part_is_named(learn, lesson, tmp_path, monkeypatch):
    shutil.copytree(lesson.cache, tmp_path / "cache")
    monkeypatch.setattr(state, "CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "lesson" / job.key() / "fall.json").write_text("{")
    page = opened("Sparsity")
    assert "fall.json" in page.error[0].value and page.button(key="learn-next")

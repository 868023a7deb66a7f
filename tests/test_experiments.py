"""Experiments: the same question is the same folder and goes on to the same bits; their tables against the answers; what is written of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny, tiny_batches
from streamlit.testing.v1 import AppTest

from analysis import experiments as figures
from app import state
from dpruner import RunConfig, cli, estimate, evaluations, experiments, findings, finetune, markdown, metrics, pipeline, store, worker
from dpruner.baselines import magnitude
from dpruner.designs import DESIGNS, MASKS, TUNED
from dpruner.domain import next_token_loss
from dpruner.errors import InputError
from dpruner.experiments import conduct, find_experiments, prepared
from dpruner.masks import make_masks, pruned
from dpruner.memory import Plan
from dpruner.model import fingerprint
from dpruner.store import Run
from dpruner.transfer import predicts, transfer

ROOT = Path(__file__).parents[1]
MAIN = str(ROOT / "app" / "main.py")
BRIEF = {"nsamples": 4, "seqlen": 16, "eval_documents": 1, "eval_seqlen": 64, "general_mode": "static", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def config(llama):
    return RunConfig(model=str(llama), domains=("legal",), **BRIEF)


@pytest.fixture(scope="module")
def done(config, folder):
    """(experiment, table) of the sweep at two sparsities."""
    experiment = prepared("sparsity", config, values=[0.3, 0.6], root=folder / "e")
    return experiment, conduct(experiment, cache=folder / "cache")


@pytest.fixture(scope="module")
def transferred(config, folder):
    """(experiment, table) of three domains' masks on three domains' texts."""
    experiment = prepared("transfer", dataclasses.replace(config, domains=("legal", "finance", "code")), root=folder / "e")
    return experiment, conduct(experiment, cache=folder / "cache")


def test_every_model_stands_beside_sparsegpt_on_the_same_windows(done):
    experiment, table = done
    assert tuple(table.columns) == experiments.COLUMNS and experiment.status["state"] == "done"
    measured = table[table.low.notna()]
    assert set(measured.x) == {"0.3", "0.6"} and set(measured.task) == {"legal-perplexity", "general-perplexity"}
    assert set(measured.series) == {"dense", "sparsegpt", "dpruner, walk", *MASKS}
    for point in experiment.points():
        run = experiment.run_of(point)
        for method, domain in run.pairs():
            rows = evaluations.finished(run, (method, domain), "legal-perplexity")
            other = evaluations.finished(experiment.run_of(experiment.points()[0 if point.x == "0.3" else 2]), ("sparsegpt", domain), "legal-perplexity")
            (found,) = measured[(measured.x == point.x) & (measured.series == point.series(method)) & (measured.task == "legal-perplexity")].itertuples()
            assert found.value == pytest.approx(np.exp(rows.loss.sum() / rows.tokens.sum())) and found.n == len(rows)
            if found.series != "sparsegpt":
                gap = metrics.difference(metrics.PERPLEXITY, rows, other)
                assert (found.difference, found.difference_low, found.difference_high) == pytest.approx((float(gap), gap.low, gap.high))
                assert found.against == "sparsegpt" and found.verdict == metrics.verdict(metrics.PERPLEXITY, gap)


def test_what_the_walk_takes_back_of_sparsegpts_loss(done):
    experiment, table = done
    masks, walk = (experiment.run_of(point) for point in experiment.points() if point.x == "0.6")
    for task in ("legal-perplexity", "general-perplexity"):
        mine, theirs, dense = (evaluations.finished(run, model, task) for run, model in (
            (walk, ("dpruner", "legal")), (masks, ("sparsegpt", "legal")), (masks, ("dense", ""))))
        per_token = [rows.loss.sum() / rows.tokens.sum() for rows in (mine, theirs, dense)]
        share = metrics.taken_back(mine, theirs, dense)
        told = table[(table.metric == experiments.TAKEN_BACK) & (table.x == "0.6") & (table.task == task)]
        if share is None:
            assert not len(told)
        else:
            assert share == pytest.approx((per_token[1] - per_token[0]) / (per_token[1] - per_token[2])) and share.low <= share <= share.high
            assert [*told.value, *told.low, *told.high] == [float(share), share.low, share.high] and [*told.series] == ["dpruner, walk"]


def test_a_share_of_a_loss_that_is_noise_is_not_told():
    def rows(losses):
        return pd.DataFrame({"id": range(len(losses)), "loss": losses, "tokens": 10})

    dense = np.linspace(20, 30, 40)
    half = metrics.taken_back(rows(dense + 1), rows(dense + 2), rows(dense))
    assert (half, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5)) and half.n == 40
    assert metrics.taken_back(rows(dense + 3), rows(dense + 2), rows(dense)) == pytest.approx(-0.5)   # more lost
    noise = np.where(np.arange(40) % 2, 1.0, -1.0)
    assert metrics.taken_back(rows(dense), rows(dense + noise), rows(dense)) is None


def test_both_sides_calibrate_on_the_same_text(done):
    experiment, _ = done
    for point in experiment.points():
        config = experiment.run_of(point).config
        assert config["hessian" if point.variant else "baseline_calibration"] == "mix"


def test_seeds_are_judged_one_by_one_and_by_their_mean_loss(config, folder):
    experiment = prepared("seeds", config, values=[0, 1], root=folder / "seeds")
    table = conduct(experiment, cache=folder / "cache")
    points = {(point.x, point.variant): experiment.run_of(point) for point in experiment.points()}
    assert [points[x, ""].config["seed"] for x in "01"] == [0, 1] and len({str(run.record["calibration"]) for run in points.values()}) == 2
    rows = table[(table.series == "dpruner, walk") & (table.metric == "perplexity")].set_index(["x", "task"])
    assert set(rows.index.get_level_values(0)) == {"0", "1", "all"}
    for task in ("legal-perplexity", "general-perplexity"):
        walks, others = ([evaluations.finished(points[x, variant], (method, "legal"), task) for x in "01"]
                         for variant, method in (("walk", "dpruner"), ("", "sparsegpt")))
        mean, other = (np.exp(np.mean([r.loss.sum() / r.tokens.sum() for r in each])) for each in (walks, others))
        found = rows.loc["all", task]
        assert (found.value, found.difference, found.n) == (pytest.approx(mean), pytest.approx(mean / other - 1), len(walks[0]))
        assert rows.loc["1", task].difference == pytest.approx(float(metrics.difference(metrics.PERPLEXITY, walks[1], others[1])))
    text = " ".join([*findings.seeds_words(table.assign(sparsity=0.5)), *findings.reached_again([table.assign(sparsity=0.5)])])
    verdicts = [at.verdict[at.metric == "perplexity"] for at in (table[(table.series == "dpruner, walk") & (table.x == x)] for x in ("all", "0", "1"))]
    better, each = (verdicts[0] == "better").sum(), sum((v == "better").sum() for v in verdicts[1:])
    assert f"50%: {better} and" in text and "of 2 with the seeds' losses averaged" in text and f"averaged, {each} and" in text
    assert f"averaged {markdown.gap(rows.loc['all', 'legal-perplexity'])}" in text and "over 2 seeds" in text


def test_what_is_done_is_not_done_again(done, config, folder, monkeypatch):
    experiment, table = done
    before = experiment.record
    bounded = prepared("sparsity", dataclasses.replace(config, memory="4GB"), values=[0.3, 0.6], root=folder / "e")   # the same bits, from now on within 4 GB
    assert bounded.folder == experiment.folder and bounded.record == {**before, "config": {**before["config"], "memory": "4GB"}}
    again = prepared("sparsity", config, values=["0.3", "0.6"], root=folder / "e")
    assert again.folder == experiment.folder and prepared("sparsity", config, values=[0.3], root=folder / "e").folder != experiment.folder
    assert again.record == before
    monkeypatch.setattr(pipeline, "run", None)
    monkeypatch.setattr(evaluations, "evaluate", None)
    pd.testing.assert_frame_equal(conduct(again, cache=folder / "cache"), table)


@pytest.mark.parametrize("where", ["in a run", "in an evaluation"])
def test_one_that_was_interrupted_goes_on_to_the_same_bits(where, done, config, folder, tmp_path, monkeypatch):
    _, table = done
    experiment = prepared("sparsity", config, values=[0.3, 0.6], root=tmp_path)
    with monkeypatch.context() as patched:
        real, calls = (pipeline.pruned_and_judged, []) if where == "in a run" else (evaluations.answers, [])

        def stopping(*args, **kwargs):
            calls.append(args)
            if len(calls) == 10:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patched.setattr(*((pipeline, "pruned_and_judged") if where == "in a run" else (evaluations, "answers")), stopping)
        with pytest.raises(KeyboardInterrupt):
            conduct(experiment, cache=folder / "cache")
    assert experiment.status["state"] == "cancelled"
    so_far = experiment.results() if (experiment.folder / "results.parquet").exists() else table[:0]
    assert len(so_far) < len(table) and not len(so_far.merge(table, on=["x", "series", "task", "metric", "value"], how="left", indicator=True)
                                                .query("_merge == 'left_only' and low_x.notna()"))
    pd.testing.assert_frame_equal(conduct(experiment, cache=folder / "cache"), table)


def test_what_takes_room_is_not_kept(done):
    experiment, _ = done
    left = {p.name for point in experiment.points() for p in experiment.run_of(point).folder.iterdir()}
    assert "masks" in left and not left & set(experiments.LARGE)


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_every_design_asks_for_runs_that_can_be(name, config, tmp_path):
    experiment = prepared(name, config, root=tmp_path)
    points = experiment.points()
    assert points and len({p.slug for p in points}) == len(points)
    assert [e.id for e in find_experiments(tmp_path)] == [experiment.id]


@pytest.mark.parametrize("name, values, says", [("colours", None, "'colours'"), ("sparsity", ["many"], "many"), ("sparsity", [1.5], "1.5"),
                                                ("granularities", ["2:0"], "2:0"), ("formulas", ["best"], "'best'"), ("finetune", ["magic"], "'magic'"),
                                                ("calibration", ["16.5"], "whole number"), ("seeds", ["inf"], "whole number"), ("sparsity", ["nan"], "is a number")])
def test_what_cannot_be_asked_is_refused_before_anything_is_written(name, values, says, config, tmp_path):
    with pytest.raises(InputError, match=says):
        prepared(name, config, values=values, root=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_item_is_refused_before_anything_is_written(limit, config, tmp_path):
    with pytest.raises(InputError, match=f"limit {limit}"):
        prepared("sparsity", config, limit=limit, root=tmp_path)
    assert not any(tmp_path.iterdir())


def test_values_are_read_as_numbers_and_each_is_asked_once(config):
    def values(name, *given):
        return experiments.asked(name, config, values=given)["values"]

    assert values("sparsity", "0.5", ".5", "5e-1", "1") == [0.5, 1.0]
    assert values("lambda", "1e-3", "1.0", "1", "0") == [0.001, 1, 0] and str(values("lambda", "1.0")) == "[1]"
    assert values("calibration", "16", "4.0") == [16, 4]


# ---- time


def test_the_time_told_counts_what_keeping_to_the_memory_costs(config, folder, monkeypatch):
    question, speed = experiments.asked("lambda", config, values=["1"]), estimate.Speed(flops=1e5, sorted=1e7)   # so that work is most of it

    def told(plan):
        monkeypatch.setattr(estimate, "plan_of", lambda *_: plan)
        return [point.pruning for point in experiments.foreseen(question, experiments.place(question, folder / "none"), speed=speed).points]

    usual, sparing = told(Plan()), told(Plan(outside=True, checkpointing=True, passes=3))
    assert len(usual) == 2 and all(longer > 1.2 * time for longer, time in zip(sparing, usual, strict=True))


def test_the_time_is_told_before_it_starts_and_counts_what_is_done(done, transferred, config, folder, tmp_path):
    speed = estimate.Speed(flops=1e9, sorted=1e7)

    def left(name, **how):
        question = experiments.asked(name, how.pop("config", config), **how)
        found = experiments.foreseen(question, experiments.place(question, folder / "e"), speed=speed)
        return found, sum(map(sum, found.left))

    found, nothing = left("sparsity", values=[0.3, 0.6])
    assert nothing == 0 and found.words == "" and len(found.points) == 4
    two, once = left("sparsity", values=[0.3, 0.7], limit=99)
    four, twice = left("sparsity", values=[0.3, 0.5, 0.6, 0.7], limit=99)
    assert len(two.left) == 4 and len(four.left) == 8 and once < twice < 2 * once + 1e-9   # what points share is done once
    assert two.words.startswith("4 points take about") and "an estimate" in two.words
    assert left("sparsity", config=dataclasses.replace(config, nsamples=400), values=[0.3])[1] > 2 * left("sparsity", values=[0.3], limit=99)[1]
    tuned = left("finetune", values=["none", "full"])[0].points
    assert [s.tuning > 0 for s in tuned] == 3 * [False] + 3 * [True]
    question = experiments.asked("sparsity", config, values=[0.3, 0.6])
    half = shutil.copytree(done[0].folder, tmp_path / done[0].id)
    (half / "points" / "0.6-walk" / "judged.json").unlink()
    words = experiments.foreseen(question, experiments.place(question, tmp_path), speed=speed).words
    assert words.startswith("3 of 4 points are done; the last takes about")
    hub = dataclasses.replace(config, domains=("pubmedqa",), general="c4")   # told without a download
    assert left("sparsity", config=hub, values=[0.3], tasks=["casehold"])[1] > 0


def test_progress_of_an_experiment_only_grows_and_its_end_is_foretold(config, folder, tmp_path):
    experiment, seen = prepared("goal", config, values=[0.5, 0.6], root=tmp_path), []
    conduct(experiment, cache=folder / "cache", watch=lambda status: seen.append((status.share, status.about, status.eta)))
    shares = [share for share, _, _ in seen]
    assert shares == sorted(shares) and shares[-1] == 1 and len(set(shares)) > 20
    assert list(dict.fromkeys(about for _, about, _ in seen)) == [f"{i} of 4 points done" for i in range(5)]
    (experiment.run_of(experiment.points()[-1]).folder / "judged.json").unlink()
    shutil.rmtree(experiment.run_of(experiment.points()[-1]).folder)
    times = []
    conduct(experiment, cache=folder / "cache", watch=lambda status: times.append(status.eta))
    assert times[0] is None and any(eta for eta in times)   # what was done before gives no pace


# ---- files


def test_changed_texts_are_not_taken_for_the_old_ones(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, folder, task = Path("text.txt"), Path("texts"), Path("task.jsonl")
    folder.mkdir()
    for path in (text, folder / "a.txt", task):
        path.write_text("one\n\ntwo")
    asked = dataclasses.replace(config, domains=("mine=text.txt", "legal"), general="open=texts")
    experiment = prepared("sparsity", asked, values=[0.5], tasks=["legal-choice", "t=task.jsonl"], root="e")
    assert set(experiment.record["files"]) == {"text.txt", "texts", "task.jsonl"}
    for path, name in ((text, "text.txt"), (folder / "b.txt", "texts"), (folder / "a.txt", "texts"), (task, "task.jsonl")):
        before = path.read_text() if path.exists() else None
        path.write_text("other")
        for again in (lambda: prepared("sparsity", asked, values=[0.5], tasks=["legal-choice", "t=task.jsonl"], root="e"),
                      lambda: worker.submit_experiment(experiment), lambda: conduct(experiment, cache="cache")):
            with pytest.raises(InputError, match=f"'{name}' has changed since it began"):
                again()
        assert experiment.status["state"] == "failed" and not (experiment.folder / "points").exists()
        path.unlink() if before is None else path.write_text(before)
        experiment.require_same_files()
    task.unlink()
    with pytest.raises(InputError, match="'task.jsonl' was not found"):
        experiment.require_same_files()
    store.write_json(experiment.folder / "experiment.json", {k: v for k, v in experiment.record.items() if k != "files"})
    experiment.require_same_files()   # of an earlier version, which kept no fingerprints


def test_a_changed_model_is_not_taken_for_the_old_one(config, llama, tmp_path):
    model, values = tmp_path / "model", [0.3, 0.6]
    shutil.copytree(llama, model)
    experiment = prepared("sparsity", dataclasses.replace(config, model=str(model)), values=values, root=tmp_path / "e")
    conduct(experiment, cache=tmp_path / "cache")
    last = experiment.run_of(experiment.points()[-1])
    shutil.rmtree(last.folder)   # as if it had been stopped before its last point
    tiny("llama", seed=1).save_pretrained(model)
    with pytest.raises(InputError, match="its model has changed since it began"):
        conduct(experiment, cache=tmp_path / "cache")
    assert experiment.status["state"] == "failed" and not last.folder.exists()
    shutil.copytree(llama, model, dirs_exist_ok=True)
    conduct(experiment, cache=tmp_path / "cache")
    assert experiment.status["state"] == "done"


def test_stored_experiments_keep_their_names(tmp_path, monkeypatch):
    stored = find_experiments(ROOT / "docs" / "results")
    assert len(stored) > 10
    monkeypatch.chdir(tmp_path)
    Path("experiments/texts").mkdir(parents=True)
    for found in stored:
        record = found.record
        config = RunConfig.from_dict(record["config"])
        for named in (*config.domains, config.general, *(record["tasks"] or ())):
            if named.endswith(".jsonl"):
                Path(named.partition("=")[2]).write_text("{}")
        again = prepared(record["name"], config, values=record["values"], tasks=record["tasks"], limit=record["limit"], root="again")
        assert again.id == found.id


# ---- transfer


def table_of_transfer(excess: np.ndarray, alike: np.ndarray, names: str = "abcd") -> pd.DataFrame:
    rows = [dict(zip(experiments.COLUMNS, ("0.5", "dpruner", "dpruner", m, f"{t}-perplexity", "perplexity", 10 * (1 + excess[i, j]), 1, 99, 5, t,
                                            np.nan if m == t else excess[i, j], -1, 1, ""), strict=True))
            for i, m in enumerate(names) for j, t in enumerate(names)]
    rows += [{"x": "0.5", "series": "dpruner", "method": "dpruner", "domain": names[i], "task": names[j], "metric": "jaccard", "value": alike[i, j], "n": 9}
             for i in range(len(names)) for j in range(i + 1, len(names))]
    return pd.DataFrame(rows, columns=experiments.COLUMNS)


def test_similarity_that_predicts_is_found_and_noise_is_not():
    generator = np.random.default_rng(0)
    alike = np.triu(generator.random((6, 6)), 1)
    alike += alike.T
    rho, p = predicts(transfer(table_of_transfer(1 - alike, alike, "abcdef")))
    assert rho == pytest.approx(-1) and p == pytest.approx(1 / 720)
    ps = [predicts(transfer(table_of_transfer(generator.random((4, 4)), alike[:4, :4])))[1] for _ in range(60)]
    assert 0.3 < np.mean(ps) < 0.75 and np.mean(np.array(ps) < 0.05) < 0.15
    assert np.isnan(predicts(transfer(table_of_transfer(alike[:2, :2], alike[:2, :2], "ab")))).all()


def test_every_mask_is_judged_on_every_text_against_the_texts_own(transferred):
    _, table = transferred
    found = transfer(table)
    assert len(found) == 9 and found[found["mask"] != found["text"]].excess.notna().all()
    by = found.set_index(["mask", "text"])
    assert by.excess["code", "legal"] == pytest.approx(by.value["code", "legal"] / by.value["legal", "legal"] - 1)
    assert by.jaccard["code", "legal"] == by.jaccard["legal", "code"] > 1 / 3
    assert figures.excess(table).table.equals(found) and len(figures.prediction(table).table) == 6


# ---- figures


def test_differences_are_drawn_with_their_own_intervals_and_noise_is_hollow(done):
    _, table = done
    made = figures.differences(table, "sparsity", "legal", "legal-perplexity", "perplexity")
    asked = table[(table.task == "legal-perplexity") & table.difference.notna() & (table.method != "random")]
    assert made.table[["x", "series", "difference"]].equals(asked[["x", "series", "difference"]].reset_index(drop=True))
    drawn = [trace for trace in made.figure.data if trace.showlegend is False]
    assert len(drawn) == asked.series.nunique() and {trace.name for trace in made.figure.data if trace.showlegend is None} == set(asked.series)
    for trace, (_, of) in zip(drawn, asked.groupby("series", sort=False), strict=True):
        shift = trace.y - of.difference.to_numpy()
        assert np.allclose(shift, shift[0]) and round(shift[0]) in (0, 1)   # on a logarithmic axis ratios stand
        assert np.allclose(trace.error_y.array, of.difference_high - of.difference) and np.allclose(trace.error_y.arrayminus, of.difference - of.difference_low)
        assert [symbol.endswith("-open") for symbol in trace.marker.symbol] == list(of.verdict == "inside the noise")
    flat = table.assign(difference=np.nan)
    assert figures.differences(flat, "sparsity", "legal", "legal-perplexity", "perplexity") is None


def test_the_stored_experiments_are_drawn_each_in_the_order_of_its_values():
    for experiment in find_experiments(ROOT / "docs" / "results"):
        table, design = experiment.results(), experiment.design
        if experiment.record["name"] == "transfer":
            continue
        for of in figures.texts_of(table):
            if made := figures.differences(table, design.axis, *of):
                ticks = made.figure.layout.xaxis.ticktext
                values = [f"{v:.0%}" if design.axis == "sparsity" else str(v) for v in experiment.record["values"]]
                assert list(ticks) == [v for v in values if v in ticks] + ["all, averaged"] * (experiment.record["name"] == "seeds")
                marks = made.figure.layout.yaxis.tickvals
                assert marks is None or 1 in marks and len(marks) <= 12
            made = figures.measured(table, design.axis, *of)
            assert (made.figure.layout.xaxis.ticktext is None) == (design.axis == "sparsity" and made.table.x.nunique() > 2)   # else no line joins them


# ---- tuning with the mask held


def test_tuned_weights_fit_the_text_better_and_what_was_removed_stays_zero():
    model, batches = tiny("llama"), tiny_batches(8, seed=3)
    masks = make_masks(magnitude(model), 0.5)
    before = fingerprint(model)
    with pruned(model, masks):
        loss = next_token_loss(model, torch.cat(batches)).item()
        tuned = finetune.tune_kept(model, batches, masks, epochs=8, rate=3e-3)
    assert fingerprint(model) == before and all(not p.requires_grad or p.grad is None for p in model.parameters())
    assert set(tuned) == set(masks) and all((tuned[n][~m] == 0).all() for n, m in masks.items())
    with pruned(model, masks, tuned):
        assert next_token_loss(model, torch.cat(batches)).item() < loss - 0.05


def test_a_merged_adapter_fills_no_zero():
    generator = torch.Generator().manual_seed(0)
    W, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (6, 2), (2, 5)))
    mask = torch.rand(6, 5, generator=generator) > 0.5
    found = finetune.merged(W * mask, a @ b, mask)
    assert (found[~mask] == 0).all() and torch.allclose(found[mask], (W + a @ b)[mask])
    assert finetune.merged((W * mask).bfloat16(), a @ b, mask).dtype == torch.bfloat16


def test_lora_is_merged_and_masked_or_says_what_it_needs():
    model, batches = tiny("llama"), tiny_batches(4, seed=3)
    masks, before = make_masks(magnitude(model), 0.5), fingerprint(model)
    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="peft"):
            finetune.tune_lora(model, batches, masks)
    else:
        with pruned(model, masks):
            tuned = finetune.tune_lora(model, batches, masks)
        assert all((tuned[n][~m] == 0).all() for n, m in masks.items()) and any((tuned[n] != 0).any() for n in masks)
    assert fingerprint(model) == before


def test_tuned_models_are_compared_with_the_dense_one_tuned_alike(config, folder):
    experiment = prepared("finetune", config, root=folder / "tuned")
    table = conduct(experiment, cache=folder / "cache")
    on_legal = table[(table.task == "legal-perplexity") & (table.metric == "perplexity")].set_index(["x", "series"])
    dense, tuned = (on_legal.loc[(x, TUNED)] for x in ("none", "full"))
    assert dense.value == on_legal.loc["none", "dense"].value and tuned.value < dense.value
    for x, beside in (("none", dense), ("full", tuned)):
        row = on_legal.loc[x, "dpruner, walk"]
        assert row.difference == pytest.approx(row.value / beside.value - 1) and row.against == TUNED
    run = next(experiment.run_of(p) for p in experiment.points() if p.series("magnitude") == TUNED and p.x == "full")
    assert all(m.all() for m in run.masks("magnitude", "legal").values())
    text = " ".join(findings.finetune_words(table.assign(sparsity=0.5)))
    assert "against the dense model tuned alike" in text and "Tuning gives the dense model itself: full −" in text


def test_a_run_is_judged_with_the_weights_that_were_tuned(small, tmp_path):
    run = Run(shutil.copytree(small.run.folder, tmp_path / small.run.id))
    before = evaluations.evaluate(run, ["legal-perplexity"], domains=["legal"]).set_index("method").value
    finetune.finetuned(run, "full")
    first = run.path("weights", "dpruner", "legal").read_bytes()
    finetune.finetuned(run, "full")
    assert run.path("weights", "dpruner", "legal").read_bytes() == first   # not tuned twice
    after = evaluations.evaluate(run, ["legal-perplexity"], domains=["legal"]).set_index("method").value
    assert after["dense"] == before["dense"] and after["dpruner"] != before["dpruner"]
    with pytest.raises(InputError, match="'magic'"):
        finetune.finetuned(run, "magic")


# ---- what is said


def test_the_command_line_conducts_and_reports(llama, folder, done, tmp_path, capsys, monkeypatch):
    experiment, table = done
    command = ["experiment", "sparsity", "--value", "0.3", "--value", "0.6", "--model", str(llama), "--domain", "legal", "--experiments",
               str(folder / "e"), "--cache", str(folder / "cache"), *(w for k, v in BRIEF.items() for w in (f"--{k.replace('_', '-')}", str(v)))]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["id"] == experiment.id and len(found["figures"]) == len(table)
    assert cli.main(command) == 0
    found = capsys.readouterr()
    assert "sparsegpt" in found.out and not found.err   # nothing is left that would take time
    with monkeypatch.context() as patched:
        patched.setattr(experiments, "conduct", lambda experiment, **how: table)
        assert cli.main([*command, "--limit", "9", "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["figures"] and "4 points take about" in found.err and "an estimate" in found.err
    assert cli.main(["experiment", "report", "--experiments", str(tmp_path / "none"), "--to", str(tmp_path / "R.md")]) == 1
    assert "nothing to report" in capsys.readouterr().err and not (tmp_path / "R.md").exists()


def test_the_report_tells_the_figures_and_the_command(folder, done, transferred, tmp_path):
    findings.write(folder / "e", tmp_path / "R.md")
    text = (tmp_path / "R.md").read_text()
    for experiment, table in (done, transferred):
        assert findings.command(experiment) in text
    row = done[1].set_index(["x", "series", "task"]).loc[("0.6", "dpruner, walk", "legal-perplexity")]
    assert f"{row.value:.1f} {markdown.gap(row)}" in text
    marks = {"better": "**", "worse": "*", "inside the noise": ""}
    for verdict, mark in marks.items():
        told = markdown.gap(pd.Series({"difference": -0.1, "difference_low": -0.2, "difference_high": 0.05, "verdict": verdict}))
        assert told == f"{mark}−10.0 [−20.0, +5.0]{mark}"


def test_the_stored_results_say_what_the_report_says(tmp_path):
    findings.write(ROOT / "docs" / "results", tmp_path / "R.md")
    assert (tmp_path / "R.md").read_bytes() == (ROOT / "docs" / "RESULTS.md").read_bytes()


def told(name: str, rows: list[tuple], axis: str = "0.5") -> str:
    """What is said in short of a table of (x, series, task, perplexity, difference, verdict)."""
    columns = {c: [] for c in experiments.COLUMNS}
    for x, series, task, value, difference, verdict in rows:
        method = series.split(", ")[0]
        row = (x, series, method, "" if method == "dense" else "legal", task, "perplexity", value, value - 1, value + 1, 9, axis if verdict else "", difference,
               difference - 0.01, difference + 0.01, verdict)
        for column, v in zip(columns.values(), row, strict=True):
            column.append(v)
    words = {"goal": lambda t: [*findings.reached([t]), *findings.goal_words(t)]}.get(name, lambda t: findings.choice_words(t, DESIGNS[name], 0.5))
    return " ".join(words(pd.DataFrame(columns).assign(calibration="9 × 99")))


def test_the_goal_is_told_with_its_ceiling_and_where_it_is_missed():
    rows = [(x, "dense", "a", 100, np.nan, "") for x in ("0.5", "0.8")]
    rows += [("0.5", "sparsegpt", "a", 102, np.nan, ""), ("0.8", "sparsegpt", "a", 150, np.nan, "")]
    rows += [("0.5", "dpruner, walk", "a", 101, 101 / 102 - 1, "inside the noise"), ("0.8", "dpruner, walk", "a", 120, -0.2, "better")]
    text = told("goal", rows)
    assert "50%: 0 and 0 of 1, where the dense model itself would reach both in 0; 80%: 1 and 1 of 1, where the dense model itself would reach both in 1" in text and "Worse beyond the noise: 0." in text
    assert "9 × 99 tokens a side, pruned for legal: better in 1 of 2" in text and "50%: −1.0 of −2.0 % possible; 80%: −20.0 of −33.3 % possible" in text
    rows += [("0.8", "dense", "b", 90, np.nan, ""), ("0.8", "dpruner, walk", "b", 200, 0.3, "worse")]
    assert "Worse beyond the noise: 1." in told("goal", rows)


def test_the_command_told_is_the_one_that_finds_the_experiment_again(config, tmp_path):
    for limit, words in ((experiments.LIMIT, []), (7, ["--limit", "7"])):
        experiment = prepared("seeds", dataclasses.replace(config, sparsity=0.6, finetune=True), values=[0, 1], tasks=["legal-perplexity"], limit=limit, root=tmp_path)
        told = findings.command(experiment).split()[3:]
        assert told[-len(words):] == words if words else "--limit" not in told
        args = cli.parser().parse_args(told)
        again = prepared(args.name, cli.settings(args, {}), values=args.value, tasks=args.task, limit=args.limit, root=tmp_path)
        assert again.folder == experiment.folder


def test_a_choice_is_told_by_its_mean_and_by_what_is_more_than_noise():
    text = told("granularities", [("row", "dpruner", "a", 90, -0.1, "better"), ("row", "dpruner", "b", 110, 1 / 0.9 - 1, "worse"),
                                  ("block", "dpruner", "a", 90, 0.001, "inside the noise")], "matrix")
    assert "At 50%, perplexity against granularity matrix" in text
    assert "row +0.0 % (better in 1, worse in 1 of 2)" in text and "block +0.1 % (inside the noise in all of 1)" in text


def test_figures_that_come_with_the_program_are_there_on_the_first_day(small, tmp_path, monkeypatch):
    shutil.copytree(small.runs, tmp_path / "runs")
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    page = AppTest.from_file(MAIN, default_timeout=60)
    page.switch_page("views/results.py")
    page.run()
    chosen = page.selectbox(key="results-experiment")
    shipped = [path.parent.name for path in (ROOT / "docs" / "results").glob("*/experiment.json")]
    assert not page.exception and len(chosen.options) == len(shipped) and all(o.endswith("comes with the program") for o in chosen.options)
    for name in shipped:
        page.selectbox(key="results-experiment").set_value(name).run()
        assert not page.exception and not page.error and any("-experiment-" in e.proto.id for e in page.get("plotly_chart"))
    assert not any(button.key == "results-experiment-resume" for button in page.button)


def test_the_page_starts_an_experiment_and_shows_a_finished_one(small, folder, done, transferred, tmp_path, monkeypatch):
    shutil.copytree(small.runs, tmp_path / "runs")
    shutil.copytree(folder / "e", tmp_path / "experiments")
    for path in (tmp_path / "experiments").glob("*/status.json"):   # as figures that were passed on: whole without it
        path.unlink()
    monkeypatch.setattr(state, "RUNS", tmp_path / "runs")
    started = []
    monkeypatch.setattr(worker, "submit_experiment", lambda experiment, cache: started.append(experiment))
    page = AppTest.from_file(MAIN, default_timeout=60)
    page.switch_page("views/results.py")
    page.session_state["results-experiment"] = done[0].id
    page.run()
    assert not page.exception

    def charts():
        return {e.proto.id.rsplit("-experiment-", 1)[-1] for e in page.get("plotly_chart") if "-experiment-" in e.proto.id}

    assert charts() == {"differences", "measured"} and "It is not started" not in " ".join(i.value for i in page.info)
    assert page.code[0].value == findings.command(done[0])
    page.selectbox(key="results-experiment").set_value(transferred[0].id).run()
    assert not page.exception and charts() == {"excess", "prediction"}
    page.selectbox(key="results-question").set_value("formulas").run()
    assert any(c.value.startswith("6 points take about") and "an estimate" in c.value for c in page.caption)
    page.button(key="results-experiment-start").click().run()
    assert not page.exception
    (experiment,) = started
    assert experiment.record["name"] == "formulas" and experiment.record["config"]["domains"] == small.run.config["domains"]
    assert store.read_json(experiment.folder / "experiment.json")["values"] == list(DESIGNS["formulas"].values)

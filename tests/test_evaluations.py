"""Evaluations of a run: kept item by item, resumed to the same bits, asked once, compared on the same items; and what the command line says."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny
from test_cli import elsewhere, refusal  # noqa: F401

from dpruner import RunConfig, cli, evaluations, load_model, metrics, pipeline, scoring, store
from dpruner.errors import InputError
from dpruner.evaluations import answers, evaluate, figures, finished, path_of, stored
from dpruner.generate import generate
from dpruner.loading import quiet_libraries
from dpruner.masks import pruned
from dpruner.model import fingerprint, prunable_linears
from dpruner.tasks import load_task
from dpruner.variants import DENSE, chosen, load_original, variant

ASKED = {"limit": 12, "methods": ["dpruner", "random"], "domains": ["legal"]}


@pytest.fixture
def exam(tmp_path):
    """A task file of 20 short items."""
    path = tmp_path / "exam.jsonl"
    rows = [{"question": f"{i} or {i + 1}?", "choices": [str(i), str(i + 1), "neither"], "answer": i % 3} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(small, tmp_path):
    """A copy of the small run that may be written to."""
    return store.Run(shutil.copytree(small.run.folder, tmp_path / "runs" / small.run.id))


def files(run) -> dict[str, bytes]:
    return {str(p.relative_to(run.folder)): p.read_bytes() for p in (run.folder / "evaluations").rglob("*") if p.is_file()}


def counting(monkeypatch) -> list:
    """How many items every call of a model was given from now on."""
    asked, real = [], scoring.chosen
    monkeypatch.setattr(scoring, "chosen", lambda model, tokenizer, items, batch_size: asked.append(len(items)) or real(model, tokenizer, items, batch_size))
    return asked


# ---- the table


def test_every_model_stands_beside_the_dense_one_on_the_same_items(run, exam):
    table = evaluate(run, [exam], **ASKED)
    assert list(table.columns) == list(evaluations.COLUMNS)
    assert table[["metric", "method", "domain"]].to_numpy().tolist() == [
        [m, *model] for m in ("macro-F1", "accuracy") for model in ((DENSE, ""), ("dpruner", "legal"), ("random", "legal"))]
    assert set(table.task) == {"exam"} and set(table.n) == {12} and (table.low <= table.value).all() and (table.value <= table.high).all()
    by = table.set_index(["metric", "method"])
    assert by.chance["accuracy"].tolist() == pytest.approx([1 / 3] * 3) and by.chance["macro-F1"].isna().all()
    for metric in ("macro-F1", "accuracy"):
        assert by.verdict[metric, DENSE] == "" and math.isnan(by.difference[metric, DENSE])
        for method in ("dpruner", "random"):
            row = by.loc[metric, method]
            assert row.difference == pytest.approx(row.value - by.value[metric, DENSE]) and row.against == DENSE
            assert row.verdict == ("inside the noise" if row.difference_low <= 0 <= row.difference_high else "better" if row.difference > 0 else "worse")


def test_the_answers_are_those_of_the_pruned_model(run, exam):
    before = evaluate(run, [exam], **ASKED)
    with quiet_libraries():
        model, tokenizer = load_model(run.config["model"], device="cpu")
    original = fingerprint(model)
    (task,) = load_task(exam, 12, 0)
    with pruned(model, run.masks("random", "legal")):
        expected = pd.concat([rows for _, rows in scoring.answered(model, tokenizer, task)])
    found = finished(run, ("random", "legal"), "exam")
    pd.testing.assert_frame_equal(found.drop(columns="scores"), expected.drop(columns="scores"))
    assert (np.stack(found.scores) == np.stack(expected.scores)).all()
    assert (np.stack(found.scores) != np.stack(finished(run, (DENSE, ""), "exam").scores)).any()
    row = before[(before.method == "random") & (before.metric == "accuracy")].iloc[0]
    assert row.value == found.right.mean() and fingerprint(model) == original


def test_without_tasks_each_mask_gets_what_belongs_to_its_domain(run):
    table = evaluate(run, methods=["dpruner"], limit=2)
    own = {d: set(t) for d, t in table[table.method == "dpruner"].groupby("domain").task}
    assert own == {d: {f"{d}-choice", f"{d}-yes-no-maybe", f"{d}-perplexity", "general-perplexity"} for d in ("healthcare", "legal")}
    assert set(table[table.method == DENSE].task) == own["healthcare"] | own["legal"]
    told = run.metrics().query("metric == 'perplexity'").set_index(["method", "domain", "text"]).value   # the same text, as the run measured it
    for row in table[table.metric == "perplexity"].itertuples():
        domains = [row.domain] if row.domain else ["healthcare", "legal"]
        text = row.task.removesuffix("-perplexity")
        assert row.value == pytest.approx(next(told[row.method, d, text] for d in domains if (row.method, d, text) in told), rel=1e-5)


def test_another_method_can_be_the_one_to_compare_with(run, exam):
    table = evaluate(run, [exam], against="magnitude", **ASKED).query("metric == 'accuracy'").set_index("method")
    assert list(table.index) == [DENSE, "magnitude", "dpruner", "random"]
    assert table.against.tolist() == ["", "", "magnitude@legal", "magnitude@legal"]
    assert table.difference["dpruner"] == pytest.approx(table.value["dpruner"] - table.value["magnitude"])


def test_figures_come_from_the_folder_alone_in_any_order_of_asking(run, exam):
    evaluate(run, [exam], **ASKED)
    table = evaluate(run, [exam, "legal-perplexity"], **ASKED)
    again = figures(store.Run(run.folder))
    key = ["task", "metric", "method"]
    pd.testing.assert_frame_equal(table.sort_values(key, ignore_index=True), again.sort_values(key, ignore_index=True), check_exact=True)
    assert set(stored(run)) == {(m, t) for m in ((DENSE, ""), ("dpruner", "legal"), ("random", "legal")) for t in ("exam", "legal-perplexity")}


# ---- kept and taken up again


def test_what_is_answered_is_not_asked_again(run, exam, monkeypatch):
    evaluate(run, [exam], **ASKED)
    before, asked = files(run), counting(monkeypatch)
    first = evaluate(run, [exam], **ASKED)
    assert asked == [] and files(run) == before
    evaluate(run, [exam], limit=12, methods=["magnitude"], domains=["legal"])
    assert asked == [12] and len(first) == 6   # magnitude's alone: the dense model has answered


@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(after, run, exam, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "GROUP", 5)
    whole = store.Run(shutil.copytree(run.folder, tmp_path / "whole"))
    expected = evaluate(whole, [exam], **ASKED)   # three models, three groups each

    calls, real = [], scoring.chosen

    def dying(model, tokenizer, items, batch_size):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(len(items))
        return real(model, tokenizer, items, batch_size)

    monkeypatch.setattr(scoring, "chosen", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, [exam], **ASKED)
    done, total = sum(calls), sum(len(finished(whole, m, "exam")) for m in ((DENSE, ""), ("dpruner", "legal"), ("random", "legal")))
    assert files(run) != files(whole) and not any(".tmp" in name for name in files(run))
    monkeypatch.setattr(scoring, "chosen", real)
    asked = counting(monkeypatch)
    found = evaluate(run, [exam], **ASKED)
    assert sum(asked) == total - done
    assert files(run) == files(whole)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_half_a_task_has_no_figure_yet(run, exam, monkeypatch):
    monkeypatch.setattr(scoring, "GROUP", 5)
    with quiet_libraries():
        model, tokenizer = load_original(run)
    (task,) = load_task(exam)
    path, key = path_of(run, DENSE, "", task.name), {"seed": 0}
    with pytest.raises(KeyboardInterrupt):
        answers(path, key, model, tokenizer, task, progress=lambda what, done, total: (_ for _ in ()).throw(KeyboardInterrupt) if done == 10 else None)
    assert store.read_table(path).attrs["done"] == 5
    assert finished(run, (DENSE, ""), "exam") is None and not list(stored(run)) and figures(run).empty
    assert len(answers(path, key, model, tokenizer, task)) == 20


@pytest.mark.parametrize("change", ["task", "seed", "limit", "mask", "damage"])
def test_what_would_be_answered_otherwise_is_asked_again(change, run, exam, monkeypatch):
    evaluate(run, [exam], **ASKED)
    asked, settings = counting(monkeypatch), dict(ASKED)
    if change == "task":
        exam.write_text(exam.read_text().replace("neither", "both"))
    elif change == "seed":
        settings["seed"] = 1
    elif change == "limit":
        settings["limit"] = 11
    elif change == "mask":
        shutil.copy(run.path("masks", "random", "healthcare"), run.path("masks", "random", "legal"))
    else:
        path = path_of(run, "dpruner", "legal", "exam")
        path.write_bytes(path.read_bytes()[:500])
    table = evaluate(run, [exam], **settings)
    assert len(asked) == (3 if change in ("task", "seed", "limit") else 1) and set(table.n) == {settings["limit"]}


def test_answers_to_other_items_are_not_compared(run, exam):
    evaluate(run, [exam], **ASKED)
    evaluate(run, [exam], **{**ASKED, "methods": ["dpruner"], "limit": 11})   # the dense model's and dpruner's are new, random's are not
    by = figures(run).query("metric == 'accuracy'").set_index("method")
    assert by.verdict["dpruner"] and not by.verdict["random"] and by.n.tolist() == [11, 11, 12]


def test_the_model_is_dense_after_a_variant_whatever_happens(run):
    with quiet_libraries():
        model, _ = load_original(run)
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), variant(model, run, "random", "legal"):
        assert fingerprint(model) != before
        1 / 0
    assert fingerprint(model) == before
    with variant(model, run, DENSE, "legal"):
        assert fingerprint(model) == before


# ---- what cannot be


def test_what_a_run_does_not_hold_is_refused(run, exam, tmp_path):
    for call, words in ((lambda: evaluate(run, methods=["wanda"]), "no mask of wanda for healthcare"),
                        (lambda: evaluate(run, domains=["finance"]), "no mask of dpruner for finance"),
                        (lambda: evaluate(run, against="wanda"), "no mask of wanda"),
                        (lambda: evaluate(run, ["leagl"]), "'leagl' is not known"),
                        (lambda: evaluate(run, [exam, f"exam={exam.parent / 'other.jsonl'}"]), "stands for two tasks"),
                        (lambda: evaluate(tmp_path / "nowhere"), "was not found")):
        (exam.parent / "other.jsonl").write_text('{"text": "Something else."}\n')
        with pytest.raises(InputError, match=words):
            call()
    assert not (run.folder / "evaluations").exists()


def test_a_run_without_masks_or_of_another_model_is_refused(run, exam, tmp_path):
    empty = store.Run(tmp_path / "empty")
    shutil.copytree(run.folder, empty.folder, ignore=lambda *_: ["masks"])
    with pytest.raises(InputError, match="holds no mask yet"):
        chosen(empty)
    record = run.record
    store.write_json(run.folder / "run.json", {**record, "model": {**record["model"], "fingerprint": "0" * 64}})
    with pytest.raises(InputError, match="not the one that was pruned"), quiet_libraries():
        evaluate(run, [exam])


def test_texts_of_nothing_are_refused(run, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="no two tokens in a row"), quiet_libraries():
        evaluate(run, [tmp_path / "short.jsonl"], methods=["random"])


def test_every_kind_of_task_has_figures(run, tmp_path):
    kinds = {"choice": {"question": "Which?", "choices": ["a", "b"], "answer": 0}, "yes": {"question": "Is it?", "context": "It is.", "answer": "yes"},
             "nli": {"sentence1": "A.", "sentence2": "B.", "gold_label": "neutral"}, "bill": {"source": "A bill.", "summary": "Bill."},
             "text": {"text": "Once upon a time."}}
    for name, row in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with quiet_libraries():
        table = evaluate(run, [tmp_path / f"{name}.jsonl" for name in kinds], methods=["random"], domains=["legal"])
    assert {task: list(dict.fromkeys(of)) for task, of in table.groupby("task", sort=False).metric} == {
        "choice": ["macro-F1", "accuracy"], "yes": ["macro-F1", "accuracy"], "nli": ["accuracy"], "bill": ["ROUGE-1", "ROUGE-2", "ROUGE-L"],
        "text": ["perplexity"]}
    assert {metrics.METRICS[k][0].name for k in table.kind} == {"macro-F1", "accuracy", "ROUGE-1", "perplexity"} and (table.n == 1).all()


# ---- the command line


def test_the_command_prints_a_table_that_says_what_is_noise(run, exam, elsewhere, capfd):  # noqa: F811
    arguments = ["evaluate", str(run.folder), "--task", str(exam), "--method", "dpruner", "--domain", "legal", "--limit", "12"]
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    for word in (run.id, "exam", "macro-F1", "accuracy", "n = 12", "dense", "dpruner@legal", "Guessing would be right in 33% of exam"):
        assert word in out, word
    table = figures(run)
    for row in table.itertuples():
        assert f"{100 * row.value:.1f} {100 * row.low:.0f}–{100 * row.high:.0f}" in out and row.verdict in out
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["id"] == run.id and [f["value"] for f in told["figures"]] == table.value.tolist() and told["figures"][0]["difference"] is None


def test_an_evaluation_that_cannot_be_is_one_sentence(run, exam, elsewhere, capfd):  # noqa: F811
    for more, word in ((["--task", "leagl"], "leagl"), (["--task", "exams/none.jsonl"], "exams/none.jsonl"), (["--method", "wanda"], "wanda"),
                       (["--limit", "0", "--task", "legal"], "limit 0"), (["--task", "c4"], "c4")):
        assert word in refusal(["evaluate", run.folder, *more], capfd, elsewhere)
    assert "nowhere" in refusal(["evaluate", "nowhere"], capfd, elsewhere)


def test_similarity_is_told_for_the_whole_model_and_for_each_matrix(run, small, elsewhere, capfd):  # noqa: F811
    assert cli.main(["similarity", str(run.folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(json.dumps(small.summary["similarity"]))
    assert cli.main(["similarity", str(run.folder), "--method", "dpruner", "--matrices", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    one, other = run.masks("dpruner", "healthcare"), run.masks("dpruner", "legal")
    assert [t["matrix"] for t in told] == list(prunable_linears(tiny("llama")))
    for t in told:
        a, b = one[t["matrix"]], other[t["matrix"]]
        assert t["jaccard"] == pytest.approx(float((a & b).sum() / (a | b).sum())) and t["floor"] == pytest.approx(1 / 3, abs=0.01)
        halves = [store.read_masks(run.path("masks", "dpruner", f"{d}~{h}"))[t["matrix"]] for d in ("healthcare", "legal") for h in (1, 2)]
        assert t["ceiling"] == pytest.approx(sum(float((a & b).sum() / (a | b).sum()) for a, b in (halves[:2], halves[2:])) / 2)
        assert t["halves"] == pytest.approx(sum(float((a & b).sum() / (a | b).sum()) for a in halves[:2] for b in halves[2:]) / 4)
    assert cli.main(["similarity", str(run.folder)]) == 0
    out = capfd.readouterr().out
    assert "healthcare · legal" in out and "random" in out and f"{small.summary['similarity'][0]['jaccard']:.4f}" in out
    assert "no method 'wanda'" in refusal(["similarity", run.folder, "--method", "wanda"], capfd, elsewhere)
    assert "no domain 'finance'" in refusal(["similarity", run.folder, "--domain", "finance"], capfd, elsewhere)


def test_the_masks_of_one_domain_have_nothing_to_be_alike(llama, tmp_path, elsewhere, capfd):  # noqa: F811
    config = RunConfig(model=str(llama), domains=("legal",), methods=("magnitude",), nsamples=2, seqlen=16, evaluate=False, general_mode="static")
    with quiet_libraries():
        run = pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")
    assert "one domain only" in refusal(["similarity", run.folder], capfd, elsewhere)


def test_a_prompt_is_continued_by_the_dense_model_and_every_variant(run, elsewhere, capfd):  # noqa: F811
    arguments = ["generate", str(run.folder), "--prompt", "The court", "--domain", "legal", "--max-new-tokens", "6"]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [(c["method"], c["domain"]) for c in told["continuations"]] == [(DENSE, ""), ("dpruner", "legal"), ("magnitude", "legal"), ("random", "legal")]
    with quiet_libraries():
        model, tokenizer = load_model(run.config["model"], device="cpu")
    for c in told["continuations"]:
        with variant(model, run, c["method"], c["domain"]):
            made = list(generate(model, tokenizer, "The court", max_new_tokens=6))
        assert [t["id"] for t in c["tokens"]] == [t.id for t in made] and c["text"] == "".join(t.text for t in made)
    assert cli.main([*arguments, "--method", "random"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("dense: The court") and "\nrandom@legal: The court" in out and "magnitude" not in out
    assert cli.main([*arguments, "--temperature", "1", "--seed", "1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["continuations"] != told["continuations"]
    for more, word in ((["--method", "wanda"], "wanda"), (["--temperature", "-1"], "temperature -1"), (["--prompt", "x" * 300], "too long")):
        assert word in refusal([*arguments, *more], capfd, elsewhere)


@torch.no_grad()
def test_weights_that_were_moved_are_evaluated_moved(llama, tmp_path):
    config = RunConfig(model=str(llama), domains=("legal",), methods=("sparsegpt",), nsamples=4, seqlen=16, evaluate=False, general_mode="static",
                       halves=False)
    with quiet_libraries():
        run = pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")
        evaluate(run, ["legal-yes-no-maybe"], limit=4)
        model, tokenizer = load_original(run)
    found = finished(run, ("sparsegpt", "legal"), "legal-yes-no-maybe").scores
    (task,) = load_task("legal-yes-no-maybe", 4)
    for name, weight in run.weights("sparsegpt", "legal").items():
        model.get_parameter(name).copy_(weight)
    ((_, moved),) = scoring.answered(model, tokenizer, task)
    assert (np.stack(found) == np.stack(moved.scores)).all()

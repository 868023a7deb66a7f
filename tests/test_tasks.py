"""Tasks of every format from every source become the same items; what is no task is refused in one sentence."""

import dataclasses
import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from test_calibration import is_one_sentence

from dpruner import hub, load_tasks, load_texts
from dpruner.errors import InputError
from dpruner.hub import CATALOGUE
from dpruner.tasks import ENTAILMENT, ITEMS, KINDS, Item, Task, builtin_tasks, drawn, from_rows, load_task, text_task

REAL = Path(__file__).parents[2] / "shared" / "corpora" / "tasks"

ROWS = {   # one row of each format, and the item it is
    "choice": ({"id": "q7", "context": "It rained.", "question": "What got wet?", "choices": ["The road", "The sun"], "answer": 0},
               Item("q7", "It rained.\n", "Question: What got wet?\nAnswer:", (" The road", " The sun"), 0)),
    "choice, no context": ({"question": "Which?", "choices": ["a", "b", "c"], "answer": "c"},
                           Item("0", "", "Question: Which?\nAnswer:", (" a", " b", " c"), 2)),
    "yes-no-maybe": ({"id": "1", "question": "Does it?", "context": "It does not.", "answer": "no"},
                     Item("1", "It does not.\n", "Question: Does it?\nAnswer:", (" yes", " no", " maybe"), 1)),
    "casehold": ({"example_id": 31, "citing_prompt": "As in Ames (<HOLDING>); see", **{f"holding_{i}": f"holding that {i}" for i in range(5)}, "label": "3"},
                 Item("31", "As in Ames (", "", tuple(f"holding that {i}" for i in range(5)), 3)),
    "casehold, as LexGLUE has it": ({"context": "As in Ames. <HOLDING> See", "endings": [f"holding that {i}" for i in range(5)], "label": 4},
                                    Item("0", "As in Ames.", "", tuple(f" holding that {i}" for i in range(5)), 4)),
    "pubmedqa, as the hub has it": ({"pubid": 21, "question": "Does it?", "context": {"contexts": ["First.", "Then."], "labels": ["A", "B"]},
                                     "long_answer": "It may.", "final_decision": "maybe"},
                                    Item("21", "First.\nThen.\n", "Question: Does it?\nAnswer:", (" yes", " no", " maybe"), 2)),
    "entailment": ({"sentence1": "The scan was clear.", "sentence2": "Nothing was seen.", "gold_label": "entailment"},
                   Item("0", "The scan was clear.\n", "Question: Nothing was seen. True, False or Neither?\nAnswer:", (" True", " Neither", " False"), 0)),
    "entailment by number": ({"premise": "A.", "hypothesis": "B.", "label": 2},
                             Item("0", "A.\n", "Question: B. True, False or Neither?\nAnswer:", (" True", " Neither", " False"), 2)),
    "casehold, the text ends where the holding follows": ({"citing_prompt": "But see Johnson v. State", "holding_0": "a", "holding_1": "b", "label": 1},
                                                          Item("0", "But see Johnson v. State", "", (" a", " b"), 1)),
    "billsum": ({"source": "A long bill.", "summary": "A bill."}, Item("0", "A long bill.", "\nSummary:", reference="A bill.")),
    "billsum, as the hub has it": ({"text": "A long bill.", "summary": "A bill.", "title": "T"}, Item("0", "A long bill.", "\nSummary:", reference="A bill.")),
    "meqsum, as the hub has it": ({"CHQ": "Who makes it?", "Summary": "Who?", "File": "1.txt"}, Item("0", "Who makes it?", "\nSummary:", reference="Who?")),
    "text": ({"text": "Once upon a time."}, Item("0", "Once upon a time.")),
}
FIELD = {"casehold": "choice", "pubmedqa": "yes-no-maybe", "billsum": "summary", "meqsum": "summary", "text": "perplexity"}
KIND = {name: next(kind for start, kind in [*FIELD.items(), *zip(KINDS, KINDS, strict=True)] if name.startswith(start)) for name in ROWS}


def refused(call, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    is_one_sentence(error.value)
    for part in parts:
        assert part in str(error.value), error.value


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_format_is_an_item(name):
    row, item = ROWS[name]
    assert from_rows("mine", [row]) == [Task("mine", KIND[name], (item,))]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame([{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]).to_csv(path, index=False)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_file_of_any_type_is_the_same_task(ending, tmp_path):
    rows = [{"context": f"Passage {i}, \"quoted\".", "question": f"Which, {i}?", "choices": [f"a{i}", f"b{i}", "c"], "answer": i % 3} for i in range(9)]
    (task,) = load_task(write(tmp_path / f"my exam.{ending}", rows))
    assert task == dataclasses.replace(*from_rows("my-exam", rows)) and task.kind == "choice" and len(task.items) == 9
    (renamed,) = load_task(f"other={tmp_path / f'my exam.{ending}'}")
    assert renamed.name == "other" and renamed.fingerprint == task.fingerprint


def test_a_file_of_several_kinds_is_several_tasks(tmp_path):
    rows = [{"question": "Which?", "choices": ["a", "b"], "answer": 0}, {"question": "Is it?", "choices": ["yes", "no", "maybe"], "answer": "no"}] * 2
    tasks = load_task(write(tmp_path / "exam.jsonl", rows))
    assert [(t.name, t.kind, len(t.items)) for t in tasks] == [("exam-choice", "choice", 2), ("exam-yes-no-maybe", "yes-no-maybe", 2)]


def test_texts_and_folders_of_them_are_tasks_of_perplexity(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nStill one.")
    (tmp_path / "b.md").write_text("Two.")
    (task,) = load_task(tmp_path / "a.txt")
    assert (task.name, task.kind, [i.context for i in task.items]) == ("a", "perplexity", ["One.\n\nStill one."])
    (task,) = load_task(f"both={tmp_path}")
    assert (task.name, [i.context for i in task.items]) == ("both-perplexity", ["One.\n\nStill one.", "Two."])


# ---- built-in


def test_a_built_in_domain_is_its_tasks_and_its_held_out_text():
    tasks = {task.name: task for task in load_task("legal", limit=None)}
    assert list(tasks) == ["legal-choice", "legal-yes-no-maybe", "legal-perplexity"]
    rows = load_tasks("legal")
    assert [len(t.items) for t in tasks.values()] == [24, 16, len(load_texts("legal", "heldout"))]
    for row in rows:
        item = next(i for t in tasks.values() for i in t.items if i.id == row["id"])
        assert item.candidates[item.answer] == f" {row['choices'][row['answer']]}" and row["question"] in item.prompt and item.context.strip() == row["context"]
    assert load_task("legal-choice", limit=None) == [tasks["legal-choice"]]
    assert [task.name for task in load_task("finance")] == ["finance-perplexity"]
    assert {"healthcare-choice", "healthcare-yes-no-maybe", "legal-perplexity", "code-perplexity"} <= set(builtin_tasks())


def test_items_are_drawn_by_the_seed_and_stay_in_order():
    task = text_task("t", [str(i) for i in range(100)])
    few = drawn(task, 10, seed=1)
    numbers = [int(item.context) for item in few.items]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10 and numbers != list(range(10))
    assert drawn(task, 10, 1) == few != drawn(task, 10, 2) and drawn(task, 100, 1) is task and drawn(task, None, 1) is task
    assert len({few.fingerprint, task.fingerprint, drawn(task, 10, 2).fingerprint}) == 3 and ITEMS == 500


def test_the_fingerprint_knows_what_a_model_is_given_and_not_the_name():
    item = ROWS["choice"][1]
    prints = [Task("a", "choice", (i,)).fingerprint for i in
              (item, dataclasses.replace(item, answer=1), dataclasses.replace(item, context="x"), dataclasses.replace(item, candidates=(" a", " b")))]
    assert len(set(prints)) == 4 and Task("b", "choice", (item,)).fingerprint == prints[0]


# ---- the hub, through the library that reads it, from folders that look like its repositories


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """Catalogue entries lead to folders here. Fill one by `repositories(name, rows)`."""
    monkeypatch.setattr(hub, "_reachable", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def fill(name: str, rows: list[dict]):
        entry, folder = CATALOGUE[name], tmp_path / "hub" / name
        config, split = entry.tasks
        (folder / "data").mkdir(parents=True)
        pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n  - split: {split}\n    path: data/{split}-*\n---\n")
        monkeypatch.setitem(CATALOGUE, name, dataclasses.replace(entry, repository=str(folder)))

    return fill


@pytest.mark.parametrize("name, sample", [("casehold", "casehold, as LexGLUE has it"), ("pubmedqa", "pubmedqa, as the hub has it"),
                                          ("billsum", "billsum, as the hub has it")])
def test_hub_data_sets_are_tasks(name, sample, repositories):
    row, item = ROWS[sample]
    repositories(name, [row] * 3)
    (task,) = load_task(name)
    assert task.name == name and task.kind == KIND[sample] and len(task.items) == 3
    assert [dataclasses.replace(i, id="") for i in task.items] == [dataclasses.replace(item, id="")] * 3


def test_where_the_hub_has_one_pile_the_task_is_what_calibration_leaves_out(repositories, monkeypatch):
    rows = [{"CHQ": f"Question {i}?", "Summary": f"Summary {i}"} for i in range(23)]
    repositories("meqsum", rows)
    (task,) = load_task("meqsum")
    calibration = load_texts("meqsum")
    assert [i.reference for i in task.items] == [f"Summary {i}" for i in range(4, 23, 5)]
    assert not any(item.reference == text.splitlines()[-1] for item in task.items for text in calibration) and len(calibration) == 19


def test_hub_data_sets_without_a_public_copy_or_a_task_are_refused(tmp_path):
    refused(lambda: load_task("mednli"), "mednli", "no public copy", "physionet.org")
    refused(lambda: load_task("c4"), "'c4' has no task", "casehold")
    rows = [{"sentence1": "A.", "sentence2": "B.", "gold_label": label, "pairID": "x"} for label in ENTAILMENT]
    (task,) = load_task(f"mednli={write(tmp_path / 'mli_test_v1.jsonl', rows)}")   # one's own copy
    assert (task.name, task.kind, [i.answer for i in task.items]) == ("mednli", "entailment", [0, 1, 2])


@pytest.mark.skipif(not REAL.is_dir(), reason="the real tasks are not here")
@pytest.mark.parametrize("name, kind, items", [("casehold", "choice", 500), ("pubmedqa", "yes-no-maybe", 500), ("billsum", "summary", 100),
                                               ("meqsum", "summary", 1000)])
def test_real_tasks(name, kind, items):
    (task,) = load_task(REAL / f"{name}.jsonl.gz", limit=None)
    assert (task.name, task.kind, len(task.items)) == (f"{name}-file", kind, items)
    if kind != "summary":
        counts = pd.Series([i.answer for i in task.items]).value_counts()
        assert len(counts) == (5 if name == "casehold" else 3) and all(len(i.candidates) == len(counts) for i in task.items)
    assert all("<HOLDING>" not in i.prompt and i.prompt.strip() for i in task.items)


def test_holdings_are_counted_as_numbers():
    row = {"citing_prompt": "The court (<HOLDING>)", **{f"holding_{i}": f"holding that {i}" for i in range(12)}, "label": 10}
    task, = from_rows("cases", [row])
    assert task.items[0].candidates[task.items[0].answer] == "holding that 10"


# ---- what is no task


GOOD = {"question": "Which?", "choices": ["a", "b"], "answer": 0}
BAD = {   # rows, and words of the refusal
    "no rows": ([], "holds no items"),
    "columns of nothing": ([{"body": "x", "tag": "y"}], "its columns (body, tag) are those of no format"),
    "an answer that is no choice": ([GOOD, {**GOOD, "answer": "c"}], "its row 2 says 'c' in answer, which is none of a, b"),
    "an answer out of range": ([{**GOOD, "answer": 2}], "row 1 says '2'"),
    "an answer of no plain digit": ([{**GOOD, "answer": "²"}], "row 1 says '²'"),
    "a negative answer": ([{**GOOD, "answer": -1}], "row 1 says '-1'"),
    "no answer": ([GOOD, {**GOOD, "answer": None}], "row 2 says 'None' in answer"),
    "one choice": ([{**GOOD, "choices": ["a"]}], "row 1 has no list of two or more different texts in choices"),
    "the same choice twice": ([{**GOOD, "choices": ["a", "A"]}], "two or more different texts"),
    "a blank choice": ([{**GOOD, "choices": ["a", " "]}], "two or more different texts"),
    "choices that are no list": ([{**GOOD, "choices": "a or b"}], "has no list"),
    "a blank question": ([{**GOOD, "question": " "}], "row 1 has nothing in question"),
    "a question that is no text": ([{**GOOD, "question": ["Which?"]}], "row 1 has no text in question"),
    "a row that lacks a column": ([GOOD, {"question": "Which?", "choices": ["a", "b"]}], "row 2 has no answer"),
    "another word for yes": ([{"question": "Is it?", "context": "It is.", "answer": "certainly"}], "'certainly' in answer, which is none of yes, no, maybe"),
    "another word for entailment": ([{"sentence1": "A.", "sentence2": "B.", "gold_label": "-"}], "'-' in gold_label"),
    "a missing holding": ([{"citing_prompt": "<HOLDING>", "holding_0": "a", "holding_1": None, "label": 0}], "nothing in holding_1"),
    "no summary": ([{"source": "A bill.", "summary": "x"}, {"source": "A bill.", "summary": ""}], "row 2 has nothing in summary"),
    "a blank text": ([{"text": "x"}, {"text": "  "}], "row 2 has nothing in text"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_task_file_is_one_sentence(what, tmp_path):
    rows, words = BAD[what]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) or "[]")
    refused(lambda: load_task(path), "The task file", "exam.jsonl", words)


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b"{", "well-formed"), (b"\xff\xfe\x00", "binary")])
def test_a_file_that_cannot_be_read_is_one_sentence(content, words, tmp_path):
    (tmp_path / "exam.jsonl").write_bytes(content)
    refused(lambda: load_task(tmp_path / "exam.jsonl"), "exam.jsonl", words)


def test_names_that_are_no_task_are_refused(tmp_path):
    refused(lambda: load_task("leagl"), "'leagl' is not known", "take 'legal'")
    refused(lambda: load_task("exams/mine.jsonl"), "'exams/mine.jsonl' was not found")
    refused(lambda: load_task("mine=exams/mine.jsonl"), "was not found")
    for limit in (0, -1):
        refused(lambda: load_task("legal", limit=limit), f"limit {limit}")
        refused(lambda: drawn(text_task("mine", ["One.", "Two."]), limit, 0), f"limit {limit}")
    (tmp_path / "exam.pdf").write_bytes(b"%PDF")
    refused(lambda: load_task(tmp_path / "exam.pdf"), "extension is not supported")

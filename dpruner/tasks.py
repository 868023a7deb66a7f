"""Tasks: items with a known answer, in the formats of the field, as prompts for a model that continues text (METHOD section 7).

A task is named by one string: a built-in domain ("legal"), one of its tasks ("legal-choice"), an entry of the hub catalogue ("casehold") or a
file of the same columns. What a file holds is told by its columns, see FORMATS.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpruner import files, hub
from dpruner.calibration import builtin_domains, domain_label, load_tasks, load_texts
from dpruner.config import split_domain
from dpruner.errors import InputError
from dpruner.hub import CATALOGUE

KINDS = ("choice", "yes-no-maybe", "entailment", "summary", "perplexity")
YES_NO_MAYBE = ("yes", "no", "maybe")
ENTAILMENT = {"entailment": "True", "neutral": "Neither", "contradiction": "False"}   # the words that prompts ask for
HOLDING = "<HOLDING>"   # stands in CaseHOLD's text for the holding that is to be found; what follows it a model that reads on cannot use
ITEMS = 500             # of a task, unless more or fewer are asked for


@dataclass(frozen=True)
class Item:
    """One item of a task. The prompt is `context + ask`.

    Attributes:
        id: of the item in its file, or its number.
        context: what is shortened where a model has no room for it; of a text for perplexity, the text.
        ask: what follows it, kept whole.
        candidates: possible continuations, with the space they begin with; empty for summaries and texts.
        answer: index of the right one; -1 where there are none.
        reference: the right summary.
    """

    id: str
    context: str
    ask: str = ""
    candidates: tuple[str, ...] = ()
    answer: int = -1
    reference: str = ""

    @property
    def prompt(self) -> str:
        return self.context + self.ask


@dataclass(frozen=True)
class Task:
    """Items of one kind, under a name that is safe in file names."""

    name: str
    kind: str
    items: tuple[Item, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over kind, prompts and answers: equal exactly when a model would be given the same."""
        return hashlib.sha256(json.dumps([self.kind, [list(asdict(item).values()) for item in self.items]]).encode()).hexdigest()


class _Unfit(Exception):
    """Why a row is no item, for the inside of a sentence."""


class Format(NamedTuple):
    """A way to write a task down.

    Attributes:
        columns: what a row must have; of columns joined by "|" one.
        items: (row, id) -> (kind, Item).
        example: where it comes from.
    """

    columns: tuple[str, ...]
    item: Callable[[Mapping, str], tuple[str, Item]]
    example: str

    def fits(self, columns: Iterable[str]) -> bool:
        return all(set(one.split("|")) & set(columns) for one in self.columns)


def _text(row: Mapping, columns: str, blank: bool = False) -> str:
    """The text in the first of the columns that the row has."""
    name = next((c for c in columns.split("|") if row.get(c) is not None), columns.partition("|")[0])
    value = row.get(name)
    value = value if value is not None else ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise _Unfit(f"has no text in {name}")
    if not str(value).strip() and not blank:
        raise _Unfit(f"has nothing in {name}")
    return str(value).strip()


def _texts(row: Mapping, column: str) -> list[str]:
    """A list of texts, in JSON where the table knows no lists."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    texts = [v.strip() for v in value if isinstance(v, str) and v.strip()] if isinstance(value, list) else []
    if len(texts) < 2 or len(texts) != len(value) or len({t.lower() for t in texts}) != len(texts):
        raise _Unfit(f"has no list of two or more different texts in {column}")
    return texts


def _index(value, names: list[str], column: str) -> int:
    """Which of the names is meant, by itself or by its number from 0."""
    said = f"{value:g}" if isinstance(value, float) else str(value).strip()
    lowered = [name.lower() for name in names]
    if said.lower() in lowered:
        return lowered.index(said.lower())
    numbers = [str(i) for i in range(len(names))]
    if said in numbers:
        return numbers.index(said)
    shown = ", ".join(names) if len(" ".join(names)) < 60 else f"its {len(names)} choices"
    raise _Unfit(f"says {said[:40]!r} in {column}, which is none of {shown}, nor the number of one from 0")


def _question(row: Mapping, id: str) -> tuple[str, Item]:
    choices = _texts(row, "choices")
    kind = "yes-no-maybe" if sorted(choices) == sorted(YES_NO_MAYBE) else "choice"
    context = _text(row, "context", blank=True)
    return kind, Item(id, context and f"{context}\n", f"Question: {_text(row, 'question')}\nAnswer:", tuple(f" {c}" for c in choices),
                      _index(row["answer"], choices, "answer"))


def _yes_no_maybe(row: Mapping, id: str) -> tuple[str, Item]:
    passages = row["context"]
    if isinstance(passages, Mapping):   # as the hub has it, in sections
        passages = "\n".join(passages.get("contexts") or ())
    answer = next(c for c in ("final_decision", "answer") if c in row)
    return "yes-no-maybe", Item(id, f"{_text({'context': passages}, 'context')}\n", f"Question: {_text(row, 'question')}\nAnswer:",
                                tuple(f" {c}" for c in YES_NO_MAYBE), _index(row[answer], list(YES_NO_MAYBE), answer))


def _holding(row: Mapping, id: str) -> tuple[str, Item]:
    before = _text(row, "citing_prompt|context").partition(HOLDING)[0]   # where it is missing, the text ends at that place
    columns = sorted((c for c in row if c.startswith("holding_")), key=lambda c: (len(c), c))   # 2 before 10
    holdings = _texts(row, "endings") if "endings" in row else [_text(row, c) for c in columns]
    space = "" if before.endswith("(") else " "
    return "choice", Item(id, before.rstrip(), "", tuple(space + h for h in holdings), _index(row["label"], list(map(str, range(len(holdings)))), "label"))


def _entailment(row: Mapping, id: str) -> tuple[str, Item]:
    label = next(c for c in ("gold_label", "label") if c in row)
    return "entailment", Item(id, f"{_text(row, 'sentence1|premise')}\n", f"Question: {_text(row, 'sentence2|hypothesis')} True, False or Neither?\nAnswer:",
                              tuple(f" {word}" for word in ENTAILMENT.values()), _index(row[label], list(ENTAILMENT), label))


def _summary(row: Mapping, id: str) -> tuple[str, Item]:
    return "summary", Item(id, _text(row, "source|text|document|question|CHQ"), "\nSummary:", reference=_text(row, "summary|Summary"))


def _whole(row: Mapping, id: str) -> tuple[str, Item]:
    return "perplexity", Item(id, _text(row, "text"))


FORMATS = (   # the first that fits is taken
    Format(("citing_prompt|context", "holding_0|endings", "label"), _holding, "CaseHOLD"),
    Format(("question", "choices", "answer"), _question, "the built-in tasks"),
    Format(("sentence1|premise", "sentence2|hypothesis", "gold_label|label"), _entailment, "MedNLI"),
    Format(("question", "context", "answer|final_decision"), _yes_no_maybe, "PubMedQA"),
    Format(("source|text|document|question|CHQ", "summary|Summary"), _summary, "BillSum and MeQSum"),
    Format(("text",), _whole, "texts for perplexity"),
)


def builtin_tasks() -> dict[str, str]:
    """{name of a built-in task: its domain}."""
    found = {}
    for domain in builtin_domains():
        found |= {f"{domain}-{kind}": domain for kind in _builtin_kinds(domain)}
    return found


def load_task(name: str | Path, limit: int | None = ITEMS, seed: int = 0) -> list[Task]:
    """The tasks of a name; several where it stands for items of several kinds.

    Args:
        name: a built-in domain (its tasks, and its held-out text for perplexity), a built-in task, an entry of the hub catalogue, a file of
            the formats above (jsonl, csv or parquet; or txt and md, or a folder, for perplexity), or "name=path".
        limit: at most this many items of each task, drawn by the seed; None for all.
        seed: of the drawing.

    Raises:
        InputError: the name is not known, or what it stands for cannot be read or is no task.
    """
    require_limit(limit)
    label, source = split_domain(str(name))
    builtin = builtin_tasks()
    if str(name) in builtin_domains():
        found = [_builtin(str(name), kind) for kind in _builtin_kinds(str(name))]
    elif str(name) in builtin:
        domain = builtin[str(name)]
        found = [_builtin(domain, str(name).removeprefix(f"{domain}-"))]
    elif str(name) in CATALOGUE:
        if CATALOGUE[str(name)].tasks is None:
            tasks = ", ".join(n for n, entry in CATALOGUE.items() if entry.tasks)
            raise InputError(f"The hub data set {str(name)!r} has no task", "it is text without questions", f"choose one of {tasks}")
        found = from_rows(str(name), hub.task_rows(str(name)))
    elif path := files.existing(source):
        label = domain_label(label)
        if path.is_dir():
            found = [text_task(label, files.documents(path))]
        else:
            found = from_rows(label, files.rows(path), str(path))
    else:
        names = [*builtin_domains(), *builtin, *(n for n, entry in CATALOGUE.items() if entry.tasks)]
        near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
        raise InputError(f"The task {str(name)!r} is not known", f"it is neither built in ({', '.join(builtin)}) nor in the hub catalogue "
                         f"({', '.join(n for n, entry in CATALOGUE.items() if entry.tasks)}), nor a file here",
                         f"take {near[0]!r} if that was meant, or another of these names or a path" if near else "take one of these names or a path")
    return [drawn(task, limit, seed) for task in found]


def from_rows(name: str, rows: list[Mapping], where: str | None = None) -> list[Task]:
    """Tasks from the rows of a table, one for each kind of item in it.

    Args:
        name: of the task; the kind is added where there are several.
        rows: of one of FORMATS.
        where: what to call the rows in an error.

    Raises:
        InputError: there are none, their columns are those of no format, or a row lacks something.
    """
    what = f"The task file {where!r} cannot be used" if where else f"The task {name!r} cannot be used"
    if not rows:
        raise InputError(what, "it holds no items", "give a file with at least one row")
    columns = dict.fromkeys(c for row in rows for c, value in row.items() if value is not None)
    form = next((f for f in FORMATS if f.fits(columns)), None)
    if form is None:
        known = ", ".join(f"{' + '.join(c.replace('|', ' or ') for c in f.columns)} ({f.example})" for f in FORMATS)
        raise InputError(what, f"its columns ({', '.join(columns) or 'none'}) are those of no format", f"name them as one of these, {known}")
    found: dict[str, list[Item]] = {}
    for number, row in enumerate(rows, 1):
        try:
            if missing := [c for c in form.columns if not set(c.split("|")) & set(row)]:
                raise _Unfit(f"has no {missing[0].replace('|', ' or ')}")
            kind, item = form.item(row, str(next((row[c] for c in ("id", "example_id", "pubid") if row.get(c) is not None), number - 1)))
        except _Unfit as unfit:
            raise InputError(what, f"its row {number} {unfit}", "correct or remove it") from None
        found.setdefault(kind, []).append(item)
    return [Task(name if len(found) == 1 else f"{name}-{kind}", kind, tuple(items)) for kind, items in sorted(found.items())]


def text_task(label: str, texts: list[str]) -> Task:
    """Perplexity on documents, named after what they are about."""
    return Task(f"{label}-perplexity", "perplexity", tuple(Item(str(i), text) for i, text in enumerate(texts)))


def require_limit(limit: int | None) -> None:
    """Refuse a limit that leaves no item.

    Raises:
        InputError: says so.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit {limit} cannot be used", "no item would be left", "give 1 or more")


def drawn(task: Task, limit: int | None, seed: int) -> Task:
    """At most `limit` of a task's items, drawn by the seed, in their order.

    Raises:
        InputError: the limit leaves none.
    """
    require_limit(limit)
    if limit is None or len(task.items) <= limit:
        return task
    chosen = np.sort(np.random.default_rng(seed).permutation(len(task.items))[:limit])
    return Task(task.name, task.kind, tuple(task.items[i] for i in chosen))


def _builtin_kinds(domain: str) -> list[str]:
    """Kinds of the tasks of a built-in domain, perplexity last."""
    return [*(task.kind for task in _with_answers(domain)), "perplexity"]


def _builtin(domain: str, kind: str) -> Task:
    if kind == "perplexity":
        return text_task(domain, load_texts(domain, "heldout"))
    return next(task for task in _with_answers(domain) if task.kind == kind)


def _with_answers(domain: str) -> list[Task]:
    try:
        rows = load_tasks(domain)
    except InputError:   # tasks are written by hand, for a few domains only
        return []
    return [Task(f"{domain}-{task.kind}", task.kind, task.items) for task in from_rows(domain, rows)]

"""The evaluations of a run: every item a model has answered is kept in the run folder, so nothing is asked twice and any two models compare.

`evaluations/<method>@<domain>/<task>.parquet` (`evaluations/dense/` for the original) holds a row for each item and, as metadata, what decides
the rows: task, model, mask, seed. It grows by groups of items, each write a rename; one that was cut short goes on where it stopped.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from torch import nn

from dpruner import metrics, scoring, store, turns
from dpruner.calibration import builtin_domains, load_texts
from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.evaluate import require_seed
from dpruner.loading import pick_device
from dpruner.store import Run, open_run
from dpruner.tasks import ITEMS, Task, drawn, load_task, text_task
from dpruner.variants import DENSE, chosen, label, load_original, variant
from dpruner.walk import Progress, quiet

FOLDER = "evaluations"
COLUMNS = ("task", "kind", "metric", "method", "domain", "value", "low", "high", "n", "chance", "shortened", "against", "difference",
           "difference_low", "difference_high", "verdict")
Model = tuple[str, str]   # method and domain; ("dense", "") is the original


def evaluate(run: Run | str | Path, tasks: Sequence[str | Path | Task] | None = None, methods: Sequence[str] | None = None,
             domains: Sequence[str] | None = None, *, against: str = DENSE, limit: int | None = ITEMS, seed: int = 0, seqlen: int | None = None,
             device: str | None = None, progress: Progress = quiet, waiting: Callable[[int], None] = turns.say) -> pd.DataFrame:
    """Give tasks to the pruned models of a run, and to the one they are compared with, and sum up what they made of them.

    Args:
        run: a finished run, its folder or its id.
        tasks: names or files as `tasks.load_task` takes them, or tasks themselves; default for each domain of the run its built-in tasks and perplexity on the
            held-out text of the domain and of the open domain, as the run measured it.
        methods, domains: of the run; default all it holds.
        against: method of the run, or "dense": what each is compared with, on the same items.
        limit: at most this many items of each task, drawn by the seed; None for all.
        seed: of the items and of the bootstrap.
        seqlen: tokens a window of perplexity; default as in the run.
        device: as `load_model` takes it; default the run's own.
        progress: called with ("<task> · <method>@<domain>", items done, items).
        waiting: called with how many are ahead while others have the device, and when that changes; by default it is said on stderr.

    Returns:
        One row for each task, metric and model, the dense one first: COLUMNS. Shares are 0 to 1; a difference is to the model it is `against`,
        for perplexity as a share of its figure; the verdict is "better", "worse" or "inside the noise".

    Raises:
        InputError: no such run, mask or task, an item the model cannot read, or a negative seed.
    """
    require_seed(seed)
    run = run if isinstance(run, Run) else open_run(run)
    run.require_own_files()
    models = chosen(run, methods, domains)
    if against != DENSE:
        models = list(dict.fromkeys([*chosen(run, [against], domains), *models]))
    config = RunConfig.from_dict(run.config)
    if tasks is None:
        own = {domain: _own_tasks(config, domain, limit, seed) for domain in dict.fromkeys(domain for _, domain in models)}
        plan = {model: own[model[1]] for model in models}
    else:
        named = _distinct([task for one in tasks for task in ([one] if isinstance(one, Task) else load_task(one, limit, seed))])
        plan = dict.fromkeys(models, named)
    plan = {(DENSE, ""): list({task.name: task for of in plan.values() for task in of}.values()), **plan}

    with turns.turn(pick_device(device or config.device), waiting):
        _answer(run, plan, device, progress, seed, seqlen or config.eval_seqlen)
    return figures(run, {model: [task.name for task in of] for model, of in plan.items()}, against, seed)


def _answer(run: Run, plan: dict[Model, list[Task]], device: str | None, progress: Progress, seed: int, seqlen: int | None) -> None:
    """Give tasks to the models of a run; arguments as `evaluate` takes them."""
    original, tokenizer = load_original(run, device)
    key = {"model": run.record["model"]["fingerprint"], "device": original.device.type, "precision": str(original.dtype).removeprefix("torch."),
           "torch": version("torch"), "transformers": version("transformers"), "seed": seed, "seqlen": seqlen}
    for (method, domain), of in plan.items():
        with variant(original, run, method, domain):
            for task in of:
                what = f"{task.name} · {label(method, domain)}"
                answers(path_of(run, method, domain, task.name), {**key, "mask": _mask(run, method, domain)}, original, tokenizer, task,
                        progress=lambda _, done, total, what=what: progress(what, done, total))


def answers(path: Path, key: dict, model: nn.Module, tokenizer, task: Task, *, progress: Progress = quiet) -> pd.DataFrame:
    """What a model makes of every item of a task, from the file where it is there, computed and added to it where not.

    Args:
        path: of the file; one with another key, or damaged, begins anew.
        key: what decides the rows besides the task; its "seqlen" is that of perplexity's windows.
        model: as it is to be evaluated.

    Returns:
        Rows as `scoring.answered` gives them, all groups together; `attrs` hold the key, the task's name, kind and fingerprint, and how many
        items are done.

    Raises:
        InputError: as `scoring.answered`, or there is nothing in a task of texts to predict.
    """
    key = {**key, "task": task.name, "kind": task.kind, "fingerprint": task.fingerprint, "items": len(task.items)}
    rows = _stored(path, key)
    done = rows.attrs["done"] if rows is not None else 0
    for done, more in scoring.answered(model, tokenizer, task, done, seqlen=key.get("seqlen"), progress=progress):
        rows = more if rows is None else pd.concat([rows, more], ignore_index=True)
        rows.attrs = {**key, "done": done}
        store.write_table(path, rows)
    if not len(rows):
        raise InputError(f"The task {task.name!r} cannot be evaluated", "its texts hold no two tokens in a row", "give at least one sentence of text")
    return rows


def _stored(path: Path, key: dict) -> pd.DataFrame | None:
    """The rows in a file, finished or not; None where they were made of something else."""
    try:
        rows = store.read_table(path)
    except InputError:
        return None
    return rows if {k: v for k, v in rows.attrs.items() if k != "done"} == key and "done" in rows.attrs else None


def path_of(run: Run, method: str, domain: str, task: str) -> Path:
    """Where the answers of a model to a task lie."""
    return run.folder / FOLDER / label(method, domain) / f"{task}.parquet"


def stored(run: Run) -> Iterator[tuple[Model, str]]:
    """(model, name of the task) of every evaluation in a run that is complete."""
    for path in sorted((run.folder / FOLDER).glob("*/*.parquet")):
        method, _, domain = path.parent.name.partition("@")
        if finished(run, (method, domain), path.stem) is not None:
            yield (method, domain), path.stem


def finished(run: Run, model: Model, task: str) -> pd.DataFrame | None:
    """The answers of a model to all items of a task; None where they are not there, damaged or not complete."""
    try:
        rows = store.read_table(path_of(run, *model, task))
    except InputError:
        return None
    return rows if rows.attrs.get("done") == rows.attrs.get("items") and rows.attrs.get("kind") in metrics.METRICS else None


def figures(run: Run, asked: dict[Model, list[str]] | None = None, against: str = DENSE, seed: int = 0) -> pd.DataFrame:
    """All figures of stored evaluations, from the answers; no model is needed.

    Args:
        asked: {model: names of tasks}; default everything that is complete.
        against, seed: as `evaluate` takes them; what was not answered by the other, or over other items, has no difference.

    Returns:
        As `evaluate`.
    """
    if asked is None:
        asked = {}
        for model, task in stored(run):
            asked.setdefault(model, []).append(task)
    names = list(dict.fromkeys(task for of in asked.values() for task in of))
    models = sorted(asked, key=lambda model: model[0] != DENSE)
    found = [_row(run, metric, rows, model, task, against, seed) for task in names for model in models if task in asked[model]
             if (rows := finished(run, model, task)) is not None for metric in metrics.METRICS[rows.attrs["kind"]]]
    order = {name: i for i, name in enumerate(dict.fromkeys((row["task"], row["metric"]) for row in found))}
    return pd.DataFrame(sorted(found, key=lambda row: order[row["task"], row["metric"]]), columns=COLUMNS)


def _row(run: Run, metric: metrics.Metric, rows: pd.DataFrame, model: Model, task: str, against: str, seed: int) -> dict:
    value = metrics.figure(metric, rows, seed)
    row = {"task": task, "kind": rows.attrs["kind"], "metric": metric.name, "method": model[0], "domain": model[1], "value": float(value),
           "low": value.low, "high": value.high, "n": value.n, "chance": metrics.chance(rows) if metric is metrics.ACCURACY else float("nan"),
           "shortened": int(rows["shortened"].sum()) if "shortened" in rows else 0, "against": "", "difference": float("nan"),
           "difference_low": float("nan"), "difference_high": float("nan"), "verdict": ""}
    other = (DENSE, "") if against == DENSE else (against, model[1])
    others = finished(run, other, task) if model[0] not in (DENSE, against) else None
    if others is not None and others.attrs["fingerprint"] == rows.attrs["fingerprint"] and len(others) == len(rows):
        gap = metrics.difference(metric, rows, others, seed)
        row |= {"against": label(*other), "difference": float(gap), "difference_low": gap.low, "difference_high": gap.high,
                "verdict": metrics.verdict(metric, gap)}
    return row


def _mask(run: Run, method: str, domain: str) -> str:
    """SHA-256 in hex of the files that make a variant of a run; empty for the dense one."""
    paths = [run.path(kind, method, domain) for kind in ("masks", "weights")] if method != DENSE else []
    digest = hashlib.sha256()
    for path in filter(Path.is_file, paths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if paths else ""


def _own_tasks(config: RunConfig, label: str, limit: int | None, seed: int) -> list[Task]:
    """What a mask of a domain is judged on unless tasks are named."""
    sources = dict(split_domain(d) for d in config.domains)
    open_label, open_source = split_domain(config.general)
    found = []
    if sources[label] in builtin_domains():
        found = [task for task in load_task(sources[label], limit, seed) if task.kind != "perplexity"]
    for name, source in {label: sources[label], open_label: open_source}.items():
        texts = load_texts(source, "heldout", column=config.column if name in sources else None, limit=config.eval_documents)
        found.append(drawn(text_task(name, texts), limit, seed))
    return found


def _distinct(tasks: list[Task]) -> list[Task]:
    """
    Raises:
        InputError: two different tasks have one name.
    """
    found: dict[str, Task] = {}
    for task in tasks:
        if found.setdefault(task.name, task).fingerprint != task.fingerprint:
            raise InputError(f"The name {task.name!r} stands for two tasks", "their results would overwrite each other",
                             "give one of them another name, as name=path")
    return list(found.values())

"""Experiments: one question each, asked of several runs that differ in declared settings and are judged on the same texts.

An experiment is a folder: `experiment.json` (what was asked), `status.json`, `points/<point>/` (a run folder each, without its large files once it
is judged) and `results.parquet`. Its name follows from what is asked, so the same command goes on where an earlier one stopped: on the same files
only, whose fingerprints are kept.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dpruner import evaluations, files, metrics, pipeline, store
from dpruner.calibration import builtin_domains, load_texts
from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.finetune import finetuned
from dpruner.hub import CATALOGUE
from dpruner.masks import jaccard, jaccard_floor
from dpruner.status import Status
from dpruner.store import LazyMasks, Run
from dpruner.tasks import Task, builtin_tasks, drawn, text_task
from dpruner.variants import DENSE

MASKS = ("dpruner", "wanda", "magnitude", "general", "domain", "random")
BOTH = {"baseline_calibration": "mix"}   # the baselines see every text that D-Pruner sees
FROM_RUNS = ("jaccard", "jaccard floor", "jaccard ceiling", "jaccard halves", "decisions changed by λ")   # figures of a run that its experiment keeps
LARGE = ("weights", "ranks", "edges")   # folders of a point that nothing needs once it is judged
TUNED = "dense, tuned"   # the dense model, tuned as the pruned ones are
LIMIT = 100     # items of a task
ALL = "all"     # seeds together
TAKEN_BACK = "share of sparsegpt's loss taken back"
COLUMNS = ("x", "series", "method", "domain", "task", "metric", "value", "low", "high", "n", "against", "difference", "difference_low",
           "difference_high", "verdict")


class Point(NamedTuple):
    """One run of an experiment.

    Attributes:
        x: where it stands on the axis.
        variant: what tells its methods from the same ones of other points at that place; "" where nothing needs to, TUNED where nothing is removed.
        settings: what it changes in the settings of the experiment.
        tune: how its models are tuned afterwards, as `finetune.finetuned` takes it; None leaves them.
    """

    x: str
    variant: str
    settings: dict
    tune: str | None = None

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return "-".join(part.replace(" ", "-").replace(":", "of") for part in (self.x, self.variant) if part)

    def series(self, method: str) -> str:
        """What a table calls one of its methods."""
        return TUNED if self.variant == TUNED else f"{method}, {self.variant}" if self.variant else method


@dataclasses.dataclass(frozen=True)
class Design:
    """What an experiment asks and how.

    Attributes:
        question: in words.
        axis: what the values on it are.
        values: the usual ones.
        points: value -> the runs at it.
        against: what every figure is compared with, on the same items: ("series", name), at the same value, or ("x", value), of the same series.
        reading: what to know when reading its figures.
    """

    question: str
    axis: str
    values: tuple
    points: Callable[[object], list[Point]]
    against: tuple[str, str]
    reading: str


def _sparsity(s) -> list[Point]:
    return [Point(str(s), "", {"sparsity": s, "methods": (*MASKS, "sparsegpt"), "compensate": None, **BOTH}),
            Point(str(s), "walk", {"sparsity": s, "methods": ("dpruner",), "compensate": "walk"})]


def _walk(s) -> list[Point]:
    walk = {"sparsity": s, "methods": ("dpruner",), "compensate": "walk"}
    return [Point(str(s), "", {"sparsity": s, "methods": ("sparsegpt",), **BOTH}),
            Point(str(s), "walk", walk), Point(str(s), "walk, even", walk | {"allot": "even"}),
            Point(str(s), "walk, not refined", walk | {"refine": 0}), Point(str(s), "walk of METHOD", walk | {"allot": "even", "refine": 0}),
            Point(str(s), "walk, refined only", walk | {"allot": "even", "lam": 0.0})]   # SparseGPT's own score: what the steps alone give it


def _goal(s) -> list[Point]:
    return _walk(s)[:2]


def _seeds(seed) -> list[Point]:
    return [Point(str(seed), "", {"seed": seed, "methods": ("sparsegpt",), **BOTH}),
            Point(str(seed), "walk", {"seed": seed, "methods": ("dpruner",), "compensate": "walk"})]


def _lam(lam) -> list[Point]:
    return [Point(str(lam), "", {"lam": float(lam), "methods": ("dpruner",), "compensate": None}),
            Point(str(lam), "walk", {"lam": float(lam), "methods": ("dpruner",), "compensate": "walk"})]


def _formula(name) -> list[Point]:
    return [Point(name, variant, {"formula": name, "methods": ("dpruner",), "compensate": compensate})
            for variant, compensate in (("", None), ("after", "after"))]


def _granularity(name) -> list[Point]:
    n_of_m = {"sparsity": 1 - int(name.split(":")[0]) / int(name.split(":")[1])} if ":" in name else {}
    return [Point(name, variant, {"granularity": name, "methods": ("dpruner",), "compensate": compensate, **n_of_m})
            for variant, compensate in (("", None), ("after", "after"))]


def _calibration(nsamples) -> list[Point]:
    return [Point(str(nsamples), f"seed {seed}", {"nsamples": int(nsamples), "seed": seed, "methods": ("dpruner",), "halves": seed == 0})
            for seed in range(3)]


def _text(kind) -> list[Point]:
    return [Point(kind, "", {"baseline_calibration": kind, "methods": ("wanda", "sparsegpt")}),
            Point(kind, "walk", {"hessian": kind, "methods": ("dpruner",), "compensate": "walk"})]


def _transfer(s) -> list[Point]:
    return [Point(str(s), "", {"sparsity": s, "methods": ("dpruner",), "halves": True})]


def _finetune(how) -> list[Point]:
    tune = None if how == "none" else how
    return [Point(how, "", {"methods": ("dpruner", "sparsegpt", "magnitude"), "compensate": None, **BOTH}, tune),
            Point(how, "walk", {"methods": ("dpruner",), "compensate": "walk"}, tune),
            Point(how, TUNED, {"methods": ("magnitude",), "sparsity": 0.0, "compensate": None}, tune)]   # no mask: nothing to compare but the tuning


TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 9))
DESIGNS = {
    "sparsity": Design("How much can go, and by which method?", "sparsity", TENTHS, _sparsity, ("series", "sparsegpt"),
                       "Baselines see the text of the domain and of the open domain, all that D-Pruner sees. Only sparsegpt and the walk move the kept weights."),
    "goal": Design("Does the dual score in the walk beat SparseGPT, in the domain and outside it?", "sparsity", (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), _goal,
                   ("series", "sparsegpt"), "Both see the same text of the domain and of the open domain."),
    "seeds": Design("Does the walk beat SparseGPT whatever calibration text is drawn?", "seed", (0, 1, 2), _seeds, ("series", "sparsegpt"),
                    "Each seed draws other calibration sequences, for both methods alike; 'all' is the mean of the seeds' losses on each window, so its "
                    "interval is narrower than a seed's. It tells of other held-out text, the columns beside it of other calibration text."),
    "walk": Design("What makes the walk as good as it is?", "sparsity", (0.5, 0.7), _walk, ("series", "sparsegpt"),
                   "The walk has three parts: the dual score, sparsity allotted by loss, least-squares steps. 'even' is without the second, 'not refined' "
                   "without the third, 'of METHOD' the dual score alone, 'refined only' SparseGPT's own score with the steps: what SparseGPT would gain "
                   "by them."),
    "lambda": Design("What does λ change?", "λ", (0, 0.1, 0.3, 1, 3, 10), _lam, ("x", "1"),
                     "λ = 0 leaves the general side out of a mask's score. In the walk it leaves the loss's side out: SparseGPT's score chooses inside a "
                     "matrix, the loss still allots sparsity to the matrices."),
    "formulas": Design("Which formula deserves to be the default?", "formula", ("balanced", "taylor", "release"), _formula, ("x", "balanced"),
                       "'after': the same mask, with the kept weights moved afterwards."),
    "granularities": Design("Where should one threshold hold?", "granularity", ("matrix", "block", "row", "global", "2:4"), _granularity,
                            ("x", "matrix"), "'after': the same mask, with the kept weights moved afterwards. 2:4 removes half, whatever the others remove."),
    "calibration": Design("How much text does a mask need, and how much does its choice matter?", "sequences", (4, 16, 64), _calibration, ("x", "64"),
                          "Seeds draw other sequences from the same text; where a text is short they overlap, and seeds look more alike than texts would."),
    "text": Design("Which text should the baselines and the walk look at?", "calibration", ("general", "domain", "mix"), _text, ("x", "mix"),
                   "'mix' sees both texts, twice as much. The walk's Fishers are those of both sides throughout; its Hessian changes."),
    "transfer": Design("How good is every domain's mask on every domain's text, and does similarity predict it?", "sparsity", (0.5,), _transfer,
                       ("series", "own"), "Masks alone, by the dual score; the kept weights stay as they are."),
    "finetune": Design("What does tuning afterwards win back, with the mask held?", "tuned", ("none", "full"), _finetune, ("series", TUNED),
                       "Tuning also teaches the text itself, so every model is compared with the dense one after the same tuning: the same text, steps and "
                       "rates, and adapters of the same rank."),
}


class Experiment(Run):
    """The folder of an experiment: its status is told, waited for and cancelled like a run's."""

    @property
    def record(self) -> dict:
        """experiment.json: its name, settings, values, tasks, limit, fingerprints of its files, and when it was made.

        Raises:
            InputError: the file is missing or damaged, or of an experiment this version does not know.
        """
        path = self.folder / "experiment.json"
        found = store.read_json(path)
        if found.get("name") not in DESIGNS or not isinstance(found.get("config"), dict):
            raise InputError(f"The file {path} cannot be used", "it is damaged, or of another version of this program", "delete its folder and run again")
        return found

    @property
    def design(self) -> Design:
        return DESIGNS[self.record["name"]]

    def points(self) -> list[Point]:
        """Its runs, in their order."""
        return [point for value in self.record["values"] for point in self.design.points(value)]

    def run_of(self, point: Point) -> Run:
        return Run(self.folder / "points" / point.slug)

    def require_same_files(self) -> None:
        """Refuse texts and tasks that are not what they were: figures of two contents would stand in one table.

        A file that was not fingerprinted, as by an earlier version of this program, is taken as it is.

        Raises:
            InputError: names the first file that has changed or is gone.
        """
        for name, then in self.record.get("files", {}).items():
            path = files.existing(name)
            if path is None or files.fingerprint(path) != then:
                raise InputError(f"The experiment {self.id} cannot go on", f"{name!r} has changed since it began, and its earlier figures are of the old content",
                                 f"bring the old content back, or give the new one another name, or delete {self.folder} to begin anew")

    def results(self) -> pd.DataFrame:
        """results.parquet, one row for each figure: COLUMNS.

        Raises:
            InputError: it is missing or damaged.
        """
        return store.read_table(self.folder / "results.parquet")


def prepared(name: str, config: RunConfig, *, values: Sequence | None = None, tasks: Sequence[str] | None = None, limit: int | None = LIMIT,
             root: str | Path = "experiments") -> Experiment:
    """The folder of an experiment, made or found: the same question is the same folder.

    Args:
        name: of DESIGNS.
        config: settings of all its runs, but for what each point changes.
        values: on the axis; default the usual ones.
        tasks: names or files as `evaluate` takes them, for every mask; default perplexity on held-out text of its domain and of the open domain.
        limit: items of each task, at most.
        root: folder of the experiments.

    Raises:
        InputError: the name, a value or a setting cannot be used, or a file is gone or no longer what the experiment began with.
    """
    if name not in DESIGNS:
        raise InputError(f"The experiment {name!r} is not known", "each asks one question", f"choose one of {', '.join(DESIGNS)}")
    design = DESIGNS[name]
    values = list(values or design.values)
    if isinstance(design.values[0], float | int):
        try:
            values = [type(design.values[-1])(v) if "." not in str(v) else float(v) for v in values]
        except ValueError:
            raise InputError(f"The values {', '.join(map(str, values))} cannot be used", f"{design.axis} is a number", "correct them") from None
    config = dataclasses.replace(config, evaluate=False, halves=False, sides=False)
    for value in values:
        try:
            points = design.points(value)
        except (ValueError, IndexError, ZeroDivisionError):
            raise InputError(f"The value {value!r} cannot be used", f"it is no {design.axis}", f"take such as {design.values[0]}") from None
        for point in points:
            dataclasses.replace(config, **point.settings).check()
    asked = {"name": name, "config": config.to_dict(), "values": values, "tasks": [str(t) for t in tasks] if tasks else None, "limit": limit}
    decides = {**asked, "config": {k: v for k, v in asked["config"].items() if k != "memory"}}   # which changes no bit
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    labels = "-".join(split_domain(d)[0] for d in config.domains)
    experiment = Experiment(Path(root) / f"{name}-{labels[:60]}-{digest}")
    if (experiment.folder / "experiment.json").is_file():
        experiment.require_same_files()
    else:
        store.write_json(experiment.folder / "experiment.json", {**asked, "files": _fingerprints(config, tasks or ()),
                                                                 "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
    return experiment


def _fingerprints(config: RunConfig, tasks: Sequence[str]) -> dict[str, str]:
    """{path as it was given: its fingerprint} of all texts and tasks that are files or folders."""
    known = {*builtin_domains(), *builtin_tasks(), *CATALOGUE}
    sources = [split_domain(str(name))[1] for name in (*config.domains, config.general, *tasks)]
    paths = {source: files.existing(source) for source in dict.fromkeys(sources) if source not in known}
    return {source: files.fingerprint(path) for source, path in paths.items() if path}


def conduct(experiment: Experiment, *, cache: str | Path = "cache", watch: Callable[[Status], None] | None = None,
            waiting: Callable[[int], None] = lambda ahead: None) -> pd.DataFrame:
    """Do what is left of an experiment, and sum it up.

    Args:
        cache: as `pipeline.run` takes it.
        watch: called with the experiment's Status after every step.
        waiting: as `pipeline.run` takes it, at each point.

    Returns:
        As `Experiment.results`.

    Raises:
        InputError: one sentence on what is wrong; also kept in status.json.
        KeyboardInterrupt: after status.json says "cancelled".
    """
    record, points = experiment.record, experiment.points()
    with Status(experiment.folder, watch) as status:
        status.plan = [(point.slug, 1.0, point.slug) for point in points]
        dense = None   # answers of the original, which all points share
        for number, point in enumerate(points):
            run, status.about = experiment.run_of(point), f"point {number + 1} of {len(points)}"
            status.step(point.slug, 0, 100)
            experiment.require_same_files()
            if not is_judged(run):
                if dense:
                    shutil.copytree(dense, run.folder / evaluations.FOLDER / DENSE, dirs_exist_ok=True)
                _conduct(run, point, record, cache, lambda share, slug=point.slug: status.step(slug, round(99 * share), 100), waiting)
            dense = run.folder / evaluations.FOLDER / DENSE
            found = summed_up(experiment)   # after each, so that what is known so far can be seen
            store.write_table(experiment.folder / "results.parquet", found)
            status.step(point.slug, 100, 100)
    return found


def _conduct(run: Run, point: Point, record: dict, cache, progress: Callable[[float], None], waiting) -> None:
    """One point: prune, tune where it is asked for, judge, and leave out what takes much room."""
    asked = RunConfig.from_dict(record["config"])
    config = dataclasses.replace(asked, **point.settings)
    if not (run.folder / store.LAST).is_file():
        pipeline.run(config, folder=run.folder, cache=cache, watch=lambda status: progress(status.share / 2), waiting=waiting)
    if point.tune:
        finetuned(run, point.tune)
    labels = [split_domain(d)[0] for d in config.domains]
    everything = record["tasks"] or record["name"] == "transfer"
    for label in [None] if everything else labels:
        evaluations.evaluate(run, record["tasks"] or _texts(config, labels if label is None else [label], record["limit"]),
                             domains=None if label is None else [label], limit=record["limit"], seed=asked.seed,
                             progress=lambda _, done, total: progress(0.5 + done / total / 2))
    for folder in LARGE:
        shutil.rmtree(run.folder / folder, ignore_errors=True)
    store.write_json(run.folder / "judged.json", {"tune": point.tune})


def is_judged(run: Run) -> bool:
    """Whether a point is done."""
    return (run.folder / "judged.json").is_file()


def _texts(config: RunConfig, labels: list[str], limit: int | None) -> list[Task]:
    """Held-out text of domains and of the open domain, as a run takes it."""
    sources = dict(split_domain(d) for d in (*config.domains, config.general))
    open_label = split_domain(config.general)[0]
    return [drawn(text_task(name, load_texts(sources[name], "heldout", column=config.column if name != open_label else None,
                                             limit=config.eval_documents)), limit, 0) for name in dict.fromkeys((*labels, open_label))]


# ---- summing up


def summed_up(experiment: Experiment) -> pd.DataFrame:
    """All figures of an experiment's finished points, from their answers; no model is needed."""
    points, (kind, other) = experiment.points(), experiment.design.against
    if kind == "x" and other not in {point.x for point in points}:
        other = points[-1].x
    answers = {}   # (x, series, domain, task) -> rows
    points = [point for point in points if is_judged(experiment.run_of(point))]
    for point in points:
        run = experiment.run_of(point)
        for (method, domain), task in evaluations.stored(run):
            series = DENSE if method == DENSE else point.series(method)
            rows = answers.setdefault((point.x, series, domain, task), evaluations.finished(run, (method, domain), task))
            rows.attrs["method"] = method
    if experiment.record["name"] == "seeds":
        answers |= _over_seeds(answers, {point.x for point in experiment.points()})
    found = []
    for (x, series, domain, task), rows in answers.items():
        key = (x, other, domain, task) if kind == "series" else (other, series, domain, task)
        if other == "own":   # the mask of the very domain that the text is of
            key = (x, series, task.removesuffix("-perplexity"), task)
        against = answers.get(key) if domain and key != (x, series, domain, task) else None
        for metric in metrics.METRICS[rows.attrs["kind"]]:
            value = metrics.figure(metric, rows)
            row = {"x": x, "series": series, "method": rows.attrs["method"], "domain": domain, "task": task, "metric": metric.name, "value": float(value),
                   "low": value.low, "high": value.high, "n": value.n}
            if against is not None:
                gap = metrics.difference(metric, rows, against)
                row |= {"against": key[2] if other == "own" else other, "difference": float(gap),
                        "difference_low": gap.low, "difference_high": gap.high, "verdict": metrics.verdict(metric, gap)}
            found.append(row)
    found += list(_taken_back(points, answers))
    found += [row for point in points for row in _of_run(experiment.run_of(point), point)]
    if experiment.record["name"] == "calibration":
        found += list(_between_seeds(experiment, points))
    table = pd.DataFrame(found, columns=COLUMNS)
    return table.astype(dict.fromkeys(("against", "verdict"), object)).fillna({"against": "", "verdict": ""})


def _taken_back(points: list[Point], answers: dict) -> Iterator[dict]:
    """What walks take back of SparseGPT's loss at the same sparsity: a difference in % says little where there is little to gain."""
    walks = {p.series("dpruner") for p in points if p.settings.get("compensate") == "walk"}
    for (x, series, domain, task), rows in answers.items():
        theirs, dense = answers.get((x, "sparsegpt", domain, task)), answers.get((x, DENSE, "", task))
        if series in walks and theirs is not None and dense is not None and rows.attrs["kind"] == "perplexity":
            share = metrics.taken_back(rows, theirs, dense)
            if share is not None:
                yield {"x": x, "series": series, "method": rows.attrs["method"], "domain": domain, "task": task, "metric": TAKEN_BACK, "value": float(share),
                       "low": share.low, "high": share.high, "n": share.n}


def _over_seeds(answers: dict, seeds: set[str]) -> dict:
    """Answers as of a seed "all", once all seeds have answered: each window's loss is summed, so that perplexity is that of the mean loss."""
    found: dict[tuple, list[pd.DataFrame]] = {}
    for (_, *of), rows in answers.items():
        found.setdefault((ALL, *of), []).append(rows)
    return {key: each[0].assign(loss=sum(rows["loss"] for rows in each), tokens=sum(rows["tokens"] for rows in each))
            for key, each in found.items() if len(each) == len(seeds) > 1 and each[0].attrs["kind"] == "perplexity"}


def _of_run(run: Run, point: Point) -> Iterator[dict]:
    """Figures of a run's own table that its experiment keeps; the other domain of a similarity stands in the column of tasks."""
    table = run.metrics()
    for r in table[table.metric.isin(FROM_RUNS)].itertuples():
        yield {"x": point.x, "series": point.series(r.method), "method": r.method, "domain": r.domain, "task": r.text, "metric": r.metric,
               "value": r.value, "n": r.n}


def _between_seeds(experiment: Experiment, points: list[Point]) -> Iterator[dict]:
    """How alike masks are that differ in nothing but the calibration text drawn."""
    for x in dict.fromkeys(point.x for point in points):
        runs = [experiment.run_of(point) for point in points if point.x == x]
        for i, one in enumerate(runs):
            for other in runs[i + 1:]:
                for method, domain in one.pairs():
                    a, b = (LazyMasks(run.path("masks", method, domain)) for run in (one, other))
                    for metric, value in (("jaccard between seeds", jaccard(a, b)), ("jaccard floor", jaccard_floor(a, b))):
                        yield {"x": x, "series": method, "method": method, "domain": domain, "task": domain, "metric": metric, "value": value,
                               "n": sum(m.numel() for m in a.values())}


def find_experiments(root: str | Path = "experiments") -> list[Experiment]:
    """The experiments below a folder, newest first; damaged ones are passed over."""
    found = []
    for path in Path(root).glob("*/experiment.json"):
        try:
            found.append((Experiment(path.parent).record["created"], Experiment(path.parent)))
        except (InputError, KeyError):
            continue
    return [experiment for _, experiment in sorted(found, key=lambda pair: (pair[0], pair[1].id), reverse=True)]

"""Experiments: one question each, asked of several runs that differ in declared settings and are judged on the same texts.

An experiment is a folder: `experiment.json` (what was asked), `status.json`, `points/<point>/` (a run folder each, without its large files
once it is judged) and `results.parquet`. Its name follows from what is asked, so the same command goes on where an earlier one stopped: on
the same files only, whose fingerprints are kept.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from dpruner import evaluations, files, metrics, pipeline, store, turns
from dpruner.calibration import builtin_domains, load_texts
from dpruner.config import RunConfig, split_domain
from dpruner.designs import DESIGNS, Design, Point, points_of
from dpruner.errors import InputError
from dpruner.finetune import finetuned, require_library, require_way
from dpruner.forecast import Forecast, Judged, Seconds, forecast, outlined_task, outlined_texts
from dpruner.hub import CATALOGUE
from dpruner.loading import pick_device
from dpruner.masks import jaccard, jaccard_floor
from dpruner.status import Status
from dpruner.store import LazyMasks, Run
from dpruner.tasks import Task, builtin_tasks, drawn, load_task, require_limit, text_task
from dpruner.variants import DENSE

# figures of a run that its experiment keeps
FROM_RUNS = ("jaccard", "jaccard floor", "jaccard ceiling", "jaccard halves", "decisions changed by λ")
LARGE = ("weights", "ranks", "edges")   # folders of a point that nothing needs once it is judged
LIMIT = 100     # items of a task
STEPS = 100     # that a point is told in
ALL = "all"     # seeds together
TAKEN_BACK = "share of sparsegpt's loss taken back"
COLUMNS = ("x", "series", "method", "domain", "task", "metric", "value", "low", "high", "n", "against", "difference", "difference_low",
           "difference_high", "verdict")


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
            raise InputError(f"The file {path} cannot be used", "it is damaged, or of another version of this program",
                             "delete its folder and run again")
        return found

    @property
    def design(self) -> Design:
        return DESIGNS[self.record["name"]]

    def points(self) -> list[Point]:
        """Its runs, in their order."""
        return points_of(self.record)

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
                raise InputError(f"The experiment {self.id} cannot go on",
                                 f"{name!r} has changed since it began, and its earlier figures are of the old content",
                                 f"bring the old content back, or give the new one another name, or delete {self.folder} to begin anew")

    def require_same_model(self, run: Run) -> None:
        """Refuse a point whose model is not that of the points before it; its run is taken away again.

        Raises:
            InputError: says so.
        """
        first = next((other for other in map(self.run_of, self.points()) if is_judged(other)), run)
        if first.record["model"]["fingerprint"] != run.record["model"]["fingerprint"]:
            shutil.rmtree(run.folder)
            raise InputError(f"The experiment {self.id} cannot go on",
                             "its model has changed since it began, and its earlier figures are of the old one",
                             f"bring the old one back, or give the new one another name, or delete {self.folder} to begin anew")

    def results(self) -> pd.DataFrame:
        """results.parquet, one row for each figure: COLUMNS.

        Raises:
            InputError: it is missing or damaged.
        """
        return store.read_table(self.folder / "results.parquet")


def asked(name: str, config: RunConfig, *, values: Sequence | None = None, tasks: Sequence[str] | None = None,
          limit: int | None = LIMIT) -> dict:
    """What an experiment asks, as experiment.json holds it.

    Args:
        name: of DESIGNS.
        config: settings of all its runs, but for what each point changes.
        values: on the axis; default the usual ones.
        tasks: names or files as `evaluate` takes them, for every mask; default perplexity on held-out text of its domain and of the open
            domain.
        limit: items of each task, at most.

    Raises:
        InputError: the name, a value, the limit or a setting cannot be used.
    """
    if name not in DESIGNS:
        raise InputError(f"The experiment {name!r} is not known", "each asks one question", f"choose one of {', '.join(DESIGNS)}")
    design = DESIGNS[name]
    values = list(dict.fromkeys(_on_axis(value, design) for value in values or design.values))
    require_limit(limit)
    config = dataclasses.replace(config, evaluate=False, halves=False, sides=False)
    for value in values:
        try:
            points = design.points(value)
        except (ValueError, IndexError, ZeroDivisionError):
            raise InputError(f"The value {value!r} cannot be used", f"it is no {design.axis}", f"take such as {design.values[0]}") from None
        for point in points:
            dataclasses.replace(config, **point.settings).check()
            require_way(point.tune)
    return {"name": name, "config": config.to_dict(), "values": values, "tasks": [str(t) for t in tasks] if tasks else None, "limit": limit}


def _on_axis(value, design: Design):
    """A value as the usual ones are: a number where they are numbers, and a whole one where all of them are.

    Raises:
        InputError: it is none.
    """
    kinds = {type(usual) for usual in design.values}
    if kinds == {str}:
        return value
    with contextlib.suppress(ValueError):
        number = float(value)
        if int in kinds and number.is_integer():
            return int(number)
        if float in kinds and math.isfinite(number):
            return number
    raise InputError(f"The value {value!r} cannot be used", f"{design.axis} is a {'whole ' * (float not in kinds)}number",
                     f"take such as {design.values[0]}")


def place(question: dict, root: str | Path = "experiments") -> Experiment:
    """The folder of what `asked` gives, whether it is there or not: the same question is the same folder."""
    config = question["config"]
    decides = {**question, "config": {k: v for k, v in config.items() if k != "memory"}}   # which changes no bit
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    labels = "-".join(split_domain(d)[0] for d in config["domains"])
    return Experiment(Path(root) / f"{question['name']}-{labels[:60]}-{digest}")


def prepared(name: str, config: RunConfig, *, root: str | Path = "experiments", **how) -> Experiment:
    """The folder of an experiment, made or found.

    Args:
        root: folder of the experiments.
        name, config, how: as `asked` takes them.

    Raises:
        InputError: as `asked`; or a file is gone or no longer what the experiment began with.
    """
    question = asked(name, config, **how)
    experiment = place(question, root)
    path = experiment.folder / "experiment.json"
    if path.is_file():
        experiment.require_same_files()
        kept = experiment.record
    else:
        kept = {"files": _fingerprints(config, question["tasks"] or ()), "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    store.write_json(path, {**kept, **question})   # also where it goes on: its limit of memory may be another
    return experiment


def _fingerprints(config: RunConfig, tasks: Sequence[str]) -> dict[str, str]:
    """{path as it was given: its fingerprint} of all texts and tasks that are files or folders."""
    known = {*builtin_domains(), *builtin_tasks(), *CATALOGUE}
    sources = [split_domain(str(name))[1] for name in (*config.domains, config.general, *tasks)]
    paths = {source: files.existing(source) for source in dict.fromkeys(sources) if source not in known}
    return {source: files.fingerprint(path) for source, path in paths.items() if path}


def foreseen(question: dict, experiment: Experiment, **known) -> Forecast:
    """How long an experiment will take, as far as it is not done yet; nothing is downloaded for it.

    Args:
        question: what it asks, as `asked` gives it or `Experiment.record` holds it.
        experiment: its folder, which need not be there.
        known: as `forecast` takes it.

    Raises:
        InputError: the model, a text or a task cannot be used.
    """
    shared, tasks = RunConfig.from_dict(question["config"]), judged_on(question, outlined_task, outlined_texts)
    return forecast([Judged(dataclasses.replace(shared, **point.settings), point.tune, tasks, is_judged(experiment.run_of(point)))
                     for point in points_of(question)], **known)


def conduct(experiment: Experiment, *, cache: str | Path = "cache", watch: Callable[[Status], None] | None = None,
            waiting: Callable[[int], None] = turns.say) -> pd.DataFrame:
    """Do what is left of an experiment, and sum it up.

    Args:
        cache: as `pipeline.run` takes it.
        watch: called with the experiment's Status after every step; its time left follows from what the finished points took.
        waiting: as `pipeline.run` takes it, at each point.

    Returns:
        As `Experiment.results`.

    Raises:
        InputError: one sentence on what is wrong; also kept in status.json.
        KeyboardInterrupt: after status.json says "cancelled".
    """
    record, points = experiment.record, experiment.points()
    with Status(experiment.folder, watch) as status:
        device = pick_device(record["config"]["device"])

        def wait(ahead: int) -> None:
            status.queue(device, ahead)
            waiting(ahead)

        experiment.require_same_files()
        for point in points:
            require_library(point.tune)
        expected = foreseen(record, experiment).points
        status.plan = [(point.slug, sum(seconds), point.slug) for point, seconds in zip(points, expected, strict=True)]
        dense = None   # answers of the original, which all points share
        for number, (point, seconds) in enumerate(zip(points, expected, strict=True)):
            run, status.about = experiment.run_of(point), f"{number} of {len(points)} points done"
            if is_judged(run):
                status.skip(point.slug)
            else:
                experiment.require_same_files()
                status.step(point.slug, 0, STEPS)
                if dense:
                    shutil.copytree(dense, run.folder / evaluations.FOLDER / DENSE, dirs_exist_ok=True)
                _conduct(experiment, run, point, cache, seconds,
                         lambda share, slug=point.slug: status.step(slug, min(round(STEPS * share), STEPS - 1), STEPS), wait)
            dense = run.folder / evaluations.FOLDER / DENSE
            found = summed_up(experiment)   # after each, so that what is known so far can be seen
            store.write_table(experiment.folder / "results.parquet", found)
            status.about = f"{number + 1} of {len(points)} points done"
            status.step(point.slug, STEPS, STEPS)
    return found


def _conduct(experiment: Experiment, run: Run, point: Point, cache, seconds: Seconds, progress: Callable[[float], None], waiting) -> None:
    """One point: prune, tune where it is asked for, judge, and leave out what takes much room."""
    record = experiment.record
    shared = RunConfig.from_dict(record["config"])
    config, (pruning, tuning, judging) = dataclasses.replace(shared, **point.settings), (part / sum(seconds) for part in seconds)
    tasks, answering = judged_on(record), []
    # of a model and a task, the dense one's among them
    pairs = sum(len(given) * (1 + len(labels) * len(config.methods)) for labels, given in tasks)

    def answered(what: str, done: int, total: int) -> None:
        answering.extend({what} - set(answering))
        progress(pruning + tuning + judging * min(1.0, (len(answering) - 1 + done / total) / pairs))

    with turns.turn(pick_device(config.device), waiting):
        if not (run.folder / store.LAST).is_file():
            pipeline.run(config, folder=run.folder, cache=cache, watch=lambda status: progress(pruning * status.share))
        experiment.require_same_model(run)
        if point.tune:
            finetuned(run, point.tune)
        for labels, given in tasks:
            evaluations.evaluate(run, given, domains=labels, seed=shared.seed, progress=answered)
    for folder in LARGE:
        shutil.rmtree(run.folder / folder, ignore_errors=True)
    store.write_json(run.folder / "judged.json", {"tune": point.tune})


def is_judged(run: Run) -> bool:
    """Whether a point is done."""
    return (run.folder / "judged.json").is_file()


def judged_on(question: dict, task: Callable = load_task, texts: Callable = load_texts) -> list[tuple[list[str], list[Task]]]:
    """(domains, tasks that their masks are given): those that were named, or held-out text of the domain and of the open domain, as a run
    takes it.

    Args:
        question: as `asked` gives it or `Experiment.record` holds it.
        task, texts: in place of `load_task` and `load_texts`.
    """
    config, limit = RunConfig.from_dict(question["config"]), question["limit"]
    labels, open_label = [split_domain(d)[0] for d in config.domains], split_domain(config.general)[0]
    if question["tasks"]:
        return [(labels, [one for name in question["tasks"] for one in task(name, limit, config.seed)])]
    read = {label: drawn(text_task(label, texts(source, "heldout", column=config.column if label in labels else None,
                                                limit=config.eval_documents)), limit, 0)
            for label, source in dict(split_domain(d) for d in (*config.domains, config.general)).items()}
    together = [labels] if question["name"] == "transfer" else [[label] for label in labels]
    return [(of, [read[name] for name in dict.fromkeys((*of, open_label))]) for of in together]


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
            row = {"x": x, "series": series, "method": rows.attrs["method"], "domain": domain, "task": task, "metric": metric.name,
                   "value": float(value), "low": value.low, "high": value.high, "n": value.n}
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
                yield {"x": x, "series": series, "method": rows.attrs["method"], "domain": domain, "task": task, "metric": TAKEN_BACK,
                       "value": float(share), "low": share.low, "high": share.high, "n": share.n}


def _over_seeds(answers: dict, seeds: set[str]) -> dict:
    """Answers as of a seed "all", once all seeds have answered: each window's loss is summed, so perplexity is that of the mean loss."""
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
                        yield {"x": x, "series": method, "method": method, "domain": domain, "task": domain, "metric": metric,
                               "value": value, "n": sum(m.numel() for m in a.values())}


def find_experiments(root: str | Path = "experiments") -> list[Experiment]:
    """The experiments below a folder, newest first; damaged ones are passed over."""
    found = []
    for path in Path(root).glob("*/experiment.json"):
        try:
            found.append((Experiment(path.parent).record["created"], Experiment(path.parent)))
        except (InputError, KeyError):
            continue
    return [experiment for _, experiment in sorted(found, key=lambda pair: (pair[0], pair[1].id), reverse=True)]

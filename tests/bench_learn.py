"""The benchmarks of the page Learn: how long its lesson takes to be made, and what every interaction with it costs the server."""

import itertools
import statistics
import tempfile
import time
import timeit
from pathlib import Path

from bench_app import changed, largest_figure, opened

SENTENCES = ("The doctor prescribed a lower dose for the child.", "The court held that the license had expired.")
CHANGES = {   # step: interactions, each with a value that the app has not seen
    "Why": [{"prompt": "The symptoms of diabetes"}, {"prompt": "The treatment of asthma includes"}],
    "Linear": [{"view": "b: inputs H"}, {"view": "c: an input's own"}, {"view": "d: cost G"}, {"row": 200, "column": 300}, {"row": 17}, {"column": 64}],
    "Columns": [{"share": 25}, {"share": 75}],
    "Sentence": [{"power-balanced": 1}, {"power-balanced": -2}, {"formula": "release"}, {"power-release": 6}, {"formula": "taylor"},
                 {"power-taylor": 9}, {"row": 100, "column": 40}, {"against": "from_usual"}],
    "Plane": [{"general": 61}, {"domain": 27}, {"general": 90}, {"domain": 75}],
    "Sparsity": [{"sparsity": 60}, {"sparsity": 90}, {"sparsity": 0}],
    "Predict": [{"guess-random": 33}, {"guess-module": "mlp.down_proj"}, {"reveal": True}],
    "Similarity": [{"alike": 80}, {"sides": "the domain alone"}, {"alike": 30}, {"mine": True}],
    "Speed": []}


def lesson(row) -> None:
    """The lesson on the starter beside the demonstration run: made once, then every step and every change."""
    from analysis.lesson import prepare
    from app import demo, state
    from app.lesson import job
    from dpruner import pipeline, store
    from dpruner.store import Run
    with tempfile.TemporaryDirectory() as folder:
        state.RUNS, state.CACHE = Path(folder, "runs"), Path(folder, "cache")
        start = time.perf_counter()
        pipeline.run(demo.CONFIG, runs=state.RUNS, cache=state.CACHE)
        demonstration = time.perf_counter() - start
        run = Run(state.CACHE / "lesson" / job.key())
        store.write_json(run.folder / "run.json", {"config": demo.CONFIG.to_dict()})
        store.write_json(run.folder / "status.json", {"state": "queued"})
        start = time.perf_counter()
        prepare.prepare(run.folder, state.RUNS, state.CACHE)
        row("the lesson of the page Learn, made once", f"the demonstration run ({demonstration:.0f} s)", f"{time.perf_counter() - start:.0f} s", "≤ 40 s")
        opened("learn")   # the libraries
        opening, figures = [], []
        for step, changes in CHANGES.items():
            page, took = opened("learn", **{"learn-step": step})
            opening.append(took)
            figures.append(largest_figure(page))
            seconds = []
            for change in changes:
                page, took = changed(page, **{f"learn-{key}": value for key, value in change.items()})
                seconds.append(took)
                figures.append(largest_figure(page))
            if seconds:
                told(row, f"page Learn, {len(seconds)} changes in the step {step}", seconds, "≤ 200 ms")
        told(row, "page Learn, a step opened by its link in a new browser", opening, "≤ 500 ms")
        row("page Learn, its largest figure", "2 MB", f"{max(figures) / 1e3:.0f} kB", "≤ 2 MB")
        typed(row, run)


def typed(row, run) -> None:
    """A sentence of one's own: when its tile and its matrix stand there, when the model at the slider's λ, when at all λ."""
    from analysis.lesson import numbers, prepare
    from app import resident
    from app.lesson import counting, job
    from dpruner.formulas import FORMULAS
    page, _ = opened("learn", **{"learn-step": "Sentence"})
    count, begun = numbers.changed_by_matrix, []   # what the page calls when all that comes before has been drawn

    def watched(*args):
        begun.append(time.perf_counter())
        return count(*args)

    counting.numbers.changed_by_matrix = watched
    for sentence, what in zip(SENTENCES, ("the first sentence of one's own", "the next"), strict=True):
        begun.clear()
        start = time.perf_counter()
        changed(page, **{"learn-sentence": sentence})
        done = time.perf_counter() - start
        tile, model, second, _ = (moment - start for moment in begun)   # one λ, then all λ by each of three formulas
        with resident.taken(run) as found:
            start = time.perf_counter()
            read = numbers.read_sentence(found.model, found.tokenizer, sentence)
            gradient = time.perf_counter() - start
        row(f"page Learn, {what}: tile and matrix answered", f"its gradient alone ({gradient * 1e3:.0f} ms)", f"{tile * 1e3:.0f} ms",
            "≤ 200 ms")
        row(f"page Learn, {what}: the model counted at one λ · at all by one formula · at all by all",
            "", f"{model * 1e3:.0f} ms · {second:.1f} s · {done:.1f} s", "")
    counting.numbers.changed_by_matrix = count
    weights, G = counting.dense(run, str(run.folder)), job.general(run)

    def anew():   # every mask as the engine makes it
        for (name, w), formula in itertools.product(weights.items(), FORMULAS):
            for lam in (0.0, *numbers.LAMBDAS):
                numbers.kept_by(formula, lam, w, read.gradients[name], G[name], prepare.SPARSITY)

    def together():
        for formula in FORMULAS:
            list(count(formula, weights, read.gradients, G, prepare.SPARSITY))

    plain, fast = (min(timeit.repeat(way, number=1, repeat=3)) for way in (anew, together))
    row("what λ changes in the whole model, all λ, all formulas", f"every mask made anew ({plain:.1f} s)", f"{plain / fast:.1f}× faster", "≥ 2×")


def told(row, what: str, seconds: list[float], wanted: str) -> None:
    row(what, f"the slowest of {len(seconds)}: {max(seconds) * 1e3:.0f} ms", f"median {statistics.median(seconds) * 1e3:.0f} ms", wanted)

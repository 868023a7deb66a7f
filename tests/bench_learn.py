"""The benchmarks of the page Learn: how long its lesson takes to be made, and what every interaction with it costs the server."""

import statistics
import tempfile
import time
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
        page, _ = opened("learn", **{"learn-step": "Sentence"})
        for sentence, what in zip(SENTENCES, ("the first", "the next"), strict=True):
            _, took = changed(page, **{"learn-sentence": sentence})
            row(f"page Learn, {what} sentence of one's own, all λ counted", "2 s", f"{took:.1f} s", "≤ 2 s")


def told(row, what: str, seconds: list[float], wanted: str) -> None:
    row(what, f"the slowest of {len(seconds)}: {max(seconds) * 1e3:.0f} ms", f"median {statistics.median(seconds) * 1e3:.0f} ms", wanted)

"""What experiments found, as tables in Markdown: figures with their intervals, marked by what they say."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from dpruner.experiments import TAKEN_BACK, Experiment
from dpruner.metrics import BETTER, NOISE, WORSE
from dpruner.store import read_json
from dpruner.transfer import predicts, transfer
from dpruner.variants import DENSE


def signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def gap(row) -> str:
    """A difference with its interval, marked by what it says; "" where there is none."""
    return "" if math.isnan(row.difference) else marked(row.difference, row.difference_low, row.difference_high, row.verdict)


def marked(share: float, low: float, high: float, verdict: str) -> str:
    text = f"{signed(share)} [{signed(low)}, {signed(high)}]"
    return {BETTER: f"**{text}**", WORSE: f"*{text}*", NOISE: text}[verdict]


def estimated(table: pd.DataFrame) -> pd.DataFrame:
    """The figures that have an interval."""
    return table[table.low.notna()]


def dense_figures(table: pd.DataFrame) -> pd.Series:
    """What the dense model is worth on each task; of the task's first metric."""
    return table[table.method == DENSE].drop_duplicates("task").set_index("task").value


def markdown(rows: list[list[str]], head: list[str]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]] + [""]


def grid(table: pd.DataFrame, axis: str) -> Iterator[str]:
    """A table for each domain and text: models down, values across; what walks take back of SparseGPT's loss stands below."""
    figures = estimated(table)
    shares, figures = figures[figures.metric == TAKEN_BACK], figures[figures.metric != TAKEN_BACK]
    for (domain, task, metric), group in figures[figures.method != DENSE].groupby(["domain", "task", "metric"], sort=False):
        dense = figures[(figures.method == DENSE) & (figures.task == task) & (figures.metric == metric)]
        against = ", ".join(dict.fromkeys(group.against[group.against != ""]))
        against = f"{axis} {against}" if against in set(figures.x) else against
        text = task.removesuffix("-perplexity")
        yield (f"Pruned for {domain}, {metric} on {text} text, n = {group.n.iloc[0]}" + (f", dense {dense.value.iloc[0]:.1f}" if len(dense) else "")
               + (f"; differences to {against} in %" if against else "") + ".\n")
        xs = list(dict.fromkeys(group.x))
        rows = [[series, *_at(xs, of, lambda r: f"{r.value:.1f} {gap(r)}".strip())] for series, of in group.groupby("series", sort=False)]
        below = shares[(shares.domain == domain) & (shares.task == task)]
        rows += [[f"{series}: {TAKEN_BACK}", *_at(xs, of, share)] for series, of in below.groupby("series", sort=False)]
        yield from markdown(rows, [axis, *xs])


def _at(xs: list[str], rows: pd.DataFrame, told: Callable) -> list[str]:
    """One cell for each place on the axis; empty where nothing was measured."""
    by = {r.x: told(r) for r in rows.itertuples()}
    return [by.get(x, "") for x in xs]


def share(row) -> str:
    return f"{row.value:.0%} [{row.low:.0%}, {row.high:.0%}]".replace("-", "−")


def counted(table: pd.DataFrame) -> Iterator[str]:
    """Figures without an interval, as a table."""
    exact = table[table.low.isna()]
    if len(exact):
        rows = [[r.x, r.series, r.domain, r.task, r.metric, f"{r.value:.3f}" if "jaccard" in r.metric else f"{r.value:,.0f} of {r.n:,}"]
                for r in exact.itertuples()]
        yield from markdown(rows, ["at", "method", "domain", "other", "figure", "value"])


def section(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    """What one experiment found."""
    name, values = experiment.record["name"], [str(value) for value in experiment.record["values"]]
    if missing := [value for value in values if value not in set(table.x)]:
        yield f"Not measured yet: {', '.join(missing)}; the command goes on from there.\n"
    if name == "transfer":
        yield from transfer_section(table)
    elif name == "calibration":
        yield from calibration_section(table)
    else:
        yield from grid(table, experiment.design.axis)
        yield from (counted(table) if name == "lambda" else ())


def calibration_section(table: pd.DataFrame) -> Iterator[str]:
    """Mean and spread over seeds, beside how alike the masks are."""
    figures = estimated(table)
    figures = figures[figures.method != DENSE]
    alike = table[table.metric == "jaccard between seeds"].groupby("x").value.mean()
    rows = [[x, task.removesuffix("-perplexity"), f"{of.value.mean():.2f}", f"{of.value.min():.2f} to {of.value.max():.2f}", f"{alike.get(x, math.nan):.3f}"]
            for (x, task), of in figures.groupby(["x", "task"], sort=False)]
    yield from markdown(rows, ["sequences", "text", "mean perplexity over seeds", "lowest to highest seed", "Jaccard of masks between seeds"])
    ceiling = table[table.metric == "jaccard ceiling"]
    yield "Masks of two halves of the same text share " + ", ".join(f"{r.value:.3f} (of {r.x} sequences)" for r in ceiling.itertuples()) + \
        "; random masks share " + f"{table[table.metric == 'jaccard floor'].value.mean():.3f}.\n"


def transfer_section(table: pd.DataFrame) -> Iterator[str]:
    found = transfer(table)
    names = list(dict.fromkeys(found["mask"]))
    by = {(r.mask, r.text): r for r in found.itertuples()}
    yield "Perplexity of each domain's mask (down) on each domain's text (across); beside it how much worse than the text's own mask, in %.\n"
    dense = dense_figures(table)

    def cell(of) -> str:
        return f"{of.value:.1f}" + (f" {marked(of.excess, of.low, of.high, of.verdict)}" if of.mask != of.text else "")

    yield from markdown([*([m, *(cell(by[m, t]) for t in names)] for m in names),
                         [DENSE, *(f"{dense[f'{t}-perplexity']:.1f}" for t in names)]], ["mask \\ text", *names])
    yield "Jaccard similarity of the same masks.\n"
    yield from markdown([[m, *("1" if m == t else f"{by[m, t].jaccard:.3f}" for t in names)] for m in names], ["", *names])
    floor, ceiling, halves = (table[table.metric == f"jaccard {which}"].value for which in ("floor", "ceiling", "halves"))
    rho, p = predicts(found)
    yield (f"Random masks share {floor.mean():.3f}. From half the text each, masks of one domain share {ceiling.min():.3f} to {ceiling.max():.3f}, "
           f"masks of two {halves.min():.3f} to {halves.max():.3f}.\n")
    yield (f"Similarity against excess: Spearman {rho:+.2f}, p = {p:.3f} over permutations of the domains.\n".replace("-", "−"))


def tried(path: Path) -> Iterator[str]:
    """What was tried on the walk by programs that are not kept, as a table of stored figures."""
    if not path.is_file():
        return
    found = read_json(path)
    yield f"## What was tried on the walk\n\n{found['about']}\n"
    texts = list(found["rows"][0]["figures"])
    yield from markdown([[r["what"], f"{r['domain']}, {r['sparsity']:.0%}", *(r["figures"][t] for t in texts), r["verdict"]] for r in found["rows"]],
                        ["what", "where", *texts, ""])


def speed(path: Path) -> Iterator[str]:
    """What zeros buy, as tests/bench_speed.py has measured it."""
    if not path.is_file():
        return
    found = read_json(path)
    yield f"## What do zeros buy?\n\nMeasured by `make bench` on {found['machine']}; a {found['shape'][0]} × {found['shape'][1]} matrix in float32 times 1 or 64 tokens.\n"
    yield from markdown([[r["how"], f"{r['sparsity']:.0%}", str(r["tokens"]), f"{r['value']:.2f}× ({r['low']:.2f} to {r['high']:.2f})"]
                         for r in found["products"]], ["product", "zeros", "tokens", "speed against dense"])
    if not any("2:4" in r["how"] for r in found["products"]):
        yield "2:4 kernels need an NVIDIA GPU and were not measured here.\n"
    names = [n for n in found["bytes"][0] if n not in ("sparsity", "bytes dense")]
    yield from markdown([[f"{r['sparsity']:.0%}", *(f"{r[n]:.2f}" for n in names)] for r in found["bytes"]], ["bytes, as a share of dense bfloat16", *names])

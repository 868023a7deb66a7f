"""What the command line prints: runs, evaluations and similarities as tables of 80 columns."""

import math

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from dpruner.units import duration, size
from dpruner.variants import DENSE, label


def show_run(result: dict, console: Console) -> None:
    """The tables of a finished run, as `report.summary` tells it."""
    def figure(e):
        return f"{e['value']:.1f} [dim]{e['low']:.0f}–{e['high']:.0f}[/]" if e else "–"

    judged = ("its domain", "open domain") if result["dense"] else ()
    legend = ["Perplexity on held-out text with its 95 % interval: lower is better."] if judged else []
    table = Table(box=box.SIMPLE_HEAD, title=f"Run {result['id']}",
                  caption="\n".join([*legend, "Removed: share of the prunable weights, and of the whole model."]))
    for name, side in (("domain", "left"), ("method", "left"), *((text, "right") for text in judged), ("removed", "right")):
        table.add_column(name, no_wrap=True, justify=side)
    for domain in dict.fromkeys(row["domain"] for row in result["rows"]):
        dense = [{"domain": domain, "method": DENSE, "perplexity": result["dense"][domain]}] if judged else []
        for row in (*dense, *(row for row in result["rows"] if row["domain"] == domain)):
            found = row["perplexity"]
            texts = (found.get(domain), next((e for text, e in found.items() if text != domain), None))[:len(judged)]
            shares = [f"{row[k]:.1%}" for k in ("sparsity of prunable weights", "sparsity of the whole model") if k in row]   # of these, then of all
            table.add_row(domain, row["method"], *map(figure, texts), " / ".join(shares) or "–")
        table.add_section()
    console.print(table)
    if result["similarity"]:
        show_similarity(result["similarity"], console)
    for domain, c in result["lambda"].items():
        console.print(f"λ changed {c['changed']:,} of {c['of']:,} mask decisions for {domain} ({c['changed'] / c['of']:.2%}).")
    console.print(f"Everything is in [bold]{result['folder']}[/].", soft_wrap=True)


def show_estimate(told: dict, console: Console) -> None:
    """What a run would take, as `estimate.told` tells it."""
    table = Table(box=box.SIMPLE_HEAD, title=f"Before it starts, on {told['device']} in {told['precision']}",
                  caption="The time is that of a device that has nothing else to do, without downloads.")
    for name, side in (("what", "left"), ("about", "right"), ("most of it for", "left")):
        table.add_column(name, justify=side)
    table.add_row("time", duration(told["seconds"]), "")
    waiting = "files of the cache folder" if told["plan"]["files"] else "memory of the host for what waits"
    for what, key in (("memory of the device", "memory"), (waiting, "outside"), ("memory of the host", "host")):
        if parts := told[key]:
            most = max(parts, key=parts.get)
            table.add_row(what, size(sum(parts.values())), f"{most} ({size(parts[most])})")
    table.add_row("disk, for run folder and cache", size(told["disk"]), "")
    if told["download"]:
        table.add_row("weights to download first", size(told["download"]), "")
    console.print(table)
    console.print(f"{size(told['free'])} of memory are free on the device now, and {size(told['room'])} of the disk.")
    for caution in told["cautions"]:
        console.print(caution, soft_wrap=True)


def show_similarity(similarity: list[dict], console: Console) -> None:
    """How alike the masks of two domains are, for each method, and for each matrix where they are given."""
    masks = Table(box=box.SIMPLE_HEAD, title="Similarity of the domains' masks", caption="Jaccard: weights both keep, of those either keeps; random: what two random\nmasks share; halves: masks from half the text each, of the two domains,\n"
                  "and of the two halves of one.")
    for name in ("method", "domains", *(["matrix"] if any("matrix" in s for s in similarity) else [])):
        masks.add_column(name)
    for name in ("random", "Jaccard", "halves: two", "one"):
        masks.add_column(name, justify="right")
    for s in similarity:
        masks.add_row(s["method"], " · ".join(s["domains"]), *([s["matrix"]] if "matrix" in s else []), f"{s['floor']:.4f}", f"{s['jaccard']:.4f}",
                      *("–" if s[k] is None else f"{s[k]:.4f}" for k in ("halves", "ceiling")))
    console.print(masks)


def show_evaluation(table: pd.DataFrame, title: str, console: Console) -> None:
    """Figures of tasks, as `evaluations.evaluate` gives them, each model beside the one it is compared with."""
    against = ", ".join(dict.fromkeys(table[table.against != ""].against)) or DENSE
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, caption="Out of 100, with 95 % intervals; n: items, or windows of text.\n"
                  f"Differences to {against}, on the same items: in points;\nof perplexity, where lower is better, in %.")
    for name, side in (("task and model", "left"), ("figure", "right"), ("difference", "right"), ("", "left")):
        shown.add_column(name, no_wrap=True, justify=side)
    for (task, metric), group in table.groupby(["task", "metric"], sort=False):
        shown.add_row(f"[bold]{task}[/]", "" if metric in task else f"[bold]{metric}[/]", f"n = {group.n.iloc[0]}")
        for row in group.itertuples():
            value, low, high = (v if metric == "perplexity" else 100 * v for v in (row.value, row.low, row.high))
            gap = [100 * v for v in (row.difference, row.difference_low, row.difference_high)]
            told = "" if math.isnan(gap[0]) else f"{_signed(gap[0])} [dim]{_signed(gap[1])} {_signed(gap[2])}[/]"
            shown.add_row(f"  {label(row.method, row.domain)}", f"{value:.1f} [dim]{low:.0f}–{high:.0f}[/]", told, row.verdict)
        shown.add_section()
    console.print(shown)
    for task, group in table[table.chance.notna()].groupby("task", sort=False):
        lost = [label(r.method, r.domain) for r in group.itertuples() if r.low <= r.chance]
        console.print(f"Guessing would be right in {group.chance.iloc[0]:.0%} of {task}" + (f"; not above that: {', '.join(lost)}." if lost else "."))
    for row in table[table.shortened > 0].drop_duplicates("task").itertuples():
        console.print(f"{row.shortened} of {row.n} items of {row.task} were too long for the model and were shortened.")


def show_experiment(table: pd.DataFrame, question: str, axis: str, console: Console) -> None:
    """Figures of an experiment, as `experiments.conduct` gives them: a table for each task and metric."""
    for (task, metric), group in table[table.low.notna()].groupby(["task", "metric"], sort=False):
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{question} {metric} on {task}", caption="With 95 % intervals; differences on the same items.")
        for name, side in ((axis, "left"), ("model", "left"), ("figure", "right"), ("difference", "right"), ("", "left")):
            shown.add_column(name, justify=side)
        for r in group.itertuples():
            gap = "" if math.isnan(r.difference) else (f"{_signed(100 * r.difference)} [dim]{_signed(100 * r.difference_low)} {_signed(100 * r.difference_high)}[/] "
                                                       f"to {r.against}")
            shown.add_row(r.x, label(r.series, r.domain), f"{r.value:.4g} [dim]{r.low:.4g}–{r.high:.4g}[/]", gap, r.verdict)
        console.print(shown)
    for r in table[table.low.isna()].itertuples():   # counted, not estimated
        console.print(f"{r.x} · {r.series} · {r.domain} {r.task}: {r.metric} {r.value:.4g}")


def _signed(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < 100 else f"{value:+.0f}"

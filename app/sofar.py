"""What a running run is about, and what it has found so far: read from its folder, where it grows from second to second."""

import contextlib
import textwrap
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import streamlit as st

from analysis import alike, heads, similarity
from analysis.chart import Chart, listed, percent
from app import data, widgets
from dpruner import RunConfig, store, worker
from dpruner.calibration import CATALOGUE
from dpruner.config import split_domain
from dpruner.errors import InputError
from dpruner.store import Run

NOW = {   # stage: what it means, in plain words
    "loading model and text": "the model and the texts are read.",
    "general importance": "for every weight, what removing it would cost on ordinary text. One answer serves all domains.",
    "general fisher": "for every weight, how sharply the error on ordinary text grows with a change of it.",
    "domain fisher": "for every weight, how sharply the error on the domain's text grows with a change of it.",
    "domain importance": "for every weight, what removing it would cost on text of this domain, by the model's own gradients there. Together "
                         "with the general importance this decides which weights go.",
    "masks and ranks": "the weights that matter least are marked to go, and the rank of every weight is written down.",
    "wanda": "the sizes of the inputs of every weight, for the method wanda.",
    "sparsegpt": "the method sparsegpt walks through the model and moves what it keeps to make up for what it removes.",
    "compensation": "the weights that are kept are moved to make up for those that go.",
    "evaluation": "how well the model predicts text that was kept aside. Perplexity is how many tokens it wavers between, as it were: "
                  "lower is better.",
}
HALVES = "the same once more for each half of its text: what masks of one domain share, to compare with what two domains do."
TIMES = {1: "once", 2: "twice", 3: "three times"}
PASSAGE = 260        # characters of a text that is being read
MOST_DOMAINS = 4     # beside each other
PLAIN = ("magnitude", "random")


def show(run: Run, status: dict) -> None:
    """What is being done, the present stage in plain words, and what has been found so far."""
    with widgets.guarded():
        config = RunConfig.from_dict(run.config)
        st.markdown(purpose(config))
        if words := HALVES if status["about"].startswith("two halves") else NOW.get(status["stage"]):
            st.markdown(f"**Now:** {words}")
        found = _found(str(run.folder), stamps(run))
        if found is None:
            passages(config)
            return
        for key, made in found.charts.items():
            widgets.chart(made, f"run-far-{key}-{run.id}")
        if len(found.quality):
            st.markdown("**Perplexity so far** (95 % interval)")
            st.dataframe(found.quality, hide_index=True, key=f"run-far-quality-{run.id}")
        st.markdown(found.changed)


def purpose(config: RunConfig) -> str:
    """What a run is for, in a few sentences."""
    labels = labels_of(config)
    share = "of the whole model" if config.sparsity_of == "model" else "of its prunable weights"
    said = (f"The model **{Path(config.model).name}** loses **{percent(config.sparsity, 0)}** {share}, "
            f"{TIMES.get(len(labels), f'{len(labels)} times')}{', each time from the full model,' * (len(labels) > 1)} for "
            f"{listed([f'**{label}**' for label in labels])}. ")
    if "dpruner" in config.methods:
        said += "D-Pruner keeps what any text needs and what the domain's own text needs. "
    if len(labels) > 1:
        said += "Where the masks of what is kept differ in the end, the domains need different weights. "
    if others := [m for m in config.methods if m in PLAIN]:
        said += f"{listed(others).capitalize()} {'is a simpler choice' if len(others) == 1 else 'are simpler choices'} to compare with."
    return said


def passages(config: RunConfig) -> None:
    """The beginning of a text of every domain: what the run works on while there is nothing else to see."""
    sources = [(label, source) for label, source in map(split_domain, config.domains) if source not in CATALOGUE][:MOST_DOMAINS]
    for place, (label, source) in zip(st.columns(max(1, len(sources))), sources, strict=False):
        with place, contextlib.suppress(InputError):
            text = data.texts(source, "calibration", config.column)[0]
            st.caption(f"It reads **{label}**, such as")
            st.text(textwrap.shorten(text[:10 * PASSAGE], PASSAGE, placeholder=" …"))


def labels_of(config: RunConfig) -> list[str]:
    return [split_domain(d)[0] for d in config.domains]


# ---- reading


class Found(NamedTuple):
    """What a run has found so far.

    Attributes:
        charts: {key: Chart}.
        quality: perplexities, as `data.quality`; empty where they are not measured.
        changed: a sentence on λ; empty where nothing is known.
    """

    charts: dict[str, Chart]
    quality: pd.DataFrame
    changed: str


def stamps(run: Run) -> tuple[tuple[str, float], ...]:
    """The files a run has put aside so far, with when they were written: oldest first."""
    found = []
    for path in [*(run.folder / "partial").glob("*.parquet"), *(run.folder / "masks").glob("*.safetensors")]:
        with contextlib.suppress(OSError):   # the first folder goes when the run is done
            found.append((str(path), path.stat().st_mtime))
    return tuple(sorted(found, key=lambda each: each[1]))


def anything(run: Run) -> bool:
    """Whether a run has put aside anything to go on from."""
    return any(path.name not in (*store.RECORDS, worker.LOG) for path in run.folder.iterdir())


@st.cache_resource(max_entries=4, show_spinner=False)   # drawn every second, by every browser: made once for every new file
def _found(folder: str, files: tuple[tuple[str, float], ...]) -> Found | None:
    run = Run(folder)
    config, axes = RunConfig.from_dict(run.config), run.record.get("model", {}).get("heads", {})
    labels, first = labels_of(config), next((m for m in config.methods if m not in PLAIN), config.methods[0])
    metrics, shares = [], {}
    for path in (Path(file) for file, _ in files if file.endswith(".parquet")):
        with contextlib.suppress(InputError):
            table = store.read_table(path)
            if "metric" in table:
                metrics.append(table)
            elif path.stem.startswith(f"stats of {first}@"):
                shares[path.stem.split("@")[1]] = heads.head_shares(table, axes)
    metrics = [table for table in metrics if len(table)]
    if not metrics:
        return None
    metrics = pd.concat(metrics, ignore_index=True)
    found = pairs(run, config, first)
    charts = {"heads": heads.head_squares(shares, labels, first), "pairs": alike.pair_dots(found) if len(found) else None}
    changed = [f"**{percent(r.value / r.n, 2)}** of the decisions for {r.domain}"
               for r in metrics[metrics.metric == "decisions changed by λ"].itertuples()]
    return Found({key: made for key, made in charts.items() if made is not None}, data.quality(metrics).fillna("…"),
                 f"The general importance, weighed by λ, changed {listed(changed)}." if changed else "")


def pairs(run: Run, config: RunConfig, method: str) -> pd.DataFrame:
    """Masks that are there, two and two: the domains of one method, and that method beside the others for the first domain.

    Returns:
        As `analysis.similarity.pairs`, with columns ceiling and halves, NaN until the masks of halves are there; empty for models so large
        that counting would hold up the run.
    """
    labels = labels_of(config)
    wanted = [((a, method, a), (b, method, b)) for i, a in enumerate(labels) for b in labels[i + 1:]]
    wanted += [((labels[0], method, labels[0]), (f"{labels[0]} by {other}", other, labels[0])) for other in config.methods if other != method]
    found = []
    for pair in wanted:
        cut = [(of, f"{label}~{n}") for _, of, label in pair for n in (1, 2)] if pair[1][1] == method else []
        with contextlib.suppress(InputError, OSError):   # deleted or damaged meanwhile
            whole, halves = ([data.mask_stamp(run, of, label, own=True) for of, label in some]
                             for some in ([(of, label) for _, of, label in pair], cut))
            if None in whole or any(Path(file).stat().st_size > data.LARGE / 8 for file, _ in whole):
                continue
            found.append(_pair(tuple(name for name, _, _ in pair), tuple(whole), () if None in halves else tuple(halves)))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


@st.cache_data(max_entries=128, show_spinner=False)
def _pair(names: tuple[str, str], whole: tuple[tuple[str, float], ...], halves: tuple[tuple[str, float], ...]) -> pd.DataFrame:
    found = similarity.pairs(similarity.count_masks({name: Path(file) for name, (file, _) in zip(names, whole, strict=True)}))
    if not halves:
        return found.assign(ceiling=float("nan"), halves=float("nan"))
    shared = similarity.halves(similarity.count_masks({str(n): Path(file) for n, (file, _) in enumerate(halves)}))["model"]
    return found.assign(ceiling=shared.same[0, 1], halves=shared.other[0, 1])

"""What the pages read from runs, cached; small tables whole, large files lazily."""

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from analysis import matrices, overlap, results, similarity, weighing, weights
from analysis.glance import Glance, read_glance
from analysis.sparsity import at_least, part_counts, rank_spread, stats_spread, threshold
from dpruner import RunConfig, estimate, experiments, loading, report, store
from dpruner.calibration import load_texts
from dpruner.config import split_domain
from dpruner.errors import InputError
from dpruner.experiments import Experiment
from dpruner.loading import DTYPES, pick_device
from dpruner.store import Run

LARGE = 500_000_000   # weights beyond which reading every rank takes more than a moment


HALF_TEXT = {"halves": "Half text: two domains", "ceiling": "Half text: same domain"}   # columns
TABLES = ("status.json", "run.json", "metrics.parquet", "losses.parquet", "stats.parquet")


def stamp(run: Run) -> tuple[str, float]:
    """Identity of a finished run for caches: folder, and when one of its tables last changed."""
    paths = [run.folder / name for name in TABLES]
    return str(run.folder), max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def pairs(run: Run) -> list[tuple[str, str]]:
    """(method, domain) of every mask: D-Pruner's first, domains in the order of the run's settings.

    Raises:
        InputError: there is none.
    """
    if not (found := run.pairs()):
        raise InputError(f"The run {run.id} holds no masks", "its files were deleted", "choose another run, or delete it on the page Run")
    labels = [split_domain(d)[0] for d in run.config["domains"]]
    return sorted(found, key=lambda pair: (pair[0] != "dpruner", pair[0], labels.index(pair[1]) if pair[1] in labels else len(labels)))


@st.cache_data(max_entries=32, show_spinner=False)
def _places(folder: str, when: float) -> pd.DataFrame:
    run = Run(folder)
    method, domain = run.pairs()[0]
    return matrices.places(list(matrices.mask_shapes(run.path("masks", method, domain))))


def places(run: Run) -> pd.DataFrame:
    """One row per matrix: its name, block and module."""
    return _places(*stamp(run))


def matrix_name(run: Run, block: int, module: str) -> str:
    """Full parameter name of a matrix."""
    return places(run).set_index(["block", "module"]).matrix[block, module]


@st.cache_data(max_entries=32, show_spinner=False)
def _stats(folder: str, when: float) -> pd.DataFrame:
    return Run(folder).stats()


def stats(run: Run) -> pd.DataFrame:
    """stats.parquet."""
    return _stats(*stamp(run))


@st.cache_data(max_entries=32, show_spinner=False)
def _metrics(folder: str, when: float) -> pd.DataFrame:
    return Run(folder).metrics()


def metrics(run: Run) -> pd.DataFrame:
    """metrics.parquet."""
    return _metrics(*stamp(run))


@st.cache_data(max_entries=32, show_spinner=False)
def _against(folder: str, when: float, method: str, domain: str) -> dict[str, dict]:
    losses, there = Run(folder).losses(), dict.fromkeys(m for m, d in Run(folder).pairs() if d == domain and m != method)
    return {other: results.against(losses, domain, method, other) for other in (results.DENSE, *there)}


def against(run: Run, method: str, domain: str) -> dict[str, dict]:
    """{method, or "dense": {text: how far one method's perplexity is from its, an Estimate of the share}}."""
    return _against(*stamp(run), method, domain)


# ---- masks at the slider's sparsity


def own_sparsity(run: Run) -> float:
    """The share of the prunable weights that a run was asked to remove, which is what the slider means; a run may be asked for one of all weights."""
    record = run.record
    config, model = record["config"], record["model"]
    return config["sparsity"] * (model["weights"] / model["prunable_weights"] if config["sparsity_of"] == "model" else 1)


def own_masks(run: Run, sparsity: float) -> bool:
    """Whether the slider stands where the run itself pruned: its very masks are shown there, and ranks cut anew everywhere else."""
    return round(100 * sparsity) == round(100 * own_sparsity(run))


def mask_stamp(run: Run, method: str, domain: str, own: bool) -> tuple[str, float] | None:
    """File of a run's mask, or of the ranks it can be cut from, and when it was written; None where there is none."""
    path = run.path("masks" if own else "ranks", method, domain)
    return (str(path), path.stat().st_mtime) if path.is_file() else None


@st.cache_data(max_entries=128, show_spinner="Comparing masks …")
def counts(files: tuple[tuple[str, tuple[str, float]], ...], sparsity: float | None) -> similarity.Counts:
    """What masks keep, alone and in pairs.

    Args:
        files: (label, stamp of its file as `mask_stamp` gives it) of each.
        sparsity: at which ranks are cut; None for files of masks.
    """
    paths = {label: Path(file) for label, (file, _) in files}
    return similarity.count_masks(paths) if sparsity is None else similarity.count_ranks(paths, sparsity)


@st.cache_data(max_entries=32, show_spinner=False)
def _stored(folder: str, when: float) -> tuple[dict, frozenset, dict]:
    run = Run(folder)
    model = run.record.get("model", {})
    heads = {name: (axis, size) for name, (axis, size) in model.get("heads", {}).items()}
    return matrices.mask_shapes(run.path("masks", *run.pairs()[0])), frozenset(model.get("transposed", ())), heads


def shape(run: Run, matrix: str) -> tuple[int, int]:
    """(out, in) of a matrix."""
    stored = _stored(*stamp(run))[0][matrix]
    return stored[::-1] if flipped(run, matrix) else stored


def flipped(run: Run, matrix: str) -> bool:
    """Whether the model stores the matrix as (in, out)."""
    return matrix in _stored(*stamp(run))[1]


def heads(run: Run) -> dict[str, tuple[str, int]]:
    """{matrix: ("row" or "column", rows or columns of a head)} of those that have heads."""
    return _stored(*stamp(run))[2]


@st.cache_data(max_entries=128, show_spinner=False)
def glance(files: tuple[tuple[str, float], ...], name: str, at: float | None, flipped: bool) -> Glance:
    """One or two masks of a whole matrix, counted in a grid, as `analysis.glance.read_glance`."""
    return read_glance([Path(file) for file, _ in files], name, at, flipped)


def tile_mask(file: tuple[str, float], name: str, rows: slice, columns: slice, at: float | None, flipped: bool) -> np.ndarray:
    """A rectangle of a mask, bool (rows, columns), from a file of masks (`at` None) or of ranks cut at the sparsity `at`."""
    path = Path(file[0])
    if at is None:
        return matrices.read_mask(path, name, rows, columns, flipped)
    return at_least(matrices.read_ranks(path, name, rows, columns, flipped), threshold(at))


@st.cache_data(max_entries=32, show_spinner=False)
def _general_file(folder: str, when: float, cache: str) -> str | None:
    found = weights.general_file(Run(folder).record, Path(cache))
    return None if found is None else str(found)


def general_file(run: Run, cache: Path) -> Path | None:
    """The cached general importance of a run, None where it is gone."""
    found = _general_file(*stamp(run), str(cache))
    return None if found is None or not Path(found).is_file() else Path(found)


def same_model(run: Run, runs: list[Run]) -> list[Run]:
    """Those of other runs that pruned the very same model, by its fingerprint; damaged folders are passed over."""
    mine, found = run.record["model"]["fingerprint"], []
    for other in runs:
        try:
            if other.id != run.id and other.record["model"]["fingerprint"] == mine:
                found.append(other)
        except (InputError, KeyError, TypeError):
            continue
    return found


@st.cache_resource(max_entries=8, ttl=60, show_spinner="Looking the model up …")
def _blank_model(name: str, revision: str | None, when: float):
    try:
        return loading.blank_model(name, revision)
    except InputError as error:   # remembered too: an unreachable hub is not asked again with every click
        return error


def blank_model(name: str, revision: str | None):
    """A model without its weights, on the meta device, shared by all sessions: not to be changed.

    Raises:
        InputError: it does not exist, is gated, or cannot be pruned.
    """
    found = _blank_model(name, revision, _changed(Path(name) / "config.json"))
    if isinstance(found, InputError):
        raise found
    return found


@st.cache_data(max_entries=64, show_spinner="Reading the text …")
def _texts(source: str, split: str, column: str | None, limit: int | None, when: float) -> list[str]:
    return load_texts(source, split, column, limit)


def texts(source: str, split: str, column: str | None = None, limit: int | None = None) -> list[str]:
    """Documents of a domain, as `load_texts` gives them."""
    return _texts(source, split, column, limit, _changed(Path(source)))


@st.cache_data(max_entries=16, ttl=60, show_spinner="Measuring the speed of this device …")
def _speed(name: str, revision: str | None, device: str, dtype: str) -> estimate.Speed:
    return estimate.measure_speed(blank_model(name, revision), device, DTYPES[dtype])


def speed(config: RunConfig) -> estimate.Speed:
    """Speed of a run's device at the shapes of its model."""
    model, device = blank_model(config.model, config.revision), str(pick_device(config.device))
    dtype = str(estimate.precision(config, model, device)).removeprefix("torch.")
    return _speed(config.model, config.revision, device, dtype)


@st.cache_data(max_entries=64, ttl=60, show_spinner="Estimating the time …")
def _foreseen(question: dict, folder: str, done: int) -> str:
    config = RunConfig.from_dict(question["config"])
    return experiments.foreseen(question, Experiment(folder), model=blank_model(config.model, config.revision), speed=speed(config)).words


def foreseen(question: dict, experiment: Experiment) -> str:
    """How long what an experiment has not done yet will take, in words; arguments as `dpruner.experiments.foreseen` takes them."""
    return _foreseen(question, str(experiment.folder), len(list(experiment.folder.glob("points/*/judged.json"))))


def _changed(path: Path) -> float:
    """When a file was last changed; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except (OSError, ValueError):
        return 0.0


# ---- parts, scores and overlaps of a whole model


def is_large(run: Run) -> bool:
    """Whether reading all ranks of the model takes so long that a page asks first."""
    return sum(int(np.prod(s)) for s in _stored(*stamp(run))[0].values()) > LARGE


def _part_rows(folder: str, method: str, domain: str, part: str | None = None) -> pd.DataFrame:
    """The rows of stats.parquet on one mask, or on one kind of its parts: the file of a large model has millions."""
    wanted = {"method": method, "domain": domain, "part": part}
    return store.read_table(Path(folder) / "stats.parquet", [(column, "==", value) for column, value in wanted.items() if value])


@st.cache_data(max_entries=64, show_spinner=False)
def _totals(folder: str, when: float, method: str, domain: str) -> pd.DataFrame:
    rows = _part_rows(folder, method, domain, "matrix").reset_index(drop=True)
    found = {"weights": rows.weights, "kept": rows.kept, "kept_share": rows.kept / rows.weights, "score": rows.score}
    return matrices.places(rows.matrix.tolist()).assign(**found)


def totals(run: Run, method: str, domain: str) -> pd.DataFrame:
    """Weights, kept, kept_share and mean score of every matrix of a mask that the run made."""
    return _totals(*stamp(run), method, domain)


@st.cache_data(max_entries=128, show_spinner="Counting rows, columns and heads …")
def _spread(folder: str, when: float, method: str, domain: str, part: str, at: float | None) -> pd.DataFrame:
    if at is None:
        return stats_spread(_part_rows(folder, method, domain, part), part)
    shapes, transposed, heads = _stored(folder, when)
    return rank_spread(matrices.rank_matrices(Run(folder).path("ranks", method, domain), list(shapes)), at, part, heads, transposed)


def spread(run: Run, method: str, domain: str, part: str, at: float | None) -> pd.DataFrame:
    """How unequally rows, columns or heads lose, as `analysis.sparsity.rank_spread`; of the run's own mask where `at` is None."""
    return _spread(*stamp(run), method, domain, part, at)


def parts(run: Run, method: str, domain: str, matrix: str, part: str, at: float | None) -> pd.DataFrame:
    """Columns index, weights, kept of the rows, columns or heads of one matrix; of the run's own mask where `at` is None."""
    axis, size = heads(run)[matrix] if part == "head" else (part, 1)
    path = run.path("masks" if at is None else "ranks", method, domain)
    mask = tile_mask((str(path), 0.0), matrix, slice(None), slice(None), at, flipped(run, matrix))
    kept = part_counts(mask, axis, size)
    return pd.DataFrame({"index": np.arange(len(kept)), "weights": mask.size // len(kept), "kept": kept})


@st.cache_data(max_entries=64, show_spinner=False)
def _edges(folder: str, when: float, method: str, domain: str) -> dict[str, np.ndarray]:
    found = store.read_tensors(Run(folder).path("edges", method, domain))
    # a file has them by name, the masks as the model has them
    return {n: found[n].numpy() for n in _stored(folder, when)[0] if n in found}


def edges(run: Run, method: str, domain: str) -> dict[str, np.ndarray]:
    """{matrix: (257,) scores at the edges of its bins}."""
    return _edges(*stamp(run), method, domain)


@st.cache_data(max_entries=32, show_spinner="Comparing two rankings of every matrix …")
def _overlaps(folder: str, when: float, a: str, b: str, domain: str) -> pd.DataFrame:
    paths = [Run(folder).path("ranks", side, domain) for side in (a, b)]
    return overlap.every_sparsity(dict(overlap.joint_histograms(*paths, list(_stored(folder, when)[0]))))


def overlaps(run: Run, a: str, b: str, domain: str) -> pd.DataFrame:
    """Overlap of two rankings at every sparsity, as `analysis.overlap.every_sparsity`."""
    return _overlaps(*stamp(run), a, b, domain)


def sides(run: Run, domain: str, matrix: str, which: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{ranking: uint8 (out, in)} of one matrix."""
    return {side: matrices.read_ranks(run.path("ranks", side, domain), matrix, transposed=flipped(run, matrix)) for side in which}


def quality(metrics: pd.DataFrame) -> pd.DataFrame:
    """Perplexities with their intervals, in words: one row for each text and domain it was pruned for, one column for each method."""
    rows = metrics[metrics.metric == results.PERPLEXITY]
    labels, found = list(dict.fromkeys(rows.domain)), {}
    for r in rows.itertuples():
        found.setdefault((labels.index(r.domain), r.text), {})[r.method] = f"{r.value:.0f} ({r.low:.0f} to {r.high:.0f})"
    return pd.DataFrame([{"Text": text, "Pruned for": labels[i], **methods}
                         for (i, text), methods in sorted(found.items(), key=lambda item: item[0][0])])


@st.cache_data(max_entries=32, show_spinner=False)
def _summary(folder: str, when: float) -> dict:
    found = report.summary(Run(folder))
    alike = [{"Domains": " · ".join(s["domains"]), "Method": s["method"], "Random": f"{s['floor']:.3f}", "Jaccard": f"{s['jaccard']:.3f}",
              **{name: "–" if s[key] is None else f"{s[key]:.3f}" for key, name in HALF_TEXT.items()}}
             for s in found["similarity"] if s["method"] != "random" and s["jaccard"] < 1]   # others say nothing: random, or the same mask for all
    return {"labels": list(dict.fromkeys(r["domain"] for r in found["rows"])), "lambda": found["lambda"],
            "similarity": pd.DataFrame(alike), "perplexity": quality(Run(folder).metrics())}


def summary(run: Run) -> dict:
    """A finished run in a few tables: {"labels", "perplexity", "similarity", "lambda"}."""
    return _summary(*stamp(run))


@st.cache_data(max_entries=64, show_spinner=False)
def _lambda_changes(folder: str, when: float, domain: str, matrix: str, sparsity: float, lam: float) -> tuple[pd.DataFrame, float]:
    run, names = Run(folder), {"domain": "domain", "general": "general", "dual": "dpruner"}
    ranks = {side: matrices.read_ranks(run.path("ranks", name, domain), matrix) for side, name in names.items()}
    scores = {side: weights.read_edges(run.path("edges", name, domain), matrix) for side, name in names.items()}
    changed = weighing.changed_by_lambda(overlap.joint_histogram(ranks["general"], ranks["domain"]), scores,
                                         weighing.general_scale(ranks, scores, lam), sparsity)
    counted = overlap.regions(overlap.joint_histogram(ranks["domain"], ranks["dual"]), sparsity, sparsity)
    return changed, counted.changed / counted.weights


def lambda_changes(run: Run, domain: str, matrix: str, sparsity: float, lam: float) -> tuple[pd.DataFrame, float]:
    """Decisions of one matrix that any λ changes, as `analysis.weighing.changed_by_lambda`, and the counted share of the run's λ."""
    return _lambda_changes(*stamp(run), domain, matrix, sparsity, lam)

"""A run from beginning to end, in the order of the paper's method section. The one file to read first."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from dpruner import baselines, calibration, store
from dpruner.calibration import load_calibration, load_texts
from dpruner.compensate import Compensated, compensate_after, compensate_walk, compensation_sets, mixed_fisher
from dpruner.config import RunConfig, split_domain
from dpruner.domain import DomainImportance, FineTune, domain_importance, fisher_diagonal
from dpruner.errors import InputError
from dpruner.evaluate import Estimate, perplexity
from dpruner.general import general_importance
from dpruner.masks import Scores, jaccard, jaccard_floor, make_masks, pruned, ranked, sparsity_of
from dpruner.loading import load_model
from dpruner.model import count_weights, fingerprint, heads_of, require_length, skipped_weights, transposed_names
from dpruner.stats import in_parts, matrix_stats
from dpruner.status import Status
from dpruner.store import Run

DENSE = "dense"                  # the method's name in tables where nothing is pruned
HALVED = ("dpruner", "domain")   # methods whose masks two halves of a calibration set can disagree on


def run(config: RunConfig, *, runs: str | Path = "runs", cache: str | Path = "cache", folder: str | Path | None = None,
        watch: Callable[[Status], None] | None = None) -> Run:
    """Prune a model for each domain with each method, evaluate, and keep everything in a run folder.

    Whatever a user may have got wrong is found before a folder is made.

    Args:
        config: what to do.
        runs: folder that holds the run folders.
        cache: folder of general importances, shared by every run of the same model and calibration.
        folder: run folder to fill where one has been made already, as for a job that waited in a queue.
        watch: called with the run's Status after every step.

    Returns:
        The finished run.

    Raises:
        InputError: one sentence on what is wrong; also kept in status.json when the run had begun.
        KeyboardInterrupt: after status.json says "cancelled".
    """
    config.check()
    if folder is None:
        prepared = prepare(config)
        run = store.new_run(runs, config.title)
    else:
        prepared, run = None, Run(folder)
    with Status(run.folder, watch) as status:
        execute(run, config, prepared or prepare(config), Path(cache), status)
    return run


class Prepared(NamedTuple):
    """All that a run takes in, loaded and found to fit together."""

    model: nn.Module
    tokenizer: object
    texts: "Texts"
    sparsity: float      # of the prunable weights
    fingerprint: str     # of the model

def prepare(config: RunConfig) -> Prepared:
    """Load the model and the text, and refuse what does not fit together.

    Raises:
        InputError: one sentence on what is wrong.
    """
    model, tokenizer = load_model(config.model, revision=config.revision, device=config.device, dtype=config.dtype)
    require_length(model, config.seqlen)
    require_length(model, config.eval_seqlen or 0, "eval_seqlen")
    return Prepared(model, tokenizer, Texts(config, tokenizer), prunable_sparsity(config, model), fingerprint(model))


def execute(run: Run, config: RunConfig, prepared: Prepared, cache: Path, status: Status) -> None:
    """The method, from general importance to the tables of a run."""
    model, tokenizer, texts, sparsity, _ = prepared
    status.plan = planned_work(config, texts)
    store.write_json(run.folder / "run.json", record(config, prepared))

    G = cached_general_importance(config, prepared, cache, status)
    general_fisher = cached_general_fisher(config, prepared, cache, status)
    status.about = DENSE
    dense = perplexities(config, model, tokenizer, texts, texts.heldout, status)
    metrics = [perplexity_rows(DENSE, label, {text: dense[text] for text in texts.judged(label)}) for label in texts.labels]
    stats = []
    for label in texts.labels:
        status.about = label
        S = score_domain(config, model, texts.domains[label], G, status)
        for method in config.methods:
            status.about = f"{method} for {label}"
            scores = score(method, config, model, texts, label, S, status)
            kept = prune(method, config, model, texts, label, scores, sparsity, general_fisher, status)
            save(run, method, label, scores, kept)
            stats.append(matrix_stats(model, kept.masks, scores).assign(method=method, domain=label))
            with pruned(model, kept.masks, kept.weights):
                found = perplexities(config, model, tokenizer, texts, texts.judged(label), status)
            metrics += [perplexity_rows(method, label, found), described(model, method, label, kept.masks)]
        if "dpruner" in config.methods:
            save_ranks(run, "domain", label, S.domain)    # the two sides that the dual score weighs, for whoever wants to see them
            save_ranks(run, "general", label, S.general)
            metrics.append(lambda_changes(config, label, S, sparsity))
        del S, scores
        if wants_halves(config):
            status.about = f"two halves of {label}"
            metrics.append(score_halves(run, config, prepared, label, G, sparsity, status))
    metrics.append(similarities(run, config, texts.labels))
    store.write_table(run.folder / "stats.parquet", in_parts(pd.concat(stats, ignore_index=True)))
    store.write_table(run.folder / "metrics.parquet", pd.concat([m for m in metrics if len(m)], ignore_index=True))


class Texts:
    """The calibration batches and held-out texts of a run, all loaded before the work begins.

    Attributes:
        general: open-domain calibration, LongTensors (1, seqlen).
        domains: {label: calibration batches}.
        heldout: {label: held-out documents}, "general" among them; empty where nothing is evaluated.
    """

    def __init__(self, config: RunConfig, tokenizer):
        def batches(source):
            return load_calibration(source, tokenizer, config.nsamples, config.seqlen, config.seed, column=config.column)

        sources = dict(split_domain(d) for d in config.domains)
        self.labels = list(sources)
        self.open_label = split_domain(config.general)[0]
        self.general = load_calibration(split_domain(config.general)[1], tokenizer, config.nsamples, config.seqlen, config.seed)
        self.domains = {label: batches(source) for label, source in sources.items()}
        self.heldout = {}
        if config.evaluate:
            for label, source in {self.open_label: split_domain(config.general)[1], **sources}.items():
                self.heldout[label] = load_texts(source, "heldout", column=config.column if label in sources else None, limit=config.eval_documents)

    def judged(self, label: str) -> list[str]:
        """The held-out texts a mask of this domain is judged on: the domain's and the open domain's; none where nothing is evaluated."""
        return [name for name in dict.fromkeys((label, self.open_label)) if name in self.heldout]

    def sets(self, label: str, kind: str) -> list[list[torch.Tensor]]:
        """Calibration sets of one domain: open domain, domain, or both."""
        return compensation_sets(self.general, self.domains[label], kind)


def prunable_sparsity(config: RunConfig, model) -> float:
    """The share of the prunable weights to remove, for a sparsity asked of those or of the whole model.

    Raises:
        InputError: the whole model cannot be made that sparse.
    """
    prunable, total = count_weights(model)
    wanted = config.sparsity * (total / prunable if config.sparsity_of == "model" else 1)
    if wanted > 1:
        raise InputError(f"A sparsity of {config.sparsity} of the whole model cannot be reached",
                         f"only {prunable / total:.0%} of its weights are prunable", f"ask for at most {prunable / total:.2f}")
    return wanted


def record(config: RunConfig, prepared: Prepared) -> dict:
    """run.json: enough to repeat the run, and to notice when it would not be the same."""
    model, texts = prepared.model, prepared.texts
    prunable, total = count_weights(model)
    packages = {p: version(p) for p in ("torch", "transformers", "datasets", "safetensors")}
    return {
        "config": config.to_dict(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **packages},
        "device": {"type": model.device.type, "threads": torch.get_num_threads(), "precision": str(model.dtype).removeprefix("torch.")},
        "model": {"class": type(model).__name__, "fingerprint": prepared.fingerprint, "commit": getattr(model.config, "_commit_hash", None),
                  "prunable_weights": prunable, "weights": total, "skipped": skipped_weights(model),
                  "transposed": sorted(transposed_names(model)), "heads": heads_of(model)},
        "calibration": {label: calibration.fingerprint(b) for label, b in {texts.open_label: texts.general, **texts.domains}.items()},
    }


def cached(folder: Path, kind: str, key: Mapping, compute) -> Scores:
    """Scores from the cache, or computed and put there. A damaged file is computed anew."""
    identity = json.dumps(key, sort_keys=True)
    path = folder / kind / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return store.read_scores(path)
        except InputError:
            path.unlink(missing_ok=True)
    scores = compute()
    store.write_scores(path, scores, {"key": identity})
    return scores


def cached_general_importance(config: RunConfig, prepared: Prepared, cache: Path, status: Status) -> Scores:
    """G for the run, shared with every other run of the same model, calibration and settings."""
    key = {**_cache_key(prepared), "mode": config.general_mode, "sparsity": config.general_sparsity}
    return cached(cache, "general", key, lambda: general_importance(
        prepared.model, prepared.texts.general, config.general_sparsity, config.general_mode, progress=status.step))


def cached_general_fisher(config: RunConfig, prepared: Prepared, cache: Path, status: Status) -> Scores | None:
    """The open domain's Fisher where the dual walk regards both sides, shared like G; None where it is not asked for."""
    if config.compensate != "walk" or config.fisher != "both" or "dpruner" not in config.methods:
        return None
    return cached(cache, "fisher", _cache_key(prepared), lambda: fisher_diagonal(
        prepared.model, prepared.texts.general, stage="general fisher", progress=status.step))


def _cache_key(prepared: Prepared) -> dict:
    """What decides the bits of anything computed on the open domain."""
    return {"model": prepared.fingerprint, "calibration": calibration.fingerprint(prepared.texts.general),
            "device": prepared.model.device.type, "torch": version("torch")}


def score_domain(config: RunConfig, model, batches, G: Scores, status: Status) -> DomainImportance:
    """The domain pass of one domain."""
    tune = FineTune(epochs=config.epochs) if config.finetune else None
    return domain_importance(model, batches, G, config.formula, config.lam, means="model" if config.granularity == "global" else "matrix",
                             finetune=tune, progress=status.step)


def score(method: str, config: RunConfig, model, texts: Texts, label: str, S: DomainImportance, status: Status) -> Scores | None:
    """The scores a method ranks weights by; None where they exist only inside a walk."""
    if method == "dpruner":
        return None if config.compensate == "walk" else S.dual
    if method in ("domain", "general"):
        return getattr(S, method)
    if method == "magnitude":
        return baselines.magnitude(model)
    if method == "random":
        return baselines.random(model, config.seed, label)
    if method == "wanda":
        batches = sum(texts.sets(label, config.baseline_calibration), [])
        return baselines.wanda(model, batches, progress=status.step)
    return None


def prune(method: str, config: RunConfig, model, texts: Texts, label: str, scores: Scores | None, sparsity: float, general_fisher,
          status: Status) -> Compensated:
    """Mask and weights of a method; the weights are None where the kept ones stay as they are."""
    if method == "sparsegpt":
        return baselines.sparsegpt(model, texts.sets(label, config.baseline_calibration), sparsity, progress=status.step)
    sets = texts.sets(label, config.hessian)
    if method == "dpruner" and config.compensate == "walk":
        fisher = fisher_diagonal(model, texts.domains[label], stage="domain fisher", progress=status.step)
        fisher = mixed_fisher([fisher, general_fisher]) if general_fisher is not None else fisher
        return compensate_walk(model, sets, fisher, sparsity, 1.0 if config.lam is None else config.lam, progress=status.step)
    # Wanda compares the weights of one output with each other; its scores mean little across outputs
    granularity = "row" if method == "wanda" and config.granularity == "matrix" else config.granularity
    masks = make_masks(scores, None if ":" in granularity else sparsity, granularity)
    if config.compensate == "after":
        return compensate_after(model, sets, masks, progress=status.step)
    return Compensated(masks, None)


def save(run: Run, method: str, label: str, scores: Scores | None, kept: Compensated) -> None:
    """Masks, ranks and moved weights into the run folder."""
    store.write_masks(run.path("masks", method, label), kept.masks)
    if scores is not None:
        save_ranks(run, method, label, scores)
    if kept.weights is not None:
        store.write_tensors(run.path("weights", method, label), kept.weights)


def save_ranks(run: Run, method: str, label: str, scores: Scores) -> None:
    """The rank of every weight in its matrix, and the scores at the edges of the 256 bins."""
    if run.path("ranks", method, label).is_file():
        return
    found = {n: ranked(s, n in scores.transposed) for n, s in scores.items()}
    store.write_tensors(run.path("ranks", method, label), {n: bins for n, (bins, _) in found.items()})
    store.write_tensors(run.path("edges", method, label), {n: edges for n, (_, edges) in found.items()})


def wants_halves(config: RunConfig) -> bool:
    """Whether ceilings are asked for and there is something to halve; the masks of a dual walk do not come from scores."""
    return config.halves and config.nsamples > 1 and config.compensate != "walk" and bool(set(HALVED) & set(config.methods))


def score_halves(run: Run, config: RunConfig, prepared: Prepared, label: str, G: Scores, sparsity: float, status: Status) -> pd.DataFrame:
    """Masks from two halves of the same domain's calibration: what they share is the most that two domains could.

    Saved beside the others under the labels "<domain>~1" and "<domain>~2".
    """
    batches, found = prepared.texts.domains[label], []
    # neighbours overlap where the text is short, so the halves are the first and the last windows, not every other one
    middle = len(batches) // 2
    methods = [m for m in HALVED if m in config.methods]
    for number, half in enumerate((batches[:middle], batches[middle:]), 1):
        S = score_domain(config, prepared.model, half, G, status)
        for method in methods:
            scores = S.dual if method == "dpruner" else S.domain
            save_ranks(run, method, f"{label}~{number}", scores)
            store.write_masks(run.path("masks", method, f"{label}~{number}"),
                              make_masks(scores, None if ":" in config.granularity else sparsity, config.granularity))
        del S, scores   # two sets of scores at once would be the most a run ever holds
    for method in methods:
        masks = [store.LazyMasks(run.path("masks", method, f"{label}~{number}")) for number in (1, 2)]
        found.append(exact(method, label, label, "jaccard ceiling", jaccard(*masks), count_weights(prepared.model)[0]))
    return rows(*found)


METRIC_COLUMNS = ("method", "domain", "text", "metric", "value", "low", "high", "n")


def rows(*records: tuple) -> pd.DataFrame:
    """A piece of metrics.parquet; figures without an interval have NaN bounds."""
    frame = pd.DataFrame(records, columns=METRIC_COLUMNS)
    return frame.astype({"value": float, "low": float, "high": float, "n": "int64"})


def exact(method, domain, text, metric, value, n) -> tuple:
    """A figure that is counted, not estimated."""
    return method, domain, text, metric, value, None, None, n


def perplexities(config: RunConfig, model, tokenizer, texts: Texts, names: Iterable[str], status: Status) -> dict[str, Estimate]:
    """Perplexity of the model as it is on held-out texts, by name."""
    return {name: perplexity(model, tokenizer, texts.heldout[name], config.eval_seqlen, seed=config.seed, stage="evaluation",
                             progress=status.step) for name in names}


def perplexity_rows(method: str, label: str, found: Mapping[str, Estimate]) -> pd.DataFrame:
    """Perplexities as a piece of metrics.parquet."""
    return rows(*((method, label, text, "perplexity", float(e), e.low, e.high, e.n) for text, e in found.items()))


def described(model, method: str, label: str, masks) -> pd.DataFrame:
    """Sparsity of the prunable weights and of the whole model, both always reported."""
    prunable, total = count_weights(model)
    share = sparsity_of(masks)
    return rows(exact(method, label, "", "sparsity of prunable weights", share, prunable),
                exact(method, label, "", "sparsity of the whole model", share * prunable / total, total))


def lambda_changes(config: RunConfig, label: str, S: DomainImportance, sparsity: float) -> pd.DataFrame:
    """How many weights the general term moves in or out of the mask: its decisions against those of λ = 0."""
    asked = None if ":" in config.granularity else sparsity
    with_g, without = (make_masks(s, asked, config.granularity) for s in (S.dual, S.domain))
    changed = sum(int((with_g[n] ^ without[n]).sum()) for n in with_g)
    return rows(exact("dpruner", label, "", "decisions changed by λ", changed, sum(m.numel() for m in with_g.values())))


def similarities(run: Run, config: RunConfig, labels: list[str]) -> pd.DataFrame:
    """Jaccard similarity of every two domains' masks, with what two random masks of these counts would share."""
    found = []
    for method in config.methods:
        for i, a in enumerate(labels):
            for b in labels[i + 1:]:
                one, other = (store.LazyMasks(run.path("masks", method, label)) for label in (a, b))
                size = sum(math.prod(shape) for shape in one.shapes.values())
                found += [exact(method, a, b, "jaccard", jaccard(one, other), size),
                          exact(method, a, b, "jaccard floor", jaccard_floor(one, other), size)]
    return rows(*found)


def planned_work(config: RunConfig, texts: Texts) -> list[tuple[str, float]]:
    """Stages in the order they come, each with its cost in token passes through the model, for the share done and the time left."""
    tokens = config.nsamples * config.seqlen
    walk = 3 * tokens
    # overlapping windows pass two or three tokens for each new one, and a token is about four characters
    held = {label: sum(len(t) for t in documents) / 2 for label, documents in texts.heldout.items()}
    evaluation = {label: [("evaluation", held[name]) for name in texts.judged(label)] for label in texts.labels}
    passes = 6 if config.finetune else 3
    plan = [("general importance", walk)]
    if config.compensate == "walk" and config.fisher == "both":
        plan.append(("general fisher", 3 * tokens))
    plan += [("evaluation", cost) for cost in held.values()]
    for label in texts.labels:
        plan.append(("domain importance", passes * tokens * (config.epochs if config.finetune else 1)))
        for method in config.methods:
            if method == "wanda":
                plan.append(("wanda", walk / 2))
            if method == "sparsegpt":
                plan.append(("sparsegpt", walk))
            elif config.compensate == "walk" and method == "dpruner":
                plan += [("domain fisher", 3 * tokens), ("compensation", 2 * walk)]
            elif config.compensate == "after":
                plan.append(("compensation", 2 * walk))
            plan += evaluation[label]
        if wants_halves(config):
            plan += 2 * [("domain importance", passes * tokens / 2 * (config.epochs if config.finetune else 1))]
    return plan

"""A run from beginning to end, in the order of the paper's method section. The one file to read first."""

import contextlib
import functools
import hashlib
import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from dpruner import baselines, calibration, distributed, leftovers, memory, store, turns
from dpruner.compensate import Compensated, allotted, compensate_after, compensate_walk, fisher_batches, mixed_fisher
from dpruner.config import RunConfig, split_domain
from dpruner.domain import DomainImportance, FineTune, domain_importance, fisher_diagonal
from dpruner.errors import InputError
from dpruner.evaluate import window_losses
from dpruner.general import general_importance
from dpruner.masks import Scores, jaccard, make_masks, pruned, ranked
from dpruner.loading import load_model, pick_device
from dpruner.model import count_weights, decoder_blocks, fingerprint, heads_of, require_length, skipped_weights, transposed_names
from dpruner.partial import Partial
from dpruner.plan import HALVED, planned_work, wants_fishers, wants_halves, wants_sides
from dpruner.rows import described, exact, perplexity_rows, rows, similarities
from dpruner.stats import in_parts, matrix_stats
from dpruner.status import Status
from dpruner.store import Run
from dpruner.texts import Texts
from dpruner.variants import DENSE
from dpruner.walk import checkpointing

BLIND = ("general", "magnitude") # methods whose scores are the same for every domain
UNSEEN = ("memory", "processes") # what changes no bit, and may be another when a run goes on


def run(config: RunConfig, *, runs: str | Path = "runs", cache: str | Path = "cache", folder: str | Path | None = None,
        watch: Callable[[Status], None] | None = None, waiting: Callable[[int], None] = turns.say) -> Run:
    """Prune a model for each domain with each method, evaluate, and keep everything in a run folder.

    Whatever a user may have got wrong is found before a folder is made; only a run that has to wait has one from the first moment.

    Args:
        config: what to do.
        runs: folder that holds the run folders.
        cache: folder of general importances, shared by every run of the same model and calibration.
        folder: run folder to fill where one has been made already, as for a job of a queue, or for a run that goes on.
        watch: called with the run's Status after every step.
        waiting: called with how many runs are ahead while others have the device, and when that changes; by default it is said on stderr.

    Returns:
        The finished run.

    Raises:
        InputError: one sentence on what is wrong; also kept in status.json when there is a folder.
        KeyboardInterrupt: after status.json says "cancelled".
    """
    from dpruner import estimate   # which asks here what a run consists of
    config.check()
    cache, device = Path(cache), pick_device(config.device)
    with contextlib.ExitStack() as ending:
        status = ending.push(Status(Path(folder), watch)) if folder else None

        def begun() -> Status:   # from now on it is a folder, for others to see and to cancel
            return ending.push(Status(store.new_run(runs, config.title, config.to_dict()).folder, watch, fresh=True))

        def wait(ahead: int) -> None:
            nonlocal status
            status = status or begun()
            if status.queue(device, ahead):
                waiting(ahead)

        with turns.turn(device, wait), memory.following(estimate.plan_with_room(config, cache), cache):
            leftovers.clear(cache)
            prepared = None if status else prepare(config)
            status = status or begun()
            store.clear_leftovers(status.folder)
            with status:
                execute(Run(status.folder), config, prepared or prepare(config), cache, status)
    return Run(status.folder)


class Prepared(NamedTuple):
    """All that a run takes in, loaded and found to fit together."""

    model: nn.Module
    tokenizer: object
    texts: Texts
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


class Job(NamedTuple):
    """A run at work."""

    run: Run
    config: RunConfig
    prepared: Prepared
    status: Status
    partial: Partial

    def watched(self, stage: str) -> dict:
        """What every long function is given: where to tell its progress, and where to keep what it has so far."""
        return {"progress": self.status.step, "checkpoint": self.partial.checkpoint(stage)}


def execute(run: Run, config: RunConfig, prepared: Prepared, cache: Path, status: Status) -> None:
    """The method, from general importance to the tables of a run; what an earlier process has finished of it is taken as it is."""
    status.plan = planned_work(config, prepared.texts, memory.plan())
    store.write_json(run.folder / "run.json", continued(run, record(config, prepared)))
    job = Job(run, config, prepared, status, Partial(run.folder, status.skip))
    if (run.folder / store.LAST).is_file():   # killed while it tidied up
        return job.partial.clear()

    from dpruner import estimate
    status.advice = functools.partial(estimate.advice, config, prepared.model)
    with checkpointing(decoder_blocks(prepared.model)[1]):
        pruned_models(job, cache)


def pruned_models(job: Job, cache: Path) -> None:
    """Everything a run leaves, from general importance to its tables."""
    run, config, prepared, status, _ = job
    G = cached_general_importance(job, cache)
    general_fisher = cached_general_fisher(job, cache)
    status.about = DENSE
    metrics, losses = [job.partial.table(DENSE, lambda: dense_perplexities(job))], [job.partial.get("losses", DENSE)]
    for label in prepared.texts.labels:
        for piece, compute in pieces(job, label, G, general_fisher):
            metrics.append(job.partial.table(piece, compute))
        losses += [job.partial.get("losses", f"{method}@{label}") for method in config.methods]
    metrics.append(similarities(run, config, prepared.texts.labels))
    store.write_tables(run.folder / "stats.parquet", all_stats(job))
    store.write_table(run.folder / "losses.parquet", pd.concat(losses, ignore_index=True))
    store.write_table(run.folder / store.LAST, pd.concat([m for m in metrics if len(m)], ignore_index=True))
    job.partial.clear()


def all_stats(job: Job) -> Iterator[pd.DataFrame]:
    """The parts of stats.parquet, mask by mask: together they may take more memory than anything else."""
    methods, labels = job.config.methods, job.prepared.texts.labels
    for method, label in itertools.product(sorted(methods), sorted(labels)):
        yield in_parts(job.partial.get("stats", f"{method}@{label}"), method=(method, methods), domain=(label, labels))


def pieces(job: Job, label: str, G: Scores, general_fisher: Scores | None) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
    """What is done for one domain, a piece at a time: (its name, what computes its part of metrics.parquet)."""
    @functools.cache   # made when the first piece asks for it, and not at all where none is left to do
    def S() -> DomainImportance:
        job.status.about = label
        return score_domain(job, label, job.prepared.texts.domains[label], G)

    if wants_sides(job.config):
        yield f"sides@{label}", lambda: both_sides(job, label, S())
    for method in job.config.methods:
        yield f"{method}@{label}", functools.partial(pruned_and_judged, job, method, label, S, general_fisher)
    S.cache_clear()
    if wants_halves(job.config):
        yield f"halves@{label}", lambda: score_halves(job, label, G)


def pruned_and_judged(job: Job, method: str, label: str, S: Callable[[], DomainImportance], general_fisher: Scores | None) -> pd.DataFrame:
    """One method for one domain: its mask into the run folder, its counts put aside, its perplexities returned."""
    job.status.about = f"{method} for {label}"
    model, piece = job.prepared.model, f"{method}@{label}"
    kept = pruned_before(job, method, label) if job.partial.has("stats", piece) else None   # its counts are put aside last
    if kept is None:
        scores = score(job, method, label, S)
        kept = prune(job, method, label, scores, general_fisher)
        job.status.between(stage="masks and ranks")
        save(job.run, method, label, scores, kept)
        job.partial.put("stats", piece, matrix_stats(model, kept.masks, scores))
        del scores
    with pruned(model, kept.masks, kept.weights):
        found = text_losses(job, method, label, job.prepared.texts.judged(label))
    return pd.concat([perplexity_rows(method, label, found, job.config.seed), described(model, method, label, kept.masks)], ignore_index=True)


def pruned_before(job: Job, method: str, label: str) -> Compensated | None:
    """Mask and weights that an earlier process has made; None where they cannot be read any more."""
    try:
        return Compensated(job.run.masks(method, label), job.run.weights(method, label))
    except InputError:
        return None


def continued(run: Run, now: dict) -> dict:
    """run.json of a run that begins, or of one that goes on, which has to be the same run still.

    Raises:
        InputError: the model, the text or the machine is not what it was when the run began.
    """
    before = run.record if (run.folder / "run.json").is_file() else {}
    for what in ("config", "model", "calibration", "versions", "device") if "calibration" in before else ():
        then, here = ({k: v for k, v in r[what].items() if k not in UNSEEN} for r in (before, json.loads(json.dumps(now))))
        if then != here:
            raise InputError(f"The run {run.id} cannot go on", f"its {what} is not what it was when it began, so the result would be neither the one nor "
                             "the other", "start a new run with the same settings")
    return {**now, "created": before.get("created", now["created"])}


def prunable_sparsity(config: RunConfig, model) -> float:
    """The share of the prunable weights to remove, for a sparsity asked of those or of the whole model.

    Raises:
        InputError: the whole model cannot be made that sparse.
    """
    prunable, total = count_weights(model)
    wanted = config.sparsity * (total / prunable if config.sparsity_of == "model" else 1)
    if wanted > 1:
        raise InputError(f"A sparsity of {config.sparsity} of the whole model cannot be reached",
                         f"only {prunable / total:.0%} of its weights are prunable", f"ask for at most {100 * prunable // total / 100:.2f}")   # never rounded up
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
        "device": {"type": model.device.type, "threads": torch.get_num_threads(), "precision": str(model.dtype).removeprefix("torch."),
                   "processes": distributed.size()},
        "model": {"class": type(model).__name__, "fingerprint": prepared.fingerprint, "commit": getattr(model.config, "_commit_hash", None),
                  "prunable_weights": prunable, "weights": total, "skipped": skipped_weights(model),
                  "transposed": sorted(transposed_names(model)), "heads": heads_of(model)},
        "calibration": {label: calibration.fingerprint(b) for label, b in {texts.open_label: texts.general, **texts.domains}.items()},
    }


def cached(folder: Path, kind: str, key: Mapping, compute, status: Status) -> Scores:
    """Scores from the cache, or computed and put there. A damaged file is computed anew."""
    identity = json.dumps(key, sort_keys=True)
    path = folder / kind / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            found = store.read_scores(path)
            status.skip(kind)
            return found
        except InputError:
            path.unlink(missing_ok=True)
    scores = compute()
    store.write_scores(path, scores, {"key": identity})
    return scores


def cached_general_importance(job: Job, cache: Path) -> Scores:
    """G for the run, shared with every other run of the same model, calibration and settings."""
    config, prepared = job.config, job.prepared
    key = {**_cache_key(prepared), "mode": config.general_mode, "sparsity": config.general_sparsity}
    return cached(cache, "general", key, lambda: general_importance(
        prepared.model, prepared.texts.general, config.general_sparsity, config.general_mode, **job.watched("general importance")), job.status)


def cached_general_fisher(job: Job, cache: Path) -> Scores | None:
    """The open domain's Fisher where the dual walk regards both sides, shared like G; None where it is not asked for."""
    if not wants_fishers(job.config) or job.config.fisher != "both":
        return None
    batches = fisher_batches(job.prepared.texts.general)
    key = {**_cache_key(job.prepared), "sequences": len(batches)}
    return cached(cache, "fisher", key, lambda: fisher_diagonal(
        job.prepared.model, batches, stage="general fisher", passes=memory.plan().passes, **job.watched("general fisher")), job.status)


def _cache_key(prepared: Prepared) -> dict:
    """What decides the bits of anything computed on the open domain."""
    return {"model": prepared.fingerprint, "calibration": calibration.fingerprint(prepared.texts.general),
            "device": prepared.model.device.type, "torch": version("torch")}


def score_domain(job: Job, label: str, batches: list[torch.Tensor], G: Scores) -> DomainImportance:
    """The domain pass over a domain's batches, or half of them."""
    config = job.config
    tune = FineTune(epochs=config.epochs) if config.finetune else None
    return domain_importance(job.prepared.model, batches, G, config.formula, config.lam, means="model" if config.granularity == "global" else "matrix",
                             finetune=tune, passes=memory.plan().passes, **job.watched(f"domain importance of {label}"))


def score(job: Job, method: str, label: str, S: Callable[[], DomainImportance]) -> Scores | None:
    """The scores a method ranks weights by; None where they exist only inside a walk.

    Args:
        S: gives the domain pass.
    """
    config, model = job.config, job.prepared.model
    if method == "dpruner":
        return None if config.compensate == "walk" else S().dual
    if method in ("domain", "general"):
        return getattr(S(), method)
    if method == "magnitude":
        return baselines.magnitude(model)
    if method == "random":
        return baselines.random(model, config.seed, label)
    if method == "wanda":
        batches = sum(job.prepared.texts.sets(label, config.baseline_calibration), [])
        return baselines.wanda(model, batches, job.prepared.sparsity, granularity_of(method, config), **job.watched(f"wanda for {label}"))
    return None


def prune(job: Job, method: str, label: str, scores: Scores | None, general_fisher: Scores | None) -> Compensated:
    """Mask and weights of a method; the weights are None where the kept ones stay as they are."""
    config, model, texts, sparsity = job.config, job.prepared.model, job.prepared.texts, job.prepared.sparsity
    watched = job.watched(f"compensation of {method} for {label}")
    if method == "sparsegpt":
        return baselines.sparsegpt(model, texts.sets(label, config.baseline_calibration), sparsity, **watched)
    sets = texts.sets(label, config.hessian)
    if method == "dpruner" and wants_fishers(config):
        batches = fisher_batches(texts.domains[label])
        fishers = [fisher_diagonal(model, batches, stage="domain fisher", passes=memory.plan().passes, **job.watched(f"fisher of {label}"))]
        fishers += [general_fisher] if general_fisher is not None else []
        wanted = allotted(model, fishers, sparsity) if config.allot == "loss" else sparsity
        fisher = mixed_fisher(fishers) if len(fishers) > 1 else fishers[0]
        del fishers
        return compensate_walk(model, sets, fisher, wanted, 1.0 if config.lam is None else config.lam, refined=config.refine, **watched)
    granularity = granularity_of(method, config)
    job.status.between(stage="masks and ranks")
    masks = make_masks(scores, None if ":" in granularity else sparsity, granularity)
    if config.compensate == "after":
        return compensate_after(model, sets, masks, **watched)
    return Compensated(masks, None)


def granularity_of(method: str, config: RunConfig) -> str:
    """Where one threshold holds. Wanda compares the weights of one output with each other; its scores mean little across outputs."""
    return "row" if method == "wanda" and config.granularity == "matrix" else config.granularity


def save(run: Run, method: str, label: str, scores: Scores | None, kept: Compensated) -> None:
    """Masks, ranks and moved weights into the run folder."""
    store.write_masks(run.path("masks", method, label), kept.masks)
    if scores is not None:
        save_ranks(run, method, label, scores)
    if kept.weights is not None:
        store.write_tensors(run.path("weights", method, label), kept.weights)


def save_ranks(run: Run, method: str, label: str, scores: Scores) -> None:
    """The rank of every weight in its matrix, and the scores at the edges of the 256 bins."""
    if run.path("edges", method, label).is_file():   # the last of the two to be written
        return
    domains = [split_domain(d)[0] for d in run.config["domains"]] if method in BLIND else []
    if other := next((domain for domain in domains if run.path("edges", method, domain).is_file()), None):
        for kind in ("ranks", "edges"):
            with store.replacing(run.path(kind, method, label)) as path:
                shutil.copyfile(run.path(kind, method, other), path)
        return
    found = {}
    for name, s in scores.items():
        bins, edges = ranked(s, name in scores.transposed)
        found[name] = memory.kept(bins), edges
    store.write_tensors(run.path("ranks", method, label), {n: bins for n, (bins, _) in found.items()})
    store.write_tensors(run.path("edges", method, label), {n: edges for n, (_, edges) in found.items()})


def score_halves(job: Job, label: str, G: Scores) -> pd.DataFrame:
    """Masks from two halves of the same domain's calibration: what they share is the ceiling of what two domains could.

    Saved beside the others under the labels "<domain>~1" and "<domain>~2"; of the domain's own importance the ranks, where sides are kept.
    """
    job.status.about = f"two halves of {label}"
    run, config, batches, found = job.run, job.config, job.prepared.texts.domains[label], []
    # neighbours overlap where the text is short, so the halves are the first and the last windows, not every other one
    middle = len(batches) // 2
    methods = [m for m in HALVED if m in config.methods]
    for number, half in enumerate((batches[:middle], batches[middle:]), 1):
        S = score_domain(job, f"{label}~{number}", half, G)
        job.status.between(stage="masks and ranks")
        if config.sides and methods == ["dpruner"]:
            save_ranks(run, "domain", f"{label}~{number}", S.domain)
        for method in methods:
            scores = S.dual if method == "dpruner" else S.domain
            save_ranks(run, method, f"{label}~{number}", scores)
            store.write_masks(run.path("masks", method, f"{label}~{number}"),
                              make_masks(scores, None if ":" in config.granularity else job.prepared.sparsity, config.granularity))
        del S, scores   # two sets of scores at once would be the most a run ever holds
    for method in methods:
        masks = [store.LazyMasks(run.path("masks", method, f"{label}~{number}")) for number in (1, 2)]
        found.append(exact(method, label, label, "jaccard ceiling", jaccard(*masks), count_weights(job.prepared.model)[0]))
    return rows(*found)


LOSS_COLUMNS = ("method", "domain", "text", "window", "loss", "tokens")


def text_losses(job: Job, method: str, label: str, names: Iterable[str]) -> pd.DataFrame:
    """Losses of the model as it is on held-out texts: a row for each window, put aside as a piece of losses.parquet.

    Args:
        method, label: what the model is now.
        names: of the texts.
    """
    config, (model, tokenizer, texts, *_) = job.config, job.prepared
    of, found = method if method == DENSE else f"{method}@{label}", []
    for name in names:
        _, sums, counts = window_losses(model, tokenizer, texts.heldout[name], config.eval_seqlen, stage="evaluation",
                                        **job.watched(f"perplexity of {of} on {name}"))
        found.append(pd.DataFrame({"method": method, "domain": label, "text": name, "window": range(len(sums)), "loss": sums, "tokens": counts}))
    found = pd.concat(found or [pd.DataFrame(columns=LOSS_COLUMNS)], ignore_index=True)
    job.partial.put("losses", of, found)
    return found


def dense_perplexities(job: Job) -> pd.DataFrame:
    """What the model is worth before anything is removed; its losses belong to no domain."""
    texts = job.prepared.texts
    found = text_losses(job, DENSE, "", texts.heldout)
    return pd.concat([perplexity_rows(DENSE, label, found[found.text == text], job.config.seed) for label in texts.labels
                      for text in texts.judged(label)] or [rows()], ignore_index=True)


def both_sides(job: Job, label: str, S: DomainImportance) -> pd.DataFrame:
    """The ranks of the two sides that the dual score weighs, for whoever wants to see them, and how many decisions the general side changes."""
    job.status.between(stage="masks and ranks")
    save_ranks(job.run, "domain", label, S.domain)
    save_ranks(job.run, "general", label, S.general)
    asked = None if ":" in job.config.granularity else job.prepared.sparsity
    with_g, without = (make_masks(s, asked, job.config.granularity) for s in (S.dual, S.domain))   # the decisions of λ = 0
    changed = sum(int((with_g[n] ^ without[n]).sum()) for n in with_g)
    return rows(exact("dpruner", label, "", "decisions changed by λ", changed, sum(m.numel() for m in with_g.values())))

"""The lesson's results, computed once by the engine and kept as plain files: a process of its own, which waits for its turn on the device.

`python -m analysis.lesson.prepare FOLDER RUNS CACHE`. The folder has a run.json, which says for which settings, and a status.json; its
parts come in the order of PARTS, each whole.
"""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from analysis import results, similarity
from analysis.lesson.numbers import changed_by_matrix, changed_everywhere, first_layer, read_sentence
from dpruner import pipeline, store, worker
from dpruner.config import RunConfig
from dpruner.domain import DomainImportance, domain_importance
from dpruner.errors import InputError
from dpruner.evaluate import Estimate, perplexity
from dpruner.formulas import FORMULAS
from dpruner.generate import generate, tokens_per_second
from dpruner.loading import pick_device, stored_precision
from dpruner.masks import Scores, make_masks, pruned
from dpruner.model import prunable_linears
from dpruner.partial import Partial
from dpruner.pipeline import Job
from dpruner.plan import Planned
from dpruner.status import Status
from dpruner.store import Run
from dpruner.turns import turn
from dpruner.variants import DENSE

DOMAIN = "healthcare"
PROMPTS = ("The treatment of asthma includes", "The symptoms of diabetes")
SENTENCE = "The patient was treated with antibiotics for a bacterial infection."
SPARSITY = 0.5                                # of masks that are looked at weight by weight
STRONG = 0.7                                  # at which the first three texts are written: less than this the small model forgives
STEPS = tuple(s / 10 for s in range(10))      # sparsities at which the model is seen falling apart
DOCUMENTS, NEW_TOKENS = 2, 28                  # of held-out text, tokens of a text
ROUNDS, ROUND_TOKENS = 4, 16                  # of the measurement of speed
SAMPLE = 1 << 23                              # bytes of weights on which compression is measured

BASE = "base"                                 # folder of ranks, where no run has them
PARTS = ("layer.safetensors", "words.json", "fall.json", "sentence.safetensors", "flips.json", "modules.json", "alike.safetensors",
         "cost.json")
# stages by cost, about seconds on two cores
PLAN = (("general importance", 3, ""), ("domain importance", 3, ""), ("three texts", 4, ""), ("ten sparsities", 12, ""),
        ("what λ decides", 8, ""),
        ("one threshold for all", 4, ""), ("similarity", 4, ""), ("size and speed", 5, ""))


def prepare(folder: Path, runs: Path, cache: Path) -> None:
    """Fill the folder of a lesson; parts that are there already are not computed again.

    Args:
        folder: with run.json, whose settings are those of a demonstration run.
        runs: where such a run may lie; what it has found of similarity is then taken from it.
        cache: of general importances, as for a run.

    Raises:
        InputError: one sentence on what is wrong, also kept in status.json.
    """
    run = Run(folder)
    config = RunConfig.from_dict(run.config)
    device, status = pick_device(config.device), Status(folder)
    with turn(device, functools.partial(status.queue, device)), status:
        store.clear_leftovers(folder)
        status.plan = [Planned(*stage) for stage in PLAN]
        prepared = pipeline.prepare(config)
        store.write_json(folder / "run.json", pipeline.record(config, prepared))
        job = Job(run, config, prepared, status, Partial(folder))
        for name, make in parts(job, runs, cache):
            if not (folder / name).is_file():
                make(folder / name)
        job.partial.clear()


def parts(job: Job, runs: Path, cache: Path) -> Iterator[tuple[str, functools.partial]]:
    """(file name, what writes it) of every part, in order."""
    G = pipeline.cached_general_importance(job, cache)

    @functools.cache
    def S() -> DomainImportance:
        return pipeline.score_domain(job, DOMAIN, job.prepared.texts.domains[DOMAIN], G)

    makers = (functools.partial(layer, job, G, S), functools.partial(words, job, S), functools.partial(fall, job, S),
              functools.partial(sentence, job),
              functools.partial(flips, job, G), functools.partial(modules, job, G), functools.partial(alike, job, runs, G),
              functools.partial(cost, job, S))
    yield from zip(PARTS, makers, strict=True)


# ---- the parts


def layer(job: Job, G: Scores, S, path: Path) -> None:
    """The first linear: W, H, U, the weights as they were scored, and the scores."""
    found = first_layer(job.prepared.model, job.prepared.texts.general)
    scores = {"G": G[found.name], "domain": S().domain[found.name], "dual": S().dual[found.name]}
    store.write_tensors(path, {**{what: getattr(found, what) for what in ("W", "H", "U", "seen")}, **scores}, {"name": found.name})


def words(job: Job, S, path: Path) -> None:
    """Texts and perplexities of the dense model, of the generally pruned one and of the one pruned for the domain."""
    texts, quality = [], []
    variants = {DENSE: {}, "general": make_masks(S().general, STRONG), "dpruner": make_masks(S().dual, STRONG)}
    for done, (name, masks) in enumerate(variants.items()):
        job.status.step("three texts", done, len(variants))
        with pruned(job.prepared.model, masks):
            texts += [{"model": name, "prompt": prompt, "text": continued(job, prompt)} for prompt in PROMPTS]
            quality += [{"method": name, **row} for row in judged(job)]
    job.status.step("three texts", len(variants), len(variants))
    store.write_json(path, {"texts": texts, "quality": quality, "sparsity": STRONG})


def fall(job: Job, S, path: Path) -> None:
    """Perplexity and one text at every sparsity; the two that `words` has measured are taken from it."""
    told = store.read_json(path.with_name(PARTS[1]))
    known = {0.0: DENSE, STRONG: "dpruner"}
    rows = []
    for done, sparsity in enumerate(STEPS):
        job.status.step("ten sparsities", done, len(STEPS))
        if name := known.get(sparsity):
            text = next(row["text"] for row in told["texts"] if (row["model"], row["prompt"]) == (name, PROMPTS[0]))
            quality = [row for row in told["quality"] if row["method"] == name]
        else:
            with pruned(job.prepared.model, make_masks(S().dual, sparsity)):
                text, quality = continued(job, PROMPTS[0]), judged(job)
        rows += [{**row, "method": "dpruner", "sparsity": sparsity, "continuation": text} for row in quality]
    job.status.step("ten sparsities", len(STEPS), len(STEPS))
    store.write_json(path, {"prompt": PROMPTS[0], "rows": rows})


def continued(job: Job, prompt: str) -> str:
    return "".join(token.text for token in generate(job.prepared.model, job.prepared.tokenizer, prompt, max_new_tokens=NEW_TOKENS))


def judged(job: Job) -> list[dict]:
    """Perplexity on held-out text of the domain and of the open domain, as the demonstration takes it, rows as of metrics.parquet."""
    model, tokenizer, texts, *_ = job.prepared

    def row(name: str) -> dict:
        found: Estimate = perplexity(model, tokenizer, texts.heldout[name][:DOCUMENTS], seed=job.config.seed)
        return {"domain": DOMAIN, "text": name, "metric": "perplexity", "value": float(found), "low": found.low, "high": found.high,
                "n": found.n}

    return [row(name) for name in texts.judged(DOMAIN)]


def sentence(job: Job, path: Path) -> None:
    """The gradient of one sentence in the first linear."""
    found = read_sentence(job.prepared.model, job.prepared.tokenizer, SENTENCE)
    name = next(iter(found.gradients))
    store.write_tensors(path, {"g": found.gradients[name]}, {"text": found.text, "tokens": json.dumps(found.tokens),
                                                             "loss": repr(found.loss)})


def flips(job: Job, G: Scores, path: Path) -> None:
    """How many decisions of the whole model each λ changes, by each formula."""
    model = job.prepared.model
    found = read_sentence(model, job.prepared.tokenizer, SENTENCE)
    weights = {n: m.weight.detach() for n, m in prunable_linears(model).items()}
    rows, total = [], sum(w.numel() for w in weights.values())
    for at, formula in enumerate(FORMULAS):
        counts = []
        for _, count in changed_by_matrix(formula, weights, found.gradients, G, SPARSITY):
            job.status.step("what λ decides", at * len(weights) + len(counts), len(FORMULAS) * len(weights))
            counts.append(count)
        rows += changed_everywhere(formula, counts, total).to_dict("records")
    job.status.step("what λ decides", 1, 1)
    store.write_json(path, {"rows": rows})


def modules(job: Job, G: Scores, path: Path) -> None:
    """What every matrix keeps when one threshold holds for the whole model, its scores divided by one mean."""
    job.status.step("one threshold for all", 0, 1)
    model = job.prepared.model
    S = domain_importance(model, job.prepared.texts.domains[DOMAIN], G, "balanced", means="model")
    masks = make_masks(S.dual, SPARSITY, "global")
    job.status.step("one threshold for all", 1, 1)
    store.write_json(path, {"sparsity": SPARSITY, "rows": [{"matrix": n, "weights": m.numel(), "kept": int(m.sum())} for n,
                                                           m in masks.items()]})


def alike(job: Job, runs: Path, G: Scores, path: Path) -> None:
    """What every two masks share, at every sparsity: the domains', those of halves of their texts, and two random ones."""
    job.status.step("similarity", 0, 1)
    base = base_run(job, runs) or own_run(job, G)
    config = RunConfig.from_dict(base.config)
    labels = [d for d in config.domains]
    files = {label: base.path("ranks", "dpruner", label) for d in labels for label in (d, f"{d}~1", f"{d}~2")}
    files |= {f"{d} alone{half}": base.path("ranks", "domain", f"{d}{half}") for d in labels for half in ("", "~1", "~2")}
    files |= {f"random {n}": base.path("ranks", "random", d) for n, d in enumerate(labels[:2], 1)}
    counts = [similarity.count_ranks(files, sparsity) for sparsity in STEPS[1:]]
    job.status.step("similarity", 1, 1)
    store.write_tensors(path, {"both": torch.from_numpy(np.stack([c.both for c in counts])),
                               "weights": torch.from_numpy(counts[0].weights)},
                        {"labels": json.dumps(counts[0].labels), "names": json.dumps(counts[0].names), "domains": json.dumps(labels)})
    shutil.rmtree(job.run.folder / BASE, ignore_errors=True)   # ten times as large as all else


def base_run(job: Job, runs: Path) -> Run | None:
    """A finished run of the very same settings and model, such as the demonstration."""
    for run in store.find_runs(runs):
        try:
            if run.status["state"] == "done" and RunConfig.from_dict(run.config) == job.config and \
                    run.record["model"]["fingerprint"] == job.prepared.fingerprint and \
                    all(run.path("edges", *pair).is_file() for pair in (("random", job.config.domains[1]), ("domain", f"{job.config.domains[1]}~2"))):
                return run
        except (InputError, KeyError):
            continue
    return None


def own_run(job: Job, G: Scores) -> Run:
    """Where there is no such run: the ranks it would hold, in the lesson's own folder."""
    folder = job.run.folder / BASE
    run, config = Run(folder), dataclasses.replace(job.config, methods=("dpruner", "random"), evaluate=False)
    store.write_json(folder / "run.json", pipeline.record(config, job.prepared))
    mine = Job(run, config, job.prepared, job.status, Partial(folder))
    for label in job.prepared.texts.labels:
        for _, compute in pipeline.pieces(mine, label, G, None):
            compute()
    return run


def cost(job: Job, S, path: Path) -> None:
    """Bytes and speed, dense and pruned in turn, measured here."""
    model, tokenizer, *_ = job.prepared
    precision = stored_precision(job.config.model, job.config.revision)
    masks = make_masks(S().dual, SPARSITY)
    variants, found = {"dense": {}, "pruned": masks}, {"dense": [], "pruned": []}
    shares = []
    for variant in variants.values():
        with pruned(model, variant):
            share, sampled = results.compressed_share(model.parameters(), precision, SAMPLE)
            shares.append(share)
    for at in range(ROUNDS):
        job.status.step("size and speed", at, ROUNDS)
        for name in list(variants)[::1 if at % 2 else -1]:   # the order changes, lest one always comes first
            with pruned(model, variants[name]):
                tokens_per_second(model, tokenizer, PROMPTS[0], 4)
                found[name].append(tokens_per_second(model, tokenizer, PROMPTS[0], ROUND_TOKENS))
    job.status.step("size and speed", ROUNDS, ROUNDS)
    removed = sum(int((~m).sum()) for m in masks.values())
    packed = sum(m.shape[0] * -(-m.shape[1] // 8) for m in masks.values())
    dense = sum(p.numel() for p in model.parameters()) * precision.itemsize
    table = results.size_table(dense, removed, precision.itemsize, packed, tuple(shares))
    store.write_json(path, {"sizes": table.to_dict("records"), "speeds": found, "precision": str(precision).removeprefix("torch."),
                            "removed": removed,
                            "sparsity": SPARSITY, "sampled": sampled})


def main() -> int:
    """The process: FOLDER RUNS CACHE."""
    folder, runs, cache = map(Path, sys.argv[1:4])
    return worker.process(folder, lambda: prepare(folder, runs, cache))


if __name__ == "__main__":
    sys.exit(main())

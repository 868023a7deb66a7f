"""A run from beginning to end: its folder, its numbers, repeating it, every method through the pipeline, and failing well."""

import ast
import errno
import hashlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL
from families import tiny, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import dpruner
from dpruner import RunConfig, calibration, pipeline, report, store, walk
from dpruner.errors import InputError
from dpruner.loading import load_model
from dpruner.masks import rank_bins
from dpruner.model import count_weights, fingerprint, heads_of, prunable_linears, stored_transposed
from dpruner.rows import exact, rows
from dpruner.stats import matrix_stats
from dpruner.status import Status
from dpruner.texts import Texts

REPOSITORY = Path(dpruner.__file__).parents[1]
QUICK = {"domains": ("legal",), "nsamples": 4, "seqlen": 16, "evaluate": False, "halves": False, "general_mode": "static"}


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def half_written(*folders: Path) -> list[Path]:
    """Temporary files that were left."""
    return [path for folder in folders for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def read_bits(path: Path) -> dict[str, np.ndarray]:
    """A mask file as README says, with nothing of this project: {name: bool array, True = kept}."""
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["packing"] == "numpy.packbits axis=-1 little"
        shapes = json.loads(file.metadata()["shapes"])
        assert set(shapes) == set(file.keys())
        masks = {}
        for name, shape in shapes.items():
            bits = file.get_tensor(name)
            assert bits.dtype == np.uint8 and list(bits.shape) == [*shape[:-1], math.ceil(shape[-1] / 8)]
            masks[name] = np.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little").astype(bool)
        return masks


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def quick(llama, tmp_path, **settings) -> store.Run:
    """A run with little work, in folders of its own."""
    return pipeline.run(RunConfig(model=str(llama), **{**QUICK, **settings}), runs=tmp_path / "runs", cache=tmp_path / "cache")


def never_falls_and_ends_at_one(shares: list[float]) -> bool:
    return all(a <= b for a, b in zip(shares, shares[1:], strict=False)) and 0 <= shares[0] and shares[-1] == pytest.approx(1)


def failed(run_folder: Path, state: str = "failed") -> dict:
    """status.json of the only run below a folder."""
    (path,) = run_folder.glob("*/status.json")
    status = json.loads(path.read_text())
    assert status["state"] == state
    return status


# ---- the run folder ----


def test_the_run_folder_holds_what_the_design_says_and_nothing_else(small):
    # beside the masks of the run: those of two halves of each domain's text, and ranks of the two sides that the dual score weighs,
    # the domain's from the halves too
    masks = {f"{method}@{domain}" for method in small.config.methods for domain in small.config.domains}
    masks |= {f"dpruner@{domain}~{half}" for domain in small.config.domains for half in (1, 2)}
    ranks = masks | {f"{side}@{domain}" for side in ("domain", "general") for domain in small.config.domains}
    ranks |= {f"domain@{domain}~{half}" for domain in small.config.domains for half in (1, 2)}
    names = {f"{kind}/{name}.safetensors" for kind, of in (("masks", masks), ("ranks", ranks), ("edges", ranks)) for name in of}
    assert files_in(small.run.folder) == names | {"run.json", "status.json", "stats.parquet", "metrics.parquet", "losses.parquet"}
    assert small.run.pairs() == sorted((method, domain) for method in small.config.methods for domain in small.config.domains)
    assert [path.parts[0] for path in map(Path, files_in(small.cache))] == ["general"]
    assert not half_written(small.runs, small.cache)


def test_run_json_is_enough_to_repeat_the_run(small):
    record = json.loads((small.run.folder / "run.json").read_text(encoding="utf-8"))
    assert RunConfig.from_dict(record["config"]) == small.config == RunConfig(**small.run.config)
    packages = ("torch", "transformers", "datasets", "safetensors")
    assert record["versions"] == {"python": platform.python_version(), **{p: version(p) for p in packages}}
    assert record["device"] == {"type": "cuda" if torch.cuda.is_available() else "cpu", "threads": 1, "precision": "float32", "processes": 1}

    model, tokenizer = load_model(small.config.model, device="cpu")
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().numpy().tobytes())
    told = record["model"]
    assert told["fingerprint"] == digest.hexdigest() and told["class"] == "LlamaForCausalLM"
    assert (told["prunable_weights"], told["weights"]) == count_weights(model) and told["skipped"] == {}
    for label in ("general", "healthcare", "legal"):
        batches = calibration.load_calibration(label, tokenizer, SMALL["nsamples"], SMALL["seqlen"], small.config.seed)
        assert record["calibration"][label] == calibration.fingerprint(batches)


def test_status_json_says_done(small):
    status = json.loads((small.run.folder / "status.json").read_text())
    assert (status["state"], status["progress"], status["eta_seconds"], status["error"]) == ("done", 1.0, 0.0, None)
    assert status["pid"] == os.getpid() and status["elapsed_seconds"] > 0


def test_masks_are_readable_with_numpy_and_safetensors_alone(small):
    model, _ = load_model(small.config.model, device="cpu")
    linears = prunable_linears(model)
    for method, domain in small.run.pairs():
        masks = read_bits(small.run.folder / "masks" / f"{method}@{domain}.safetensors")
        assert list(masks) == list(linears)
        for name, mask in masks.items():
            assert mask.shape == tuple(linears[name].weight.shape) and (~mask).sum() == round(0.5 * mask.size)
            if method == "magnitude":
                weights = np.abs(linears[name].weight.detach().numpy())
                assert weights[mask].min() >= weights[~mask].max()
        read = small.run.masks(method, domain)
        assert all(np.array_equal(read[n].numpy(), m) for n, m in masks.items())


def test_what_looks_at_no_domain_ranks_alike_for_every_domain(small):
    for method in ("general", "magnitude"):
        for kind in ("ranks", "edges"):
            one, other = (read_arrays(small.run.path(kind, method, domain)) for domain in ("healthcare", "legal"))
            assert one and all(np.array_equal(one[name], other[name]) for name in one)
    weights = {n: m.weight for n, m in prunable_linears(load_model(small.config.model, device="cpu")[0]).items()}
    for name, bins in read_arrays(small.run.path("ranks", "magnitude", "legal")).items():
        assert np.array_equal(bins, rank_bins(weights[name].detach().abs()).numpy())


def test_ranks_are_bytes_whose_threshold_is_the_mask(small):
    for method, domain in small.run.pairs():
        masks = read_bits(small.run.path("masks", method, domain))
        ranks = read_arrays(small.run.path("ranks", method, domain))
        assert set(ranks) == set(masks)
        for name, rank in ranks.items():
            assert rank.dtype == np.uint8 and np.array_equal(rank >= 128, masks[name])
            counts = np.bincount(rank.ravel(), minlength=256)
            assert counts.max() - counts.min() <= 1 and len(counts) == 256


def test_edges_are_the_scores_at_which_the_ranks_change(small):
    model, _ = load_model(small.config.model, device="cpu")
    ranks, edges = (read_arrays(small.run.path(kind, "magnitude", "legal")) for kind in ("ranks", "edges"))
    for name, module in prunable_linears(model).items():
        weights = np.abs(module.weight.detach().numpy())
        assert edges[name].dtype == np.float32 and edges[name].shape == (257,)
        for rank in (0, 1, 100, 255):
            inside = weights[ranks[name] == rank]
            assert edges[name][rank] == inside.min() and inside.max() <= edges[name][rank + 1]
        assert edges[name][256] == weights.max()


def test_ranks_at_another_threshold_are_the_mask_of_another_sparsity(small, llama, tmp_path):
    run = quick(llama, tmp_path, methods=("magnitude",), sparsity=0.75)
    ranks = read_arrays(small.run.path("ranks", "magnitude", "legal"))
    assert all(np.array_equal(ranks[name] >= 192, mask) for name, mask in read_bits(run.path("masks", "magnitude", "legal")).items())


def as_counted(table) -> dict:
    """The rows of one matrix in stats.parquet: {(part, index): (weights, kept)}."""
    rows = table[["part", "index", "weights", "kept"]].itertuples(index=False, name=None)
    return {(part, index): (weights, kept) for part, index, weights, kept in rows}


def counted_by_hand(model, mask: np.ndarray, name: str) -> dict:
    """{(part, index): (weights, kept)} of one weight, with a loop for each."""
    rows = mask.T if stored_transposed(prunable_linears(model)[name]) else mask
    found = {("matrix", 0): (rows.size, sum(bool(kept) for kept in rows.ravel()))}
    for i in range(rows.shape[0]):
        found["row", i] = (rows.shape[1], sum(rows[i, j] for j in range(rows.shape[1])))
    for j in range(rows.shape[1]):
        found["column", j] = (rows.shape[0], sum(rows[i, j] for i in range(rows.shape[0])))
    if name in heads_of(model):
        axis, size = heads_of(model)[name]
        lines = rows if axis == "row" else rows.T
        for h in range(len(lines) // size):
            found["head", h] = (size * lines.shape[1], int(sum(lines[h * size + k].sum() for k in range(size))))
    return found


def test_stats_agree_with_the_masks_recounted_by_hand(small):
    model, _ = load_model(small.config.model, device="cpu")
    table = pd.read_parquet(small.run.folder / "stats.parquet")
    assert {(m, d) for m, d in zip(table.method, table.domain, strict=True)} == set(small.run.pairs())
    for method, domain in (("dpruner", "healthcare"), ("random", "legal")):
        of_this = table[(table.method == method) & (table.domain == domain)]
        for name, mask in read_bits(small.run.path("masks", method, domain)).items():
            told = of_this[of_this.matrix == name]
            assert as_counted(told) == counted_by_hand(model, mask, name)
    assert of_this[of_this.part == "matrix"].weights.sum() == count_weights(model)[0]


def test_heads_of_grouped_queries_are_counted_where_they_lie(small):
    table = small.run.stats()
    heads = table[(table.method == "magnitude") & (table.domain == "legal") & (table.part == "head")].groupby("matrix").size()
    block = "model.layers.0.self_attn"
    assert [heads[f"{block}.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")] == [6, 2, 2, 6]
    assert not any("mlp" in name for name in heads.index)


def test_stats_of_weights_stored_the_other_way_round_are_those_of_their_outputs_and_inputs():
    model = tiny("gpt2")
    scores = dpruner.pipeline.baselines.magnitude(model)
    masks = dpruner.make_masks(scores, 0.3)
    table = matrix_stats(model, masks, scores)
    for name in list(masks)[:4]:
        told = table[table.matrix == name]
        assert as_counted(told) == counted_by_hand(model, masks[name].numpy(), name)
        row = told[(told.part == "row") & (told["index"] == 5)].score.item()
        assert row == pytest.approx(scores[name][:, 5].mean().item(), rel=1e-5)


def test_stats_hold_the_mean_score_of_each_part(small):
    model, _ = load_model(small.config.model, device="cpu")
    table = small.run.stats()
    table = table[(table.method == "magnitude") & (table.domain == "legal")]
    for name, module in list(prunable_linears(model).items())[:3]:
        w = module.weight.detach().abs()
        told = table[table.matrix == name]
        for part, expected in (("matrix", w.mean()[None]), ("row", w.mean(1)), ("column", w.mean(0))):
            assert told[told.part == part].score.to_numpy() == pytest.approx(expected.numpy(), rel=1e-5)


# ---- its figures ----


def figure(run, method, domain, metric, text=""):
    table = run.metrics()
    found = table[(table.method == method) & (table.domain == domain) & (table.metric == metric) & (table.text == text)]
    assert len(found) == 1, (method, domain, metric, text)
    return found.iloc[0]


def test_every_figure_has_its_row(small):
    table = pd.read_parquet(small.run.folder / "metrics.parquet")
    assert list(table.columns) == ["method", "domain", "text", "metric", "value", "low", "high", "n"]
    counts = table.groupby("metric").size().to_dict()
    assert counts == {"perplexity": 4 * 2 * 2, "sparsity of prunable weights": 6, "sparsity of the whole model": 6, "jaccard": 3,
                      "jaccard floor": 3, "jaccard ceiling": 2, "jaccard halves": 1, "decisions changed by λ": 2}
    estimated = table.metric == "perplexity"
    assert (table[estimated].low <= table[estimated].value).all() and (table[estimated].value <= table[estimated].high).all()
    assert table[~estimated].low.isna().all() and (table.n > 0).all() and not table.value.isna().any()


def test_perplexities_are_those_of_the_model_with_the_mask(small):
    model, tokenizer = load_model(small.config.model, device="cpu")
    texts = dpruner.load_texts("legal", "heldout", limit=SMALL["eval_documents"])
    for method in ("dense", "dpruner"):
        with dpruner.pruned(model, {} if method == "dense" else small.run.masks(method, "legal")):
            expected = dpruner.perplexity(model, tokenizer, texts, SMALL["eval_seqlen"])
        told = figure(small.run, method, "legal", "perplexity", "legal")
        assert (told.value, told.low, told.high) == pytest.approx((expected, expected.low, expected.high), rel=1e-5)
        assert told.n == expected.n
    on_general = [figure(small.run, "dense", domain, "perplexity", "general").value for domain in small.config.domains]
    assert on_general[0] == on_general[1]


def test_both_sparsities_are_told(small):
    prunable, total = count_weights(load_model(small.config.model, device="cpu")[0])
    for method, domain in small.run.pairs():
        removed = sum((~m).sum() for m in read_bits(small.run.path("masks", method, domain)).values())
        assert figure(small.run, method, domain, "sparsity of prunable weights").value == pytest.approx(removed / prunable, rel=1e-12)
        assert figure(small.run, method, domain, "sparsity of the whole model").value == pytest.approx(removed / total, rel=1e-12)


def shared(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Jaccard similarity of the kept weights, as sets."""
    one, other = (set(np.flatnonzero(np.concatenate([m[name].ravel() for name in a])).tolist()) for m in (a, b))
    return len(one & other) / len(one | other)


def test_similarities_are_recounted_and_lie_between_chance_and_the_same_mask(small):
    told = {}
    for method in small.config.methods:
        a, b = (read_bits(small.run.path("masks", method, domain)) for domain in small.config.domains)
        row = figure(small.run, method, "healthcare", "jaccard", "legal")
        told[method] = row.value
        assert row.value == pytest.approx(shared(a, b), rel=1e-12) and row.n == sum(m.size for m in a.values())
        assert figure(small.run, method, "healthcare", "jaccard floor", "legal").value == pytest.approx(1 / 3, rel=1e-9)
    assert told["magnitude"] == 1
    # 58,968 weights: the similarity of two random masks has a standard deviation of about 0.003
    assert told["random"] == pytest.approx(1 / 3, abs=0.01)
    assert 1 / 3 < told["dpruner"] < 1


def test_the_ceiling_is_what_the_masks_of_two_halves_of_a_domains_text_share(small):
    for domain in small.config.domains:
        one, other = (read_bits(small.run.path("masks", "dpruner", f"{domain}~{half}")) for half in (1, 2))
        row = figure(small.run, "dpruner", domain, "jaccard ceiling", domain)
        assert row.value == pytest.approx(shared(one, other), rel=1e-12) and row.n == sum(m.size for m in one.values())
        assert all((~m).sum() == round(0.5 * m.size) for m in one.values()) and 1 / 3 < row.value < 1
    told = report.summary(small.run)["similarity"]
    ceilings = [figure(small.run, "dpruner", domain, "jaccard ceiling", domain).value for domain in small.config.domains]
    assert {s["method"]: s["ceiling"] for s in told} == {"dpruner": pytest.approx(sum(ceilings) / 2), "magnitude": None, "random": None}


def test_masks_of_half_the_text_of_two_domains_compare_with_that_ceiling(small):
    halves = [[read_bits(small.run.path("masks", "dpruner", f"{domain}~{half}")) for half in (1, 2)] for domain in ("healthcare", "legal")]
    expected = sum(shared(one, other) for one in halves[0] for other in halves[1]) / 4
    assert figure(small.run, "dpruner", "healthcare", "jaccard halves", "legal").value == pytest.approx(expected, rel=1e-12)
    told = report.summary(small.run)["similarity"]
    assert {s["method"]: s["halves"] for s in told} == {"dpruner": pytest.approx(expected), "magnitude": None, "random": None}


def test_halves_are_the_first_and_the_last_sequences(small, tmp_path, monkeypatch):
    seen = []
    real = pipeline.domain_importance

    def watching(model, batches, *rest, **options):
        seen.append(calibration.fingerprint(batches))
        return real(model, batches, *rest, **options)

    monkeypatch.setattr(pipeline, "domain_importance", watching)
    config = RunConfig(**{**small.run.config, "domains": ("legal",), "methods": ("dpruner", "domain"), "evaluate": False})
    run = pipeline.run(config, runs=tmp_path / "runs", cache=small.cache)
    _, tokenizer = load_model(small.config.model, device="cpu")
    batches = calibration.load_calibration("legal", tokenizer, SMALL["nsamples"], SMALL["seqlen"], 0)
    assert seen == [calibration.fingerprint(part) for part in (batches, batches[:2], batches[2:])]
    assert set(run.metrics().query("metric == 'jaccard ceiling'").method) == {"dpruner", "domain"}


def test_decisions_changed_by_lambda_are_those_that_a_run_with_lambda_zero_makes_otherwise(small, tmp_path):
    config = RunConfig(**{**small.run.config, "methods": ("dpruner", "domain"), "lam": 0.0, "evaluate": False})
    without = pipeline.run(config, runs=tmp_path / "runs", cache=small.cache)
    for domain in small.config.domains:
        with_it, zero, alone = (read_bits(run.path("masks", method, domain)) for run, method in
                                ((small.run, "dpruner"), (without, "dpruner"), (without, "domain")))
        told = figure(small.run, "dpruner", domain, "decisions changed by λ")
        assert told.value == sum((with_it[n] ^ zero[n]).sum() for n in zero) > 0 and told.n == sum(m.size for m in zero.values())
        assert all(np.array_equal(zero[n], alone[n]) for n in zero)
        assert figure(without, "dpruner", domain, "decisions changed by λ").value == 0


def test_the_summary_says_what_the_tables_say(small):
    told = json.loads(json.dumps(report.summary(small.run)))   # plain values
    assert (told["id"], told["state"]) == (small.run.id, "done")
    assert len(told["rows"]) == 6 and set(told["dense"]) == {"healthcare", "legal"}
    for row in told["rows"]:
        e = figure(small.run, row["method"], row["domain"], "perplexity", "general")
        assert row["perplexity"]["general"] == {"value": e.value, "low": e.low, "high": e.high, "n": e.n}
        assert list(row["perplexity"]) == [row["domain"], "general"]
        assert row["sparsity of prunable weights"] == figure(small.run, row["method"], row["domain"], "sparsity of prunable weights").value
    assert [(s["method"], s["domains"]) for s in told["similarity"]] == [(m, ["healthcare", "legal"]) for m in small.config.methods]
    assert told["lambda"]["legal"]["changed"] == figure(small.run, "dpruner", "legal", "decisions changed by λ").value


def test_each_similarity_stands_beside_its_own_floor(llama, tmp_path):
    # one threshold for the whole model: how much is kept of each matrix, and with it what chance shares, differs between methods
    run = quick(llama, tmp_path, domains=("legal", "finance"), methods=("dpruner", "magnitude"), granularity="global")
    told = {s["method"]: s for s in report.summary(run)["similarity"]}
    for method in ("dpruner", "magnitude"):
        a, b = (read_bits(run.path("masks", method, domain)) for domain in ("legal", "finance"))
        both = sum(a[n].mean() * b[n].mean() * a[n].size for n in a)   # of two random masks with these counts in every matrix
        either = sum((a[n].mean() + b[n].mean()) * a[n].size for n in a) - both
        assert told[method]["floor"] == pytest.approx(both / either, rel=1e-6) and told[method]["jaccard"] == pytest.approx(shared(a, b))
    assert abs(told["dpruner"]["floor"] - told["magnitude"]["floor"]) > 1e-4


@pytest.mark.parametrize(("asked", "told"), [(None, 3), (["legal"], 2), (["legal", "finance"], 1), (["legal", "legal"], 2), (["legal", "code", "finance"], 3)])
def test_one_domain_is_compared_with_all_others_and_several_with_each_other(asked, told, tmp_path):
    run = store.Run(tmp_path)
    pairs = [("legal", "finance"), ("legal", "code"), ("finance", "code")]
    store.write_table(tmp_path / "metrics.parquet", rows(*(exact("magnitude", a, b, metric, 0.5, 10) for a, b in pairs for metric in ("jaccard", "jaccard floor")),
                                                    *(exact("magnitude", d, "", "sparsity", 0.5, 10) for d in ("legal", "finance", "code"))))
    found = report.similarity(run, domains=asked)
    assert len(found) == told and all(len(set(asked or ()) & set(row["domains"])) >= min(2, len(set(asked or ()))) for row in found)


def test_a_run_without_evaluation_and_with_one_domain_has_a_summary_too(llama, tmp_path):
    run = quick(llama, tmp_path)
    told = report.summary(run)
    assert told["dense"] == {} and told["similarity"] == [] and told["rows"][0]["perplexity"] == {}
    assert told["lambda"]["legal"]["of"] == 58968


def test_the_open_domain_can_be_a_domain_too(llama, tmp_path):
    run = quick(llama, tmp_path, **SMALL, domains=("general", "legal"), evaluate=True)
    told = report.summary(run)
    assert list(told["dense"]["general"]) == ["general"] and list(told["dense"]["legal"]) == ["legal", "general"]


# ---- once, and again ----


def test_an_open_domain_that_is_a_domain_too_is_read_from_the_same_column(tmp_path):
    rows = [f"{i},The court held that party number {i} was right in this matter and in all others." for i in range(40)]
    (tmp_path / "law.csv").write_text("\n".join(["title,body", *(f"t{row}" for row in rows)]))
    law = f"law={tmp_path / 'law.csv'}"
    texts = Texts(RunConfig(general=law, domains=(law,), column="body", nsamples=2, seqlen=16), tiny_tokenizer())
    assert all(torch.equal(a, b) for a, b in zip(texts.general, texts.domains["law"], strict=True)) and texts.heldout["law"][0].startswith("The court")


def test_general_importance_is_computed_once_and_shared(small, tmp_path, monkeypatch):
    (path,) = small.cache.rglob("*.safetensors")
    before = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "general_importance", None)   # would fail if it were called
    config = RunConfig(**{**small.run.config, "domains": ("finance", "legal"), "methods": ("general", "dpruner"), "sparsity": 0.3,
                          "evaluate": False, "halves": False})
    run = pipeline.run(config, runs=tmp_path / "runs", cache=small.cache)
    assert [path] == list(small.cache.rglob("*.safetensors")) and (path.read_bytes(), path.stat().st_mtime_ns) == before
    a, b = (read_bits(run.path("masks", "general", domain)) for domain in ("finance", "legal"))
    assert all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("other", [{"nsamples": 5}, {"seqlen": 17}, {"general_sparsity": 0.4}, {"general_mode": "sequential"},
                                   {"general": "science"}, {"seed": 1}], ids=str)
def test_the_cache_is_not_shared_where_general_importance_would_differ(other, llama, tmp_path):
    for settings in ({}, other):
        quick(llama, tmp_path, methods=("general",), **settings)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_damaged_cache_is_computed_anew(damage, small, tmp_path):
    (path,) = small.cache.rglob("*.safetensors")
    copy = tmp_path / "cache" / path.relative_to(small.cache)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(damage(path.read_bytes()))
    pipeline.run(RunConfig(**{**small.run.config, "evaluate": False}), runs=tmp_path / "runs", cache=tmp_path / "cache")
    assert copy.read_bytes() == path.read_bytes()


def decisions_changed(a: store.Run, b: store.Run) -> float:
    """Share of the mask decisions that two runs make differently."""
    changed = size = 0
    for pair in a.pairs():
        one, other = (read_bits(run.path("masks", *pair)) for run in (a, b))
        changed += sum((one[n] ^ other[n]).sum() for n in one)
        size += sum(m.size for m in one.values())
    return changed / size


def test_a_repeated_run_writes_the_same_bytes(small, tmp_path):
    again = pipeline.run(RunConfig(**small.run.config), runs=tmp_path / "runs", cache=tmp_path / "cache")
    for kind in ("masks", "ranks", "edges"):
        for path in (small.run.folder / kind).iterdir():
            assert path.read_bytes() == (again.folder / kind / path.name).read_bytes(), path.name
    assert files_in(tmp_path / "cache") == files_in(small.cache)
    pd.testing.assert_frame_equal(small.run.metrics(), again.metrics())
    pd.testing.assert_frame_equal(small.run.stats(), again.stats())


@pytest.mark.parametrize("settings", [{"methods": ("dpruner", "wanda", "sparsegpt")}, {"methods": ("dpruner",), "compensate": "walk"}])
@pytest.mark.parametrize("tokens", [1, 48])
def test_how_many_sequences_pass_together_changes_next_to_no_decision(settings, tokens, llama, tmp_path, monkeypatch):
    """Sums of other lengths round otherwise, and a walk decides a few ties otherwise: at most one decision in a thousand."""
    config = RunConfig(model=str(llama), **{**QUICK, "general_mode": "sequential", "nsamples": 8}, **settings)
    usual = pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")
    monkeypatch.setattr(walk, "TOKENS_PER_PASS", tokens)
    other = pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "other-cache")
    share = decisions_changed(usual, other)
    print(f"{share:.6%} of the decisions changed")
    assert share <= 1e-3


def test_another_seed_is_another_run(small, tmp_path):
    other = pipeline.run(RunConfig(**{**small.run.config, "seed": 1, "evaluate": False}), runs=tmp_path / "runs", cache=tmp_path / "cache")
    for method in ("dpruner", "random"):
        assert small.run.path("masks", method, "legal").read_bytes() != other.path("masks", method, "legal").read_bytes()


# ---- every method through the pipeline ----


def through(model, monkeypatch, tmp_path, **settings) -> store.Run:
    """A run on a model at hand, which must be as before afterwards; what it reports must never go back."""
    monkeypatch.setattr(pipeline, "load_model", lambda *_, **__: (model, tiny_tokenizer()))
    before = fingerprint(model), [p.requires_grad for p in model.parameters()], model.training
    shares, stages = [], []

    def watch(status):
        shares.append(status.share)
        stages.append((status.stage, status.plan[status.at][0]))

    run = pipeline.run(RunConfig(**{**QUICK, **settings}), runs=tmp_path / "runs", cache=tmp_path / "cache", watch=watch)
    assert (fingerprint(model), [p.requires_grad for p in model.parameters()], model.training) == before
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert never_falls_and_ends_at_one(shares) and all(stage == planned for stage, planned in stages)
    assert run.status["state"] == "done" and not half_written(tmp_path)
    return run


def removed_in_rows(model, masks, name) -> np.ndarray:
    """What goes, as (out, in)."""
    return ~masks[name].T if stored_transposed(prunable_linears(model)[name]) else ~masks[name]


METHODS = ("dpruner", "domain", "general", "magnitude", "wanda", "sparsegpt", "random")


@pytest.mark.parametrize("compensate", [None, "after", "walk"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_method_removes_what_it_should_and_leaves_the_model_as_it_was(family, compensate, monkeypatch, tmp_path):
    model = tiny(family)
    run = through(model, monkeypatch, tmp_path, methods=METHODS, compensate=compensate, allot="even", sparsity=0.4)
    assert run.pairs() == sorted((method, "legal") for method in METHODS)
    linears = prunable_linears(model)
    for method in METHODS:
        masks = read_bits(run.path("masks", method, "legal"))
        walked = method == "sparsegpt" or (method == "dpruner" and compensate == "walk")
        moved = walked or compensate == "after"
        assert run.path("ranks", method, "legal").exists() != walked and run.path("weights", method, "legal").exists() == moved
        for name in masks:
            gone = removed_in_rows(model, masks, name)
            blocks = [gone[:, at:at + 128] for at in range(0, gone.shape[1], 128)]
            if method == "sparsegpt":     # as the release cuts: one more than the whole number below, in every 128 columns
                assert [b.sum() for b in blocks] == [int(0.4 * b.size) + 1 for b in blocks]
            elif walked:
                assert [b.sum() for b in blocks] == [round(0.4 * b.size) for b in blocks]
            elif method == "wanda":       # a threshold for every output
                assert (gone.sum(1) == round(0.4 * gone.shape[1])).all()
            else:
                assert gone.sum() == round(0.4 * gone.size)
        if moved:
            weights = read_arrays(run.path("weights", method, "legal"))
            assert all((weights[n][~masks[n]] == 0).all() for n in masks)
            originals = {n: linears[n].weight.detach().numpy() for n in masks}
            assert any((weights[n][masks[n]] != originals[n][masks[n]]).any() for n in masks)


@pytest.mark.parametrize("granularity, sparsity", [("row", 0.6), ("global", 0.6), ("2:4", 0.5), ("4:8", 0.5)])
@pytest.mark.parametrize("compensate", [None, "after"])
def test_every_granularity_holds_in_every_group(granularity, sparsity, compensate, monkeypatch, tmp_path):
    model = tiny("llama")
    methods = ("dpruner", "magnitude", "wanda")
    run = through(model, monkeypatch, tmp_path, granularity=granularity, sparsity=sparsity, compensate=compensate, methods=methods)
    for pair in run.pairs():
        masks = read_bits(run.path("masks", *pair))
        gone = {n: ~m for n, m in masks.items()}
        if granularity == "row":
            assert all((g.sum(1) == round(0.6 * g.shape[1])).all() for g in gone.values())
        elif granularity == "global":
            size = sum(g.size for g in gone.values())
            assert sum(g.sum() for g in gone.values()) == round(0.6 * size)
            assert np.ptp([g.mean() for g in gone.values()]) > 0.01   # one threshold for all: matrices differ
        else:
            m = int(granularity[-1])
            for g in gone.values():
                whole = g.shape[1] // m * m
                assert (g[:, :whole].reshape(-1, m).sum(1) == m // 2).all()


def test_blocks_of_128_columns_each_lose_their_share(monkeypatch, tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=144, intermediate_size=256, num_hidden_layers=1,
                                  num_attention_heads=6, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    run = through(model, monkeypatch, tmp_path, granularity="block", sparsity=0.3)
    for mask in read_bits(run.path("masks", "dpruner", "legal")).values():
        width = 128 if mask.shape[1] == 256 else 72   # 128 does not divide 144: as many equal groups as the hidden size has
        for at in range(0, mask.shape[1], width):
            group = ~mask[:, at:at + width]
            assert group.sum() == round(0.3 * group.size)


@pytest.mark.parametrize("settings", [
    {"formula": "taylor"}, {"formula": "release"}, {"formula": "balanced", "lam": 3.0}, {"finetune": True, "epochs": 2},
    {"finetune": True, "epochs": 1, "formula": "release"}, {"general_mode": "sequential", "general_sparsity": 0.3},
    {"compensate": "walk", "fisher": "domain", "hessian": "domain"}, {"compensate": "after", "hessian": "general"},
    {"methods": ("wanda", "sparsegpt"), "baseline_calibration": "mix"},
    {"methods": ("wanda", "sparsegpt"), "baseline_calibration": "domain"},
    {"evaluate": True, "eval_documents": 1, "eval_seqlen": 128, "methods": ("magnitude", "dpruner"), "compensate": "walk"},
    {"sparsity": 0.0}, {"sparsity": 1.0}, {"halves": True, "nsamples": 5, "finetune": True, "epochs": 1}, {"halves": True, "nsamples": 1},
    {"halves": True, "methods": ("domain", "magnitude")}, {"halves": True, "granularity": "2:4"}, {"halves": True, "compensate": "walk"},
    {"compensate": "walk", "allot": "even", "refine": 0}, {"compensate": "walk", "fisher": "domain", "sparsity": 0.8},
], ids=str)
def test_every_setting_runs_through_with_the_sparsity_asked_for(settings, monkeypatch, tmp_path):
    run = through(tiny("llama"), monkeypatch, tmp_path, **settings)
    for method, domain in run.pairs():
        asked = settings.get("sparsity", 0.5)
        found = figure(run, method, domain, "sparsity of prunable weights").value
        assert found == pytest.approx(asked, abs=1e-3), method
    assert json.dumps(report.summary(run))


@pytest.mark.parametrize("formula", ["taylor", "release"])
def test_formulas_choose_different_weights(formula, monkeypatch, tmp_path):
    model = tiny("llama")
    one, other = (through(model, monkeypatch, tmp_path, formula=f, lam=1.0) for f in ("balanced", formula))
    assert decisions_changed(one, other) > 0.01


def test_fine_tuning_while_scoring_changes_what_is_chosen(monkeypatch, tmp_path):
    model = tiny("llama")
    plain, tuned = (through(model, monkeypatch, tmp_path, formula="taylor", epochs=3, finetune=finetune) for finetune in (False, True))
    assert 0 < decisions_changed(plain, tuned) < 0.5


def test_a_sparsity_of_the_whole_model_is_one_of_all_weights(monkeypatch, tmp_path):
    model = tiny("llama")
    prunable, total = count_weights(model)
    run = through(model, monkeypatch, tmp_path, sparsity=0.5, sparsity_of="model", methods=("dpruner", "random"))
    for pair in run.pairs():
        masks = read_bits(run.path("masks", *pair))
        assert sum((~m).sum() for m in masks.values()) / total == pytest.approx(0.5, abs=len(masks) / total)
        assert figure(run, *pair, "sparsity of the whole model").value == pytest.approx(0.5, abs=len(masks) / total)
        assert figure(run, *pair, "sparsity of prunable weights").value == pytest.approx(0.5 * total / prunable, abs=len(masks) / total)


def test_a_sparsity_of_the_whole_model_beyond_the_prunable_weights_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="0.95 of the whole model.*89%"):
        quick(llama, tmp_path, sparsity=0.95, sparsity_of="model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("prunable", "told"), [(899, "0.89"), (900, "0.90"), (999, "0.99")])
def test_the_sparsity_of_the_whole_model_that_is_advised_can_be_reached(prunable, told, monkeypatch):
    monkeypatch.setattr(pipeline, "count_weights", lambda model: (prunable, 1000))
    with pytest.raises(InputError, match=f"ask for at most {told}"):
        pipeline.prunable_sparsity(RunConfig(sparsity=1.0, sparsity_of="model"), None)
    assert pipeline.prunable_sparsity(RunConfig(sparsity=float(told), sparsity_of="model"), None) <= 1


# ---- progress ----


def test_progress_never_goes_down_and_ends_at_one(small):
    assert never_falls_and_ends_at_one([share for _, share in small.seen])
    stages = list(dict.fromkeys(stage for stage, _ in small.seen))
    assert stages == ["general importance", "evaluation", "domain importance"]
    assert len({share for _, share in small.seen}) > 20


def test_status_knows_where_it_is_in_its_plan(tmp_path):
    with Status(tmp_path) as status:
        status.plan = [("walk", 3.0, "a"), ("evaluation", 1.0, "a"), ("walk", 3.0, "b"), ("evaluation", 3.0, "b")]
        assert (status.share, status.eta) == (0.0, None)
        told = []
        for stage in ("walk", "evaluation", "walk", "evaluation"):
            for done in range(3):
                status.step(stage, done, 2)
                told.append(round(status.share, 6))
        assert told == [0.0, 0.15, 0.3, 0.3, 0.35, 0.4, 0.4, 0.55, 0.7, 0.7, 0.85, 1.0]
        assert 0 <= status.eta < 1
    assert json.loads((tmp_path / "status.json").read_text())["progress"] == 1.0


def test_a_stage_that_is_left_out_counts_as_done(tmp_path):
    with Status(tmp_path) as status:
        status.plan = [("general importance", 6.0, "general"), ("domain importance", 4.0, "sides")]
        status.step("domain importance", 0, 4)   # the first was in the cache
        assert status.share == 0.6


def test_what_comes_between_two_stages_is_told_and_counts_for_nothing(tmp_path):
    with Status(tmp_path) as status:
        status.plan = [("walk", 3.0, "a"), ("evaluation", 1.0, "a")]
        for done in (0, 2):
            status.step("walk", done, 2)
        status.between("masks and ranks")
        told = json.loads((tmp_path / "status.json").read_text())
        assert (told["stage"], told["done"], told["total"], told["progress"]) == ("masks and ranks", 1, 1, 0.75)
        status.step("evaluation", 0, 2)
        assert status.share == 0.75
        status.step("evaluation", 1, 2)
        assert status.share == 0.875


def test_while_masks_and_ranks_are_written_the_status_says_so(llama, tmp_path, monkeypatch):
    seen, real = set(), store.write_tensors

    def written(path, *rest):
        seen.update((path.parent.name, json.loads(s.read_text())["stage"]) for s in (tmp_path / "runs").glob("*/status.json"))
        real(path, *rest)

    monkeypatch.setattr(store, "write_tensors", written)
    quick(llama, tmp_path, halves=True)
    assert {stage for folder, stage in seen if folder in ("masks", "ranks")} == {"masks and ranks"}


def test_status_is_written_at_the_beginning_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("dpruner.status.write_json", lambda path, data: written.append(data))
    clock = iter(np.arange(0, 100, 0.1).tolist())
    monkeypatch.setattr("dpruner.status.time.monotonic", lambda: next(clock))
    with Status(tmp_path, fresh=True) as status:
        status.plan = [("walk", 1.0, "a")]
        for done in range(20):
            status.step("walk", done, 20)
    assert [w["state"] for w in written] == ["running"] * (len(written) - 1) + ["done"] and 3 < len(written) < 15
    assert all(0 <= w["progress"] <= 1 for w in written)


# ---- failing ----


def test_a_loss_that_is_no_number_fails_the_run_and_says_what_to_do(llama, tmp_path, monkeypatch):
    from dpruner import domain
    real, calls = domain.next_token_loss, []

    def broken(model, ids):
        calls.append(ids)
        return real(model, ids) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(domain, "next_token_loss", broken)
    with pytest.raises(InputError, match="batch 3 is nan") as caught:
        quick(llama, tmp_path)
    status = failed(tmp_path / "runs")
    assert status["error"] == {"what": caught.value.what, "why": caught.value.why, "what to do": caught.value.fix}
    assert all(status["error"].values())
    assert status["stage"] == "domain importance" and status["progress"] < 1 and not half_written(tmp_path)


def test_a_fault_of_the_program_is_told_with_its_stage_and_passed_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "make_masks", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick(llama, tmp_path)
    assert "ZeroDivisionError" in failed(tmp_path / "runs")["error"]["why"]


def test_too_little_memory_is_told_in_words(llama, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmuch more")
    monkeypatch.setattr(pipeline, "domain_importance", exhausted)
    with pytest.raises(InputError, match="more memory than there is.*Tried to allocate"):
        quick(llama, tmp_path)
    assert failed(tmp_path / "runs")["error"]["what"] == "The run needs more memory than there is"


def test_tensors_are_what_the_library_reads(tmp_path):
    tensors = {"odd bytes": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5).bfloat16(), "none": torch.empty(0, 4), "scalar": torch.tensor(2.5),
               "view": torch.arange(12.0).view(3, 4).t(), "flags": torch.rand(5) > 0.5, "long": torch.arange(3, dtype=torch.float64)}
    about = {"z": "ä", "a": "1"}
    for name in ("one", "two"):
        store.write_tensors(tmp_path / name, dict(reversed(tensors.items())) if name == "two" else tensors, about)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load_file(tmp_path / "one")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    with store.opened(tmp_path / "one") as file:
        assert file.metadata() == about


def full_disk(monkeypatch, where: str):
    """Files in a folder of this name get half written, then the disk is full."""
    real = store.save_file

    def half(tensors, path, metadata):
        if Path(path).parent.name != where:
            return real(tensors, path, metadata)
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "save_file", half)


@pytest.mark.parametrize("where", ["masks", "ranks", "general"])
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(where, llama, tmp_path, monkeypatch):
    full_disk(monkeypatch, where)
    with pytest.raises(InputError, match="could not write to .*the disk is full") as caught:
        quick(llama, tmp_path)
    assert failed(tmp_path / "runs")["error"]["what"] == caught.value.what
    assert not half_written(tmp_path) and not any(where in path.parts and path.is_file() for path in tmp_path.rglob("*"))


def test_a_full_disk_that_takes_no_status_either_still_says_its_sentence(llama, tmp_path, monkeypatch):
    full_disk(monkeypatch, "masks")
    real = store.replacing

    def no_more(path, data):
        if data["state"] == "failed":
            raise OSError(errno.ENOSPC, "No space left on device")
        with real(path) as temporary:
            temporary.write_text(json.dumps(data))

    monkeypatch.setattr("dpruner.status.write_json", no_more)
    with pytest.raises(InputError, match="the disk is full"):
        quick(llama, tmp_path)
    failed(tmp_path / "runs", "running")   # the last that could be written


def test_a_disk_that_is_full_from_the_beginning_leaves_no_folder(llama, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("dpruner.status.write_json", full)
    with pytest.raises(InputError, match="the disk is full"):
        quick(llama, tmp_path)
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("which", ["runs", "cache"])
def test_a_file_in_the_place_of_a_folder_is_named(which, llama, tmp_path):
    (tmp_path / which).write_text("mine")
    with pytest.raises(InputError, match=str(tmp_path / which)):
        quick(llama, tmp_path)
    assert (tmp_path / which).read_text() == "mine"


def command(llama, tmp_path, *more) -> list[str]:
    return [sys.executable, "-m", "dpruner", "prune", "--model", str(llama), "--domain", "legal", "--nsamples", "4", "--seqlen", "16",
            "--no-evaluate", "--general-mode", "static", "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), *more]


def start(arguments, tmp_path, prepare=None) -> subprocess.Popen:
    def before_it_runs():
        signal.signal(signal.SIGINT, signal.default_int_handler)   # a test run in the background hands down that it is ignored
        if prepare:
            prepare()
    return subprocess.Popen(arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before_it_runs)


def test_a_file_that_may_grow_no_further_is_one_sentence_and_leaves_no_half_file(llama, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))   # run.json and status.json are smaller, all others larger

    process = start(command(llama, tmp_path, "--method", "magnitude"), tmp_path, limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out == "" and err.count("\n") == 1 and "The run could not write to" in err, err
    status = failed(tmp_path / "runs")
    assert status["error"]["what"] in err and not half_written(tmp_path)
    assert {Path(name).name for name in files_in(tmp_path)} == {"run.json", "status.json"}


def test_ctrl_c_in_the_middle_cancels_the_run(llama, tmp_path):
    process = start(command(llama, tmp_path, "--finetune", "--epochs", "5000"), tmp_path)
    deadline = time.time() + 60
    progress = 0
    while not progress:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.05)
        for path in (tmp_path / "runs").glob("*/status.json"):
            status = json.loads(path.read_text())
            assert status["state"] == "running"
            progress = status["stage"] == "domain importance" and status["progress"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and out == "" and err.count("\n") == 1, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert err == f"Stopped: what it has finished is kept; `python -m dpruner resume {folder}` goes on from there.\n"
    status = failed(tmp_path / "runs", "cancelled")
    assert status["error"] is None and 0 < status["progress"] < 1 and not half_written(tmp_path)


# ---- reading what is damaged ----


@pytest.mark.parametrize("name, read", [
    ("status.json", lambda run: run.status), ("run.json", lambda run: run.config), ("stats.parquet", lambda run: run.stats()),
    ("metrics.parquet", lambda run: run.metrics()), ("masks/random@legal.safetensors", lambda run: run.masks("random", "legal")),
    ("ranks/random@legal.safetensors", lambda run: run.ranks("random", "legal")), ("metrics.parquet", report.summary),
])
@pytest.mark.parametrize("damage", ["half", "empty", "noise", "gone"])
def test_a_damaged_file_is_named(name, read, damage, small, tmp_path):
    path = tmp_path / "runs" / "damaged" / name
    path.parent.mkdir(parents=True)
    whole = (small.run.folder / name).read_bytes()
    if damage != "gone":
        path.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 16}[damage])
    with pytest.raises(InputError, match=str(path)) as caught:
        read(store.Run(tmp_path / "runs" / "damaged"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "7", "null", '"done"'])
def test_json_of_another_kind_is_damage_too(content, tmp_path):
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(InputError, match="status.json"):
        _ = store.Run(tmp_path).status


def test_a_file_of_other_tensors_is_no_mask_file(small):
    with pytest.raises(InputError, match="ranks/random@legal.safetensors"):
        store.read_masks(small.run.path("ranks", "random", "legal"))
    with pytest.raises(InputError, match="masks/random@legal.safetensors"):
        store.read_scores(small.run.path("masks", "random", "legal"))


def test_a_byte_changed_in_the_middle_of_a_table_is_noticed_or_harmless(small, tmp_path):
    whole = (small.run.folder / "stats.parquet").read_bytes()
    table = small.run.stats()
    path = tmp_path / "stats.parquet"
    for at in range(10, len(whole) - 1, len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
        try:
            assert len(store.read_table(path)) == len(table)
        except InputError as error:
            assert str(path) in str(error)


def test_runs_are_found_by_id_by_its_beginning_by_folder_and_as_the_last(tmp_path):
    for name in ("20250101-000000-a", "20250102-000000-b", "20250102-000000-bc"):
        store.write_json(tmp_path / name / "run.json", {"config": {}})
    (tmp_path / "20250103-000000-no-run").mkdir()
    assert [run.id for run in store.find_runs(tmp_path)] == ["20250102-000000-bc", "20250102-000000-b", "20250101-000000-a"]
    for name, found in (("last", "20250102-000000-bc"), ("20250101", "20250101-000000-a"), ("20250102-000000-b", "20250102-000000-b"),
                        (tmp_path / "20250101-000000-a", "20250101-000000-a")):
        assert store.open_run(name, tmp_path).id == found
    for name, word in (("20250102", "not unique"), ("2024", "not found"), ("", "not unique")):
        with pytest.raises(InputError, match=word):
            store.open_run(name, tmp_path)
    with pytest.raises(InputError, match="none yet"):
        store.open_run("last", tmp_path / "nowhere")


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    names = [store.new_run(tmp_path / "runs", "../a b/ü").id for _ in range(5)]
    assert len(set(names)) == 5 and {path.name for path in (tmp_path / "runs").iterdir()} == set(names)
    assert all("/" not in name and " " not in name and name.isascii() for name in names)


# ---- layering ----


def imported(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("package, forbidden", [("dpruner", {"app", "analysis", "streamlit", "plotly"}),
                                                ("analysis", {"app", "streamlit"})])
def test_the_arrows_between_the_packages_point_one_way(package, forbidden):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files or package != "dpruner"
    for path in files:
        found = imported(path)
        assert not found & forbidden and not any(name.startswith(".") for name in found), path


def test_nothing_but_safetensors_json_and_parquet_is_read_back():
    """No pickle anywhere, and nobody else's code."""
    for path in (REPOSITORY / "dpruner").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not imported(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        assert "torch.load" not in text and "trust_remote_code=True" not in text and '"trust_remote_code": True' not in text, path

"""What zeros buy on this machine, and what the walk costs: `make bench` prints it, and keeps it in docs/results/speed.json for docs/RESULTS.md."""

import platform
import time
import zlib
from pathlib import Path

import numpy as np
import smollm2
import torch

from dpruner.baselines import sparsegpt
from dpruner.calibration import load_calibration
from dpruner.compensate import allotted, compensate_walk, fisher_batches, mixed_fisher
from dpruner.config import RunConfig
from dpruner.domain import fisher_diagonal
from dpruner.loading import load_model
from dpruner.masks import pack
from dpruner.model import prunable_linears
from dpruner.store import write_json

STORED = Path(__file__).parents[1] / "docs/results/speed.json"
SHAPE, TOKENS, SPARSITIES = (2048, 2048), (1, 64), (0.5, 0.7, 0.9, 0.95, 0.99)
ROUNDS, LEAST = 5, 0.03   # rounds in turn, and seconds each at least


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(task) -> float:
    """Seconds of one call, over as many as fill a round; of the processor on a CPU, whatever else the machine does meanwhile."""
    clock = time.perf_counter if device() == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device() == "cuda" else lambda: None
    count, start = 0, clock()
    while clock() - start < LEAST:
        task()
        count += 1
        wait()
    return (clock() - start) / count


def ratio(dense, other) -> dict:
    """How many times as fast as dense, from rounds in turn: median, lowest, highest."""
    seconds(dense), seconds(other)   # warm
    found = sorted(seconds(dense) / seconds(other) for _ in range(ROUNDS))
    return {"value": found[len(found) // 2], "low": found[0], "high": found[-1]}


def magnitude_pruned(W: torch.Tensor, sparsity: float) -> torch.Tensor:
    flat = W.abs().flatten()
    return W * (W.abs() > flat.kthvalue(round(sparsity * flat.numel())).values)


def two_of_four(W: torch.Tensor) -> torch.Tensor:
    groups = W.view(-1, 4)
    return (groups * torch.zeros_like(groups).scatter_(1, groups.abs().topk(2, dim=1).indices, 1)).view_as(W)


def products() -> list[dict]:
    """Speed of `W @ x` with zeros, against the same dense product."""
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device())
    rows = []
    for tokens in TOKENS:
        x = torch.randn(SHAPE[1], tokens, device=device())
        for sparsity in SPARSITIES:
            zeroed = magnitude_pruned(W, sparsity)
            csr = zeroed.to_sparse_csr()
            rows.append({"how": "dense product with zeros in it", "sparsity": sparsity, "tokens": tokens, **ratio(lambda: W @ x, lambda: zeroed @ x)})
            rows.append({"how": "torch sparse CSR", "sparsity": sparsity, "tokens": tokens, **ratio(lambda: W @ x, lambda: csr @ x)})
        if device() == "cuda" and tokens >= 64:
            from torch.sparse import to_sparse_semi_structured
            half, y = W.half(), x.half()
            semi = to_sparse_semi_structured(two_of_four(half))
            rows.append({"how": "2:4, torch semi-structured", "sparsity": 0.5, "tokens": tokens, **ratio(lambda: half @ y, lambda: semi @ y)})
    return rows


def sizes() -> list[dict]:
    """Bytes of the starter's prunable weights in bfloat16, as shares of dense; zlib at its default."""
    model, _ = load_model("starter", device="cpu")
    rows, weights = [], [m.weight.detach() for m in prunable_linears(model).values()]
    dense = 2 * sum(w.numel() for w in weights)

    def compressed(tensors):
        return sum(len(zlib.compress(t.bfloat16().view(torch.int16).numpy().astype(np.int16).tobytes())) for t in tensors)

    whole = compressed(weights)
    for sparsity in (0.5, 0.7, 0.9):
        zeroed = [magnitude_pruned(w, sparsity) for w in weights]
        kept = sum(int((z != 0).sum()) for z in zeroed)
        mask = sum(pack(z != 0).numel() for z in zeroed)
        csr = kept * (2 + 4) + 4 * sum(z.shape[0] + 1 for z in zeroed)
        rows.append({"sparsity": sparsity, "dense with zeros": 1.0, "kept weights + packed mask": (2 * kept + mask) / dense, "CSR, 32-bit indices": csr / dense,
                     "zlib of the dense weights": whole / dense, "zlib of the zeroed weights": compressed(zeroed) / dense, "bytes dense": dense})
    return rows


def walk_cost(name: str, dtype: str) -> dict:
    """Processor seconds of the dual walk with all it needs, against SparseGPT on the same two sets: 64 × 128 tokens each, 60 %."""
    model, tokenizer = load_model(name, device="cpu", dtype=dtype)
    general, domain = (load_calibration(name, tokenizer, 64, 128) for name in ("general", "legal"))

    def counted(task):
        start = time.process_time()
        return task(), time.process_time() - start

    _, baseline = counted(lambda: sparsegpt(model, [general, domain], 0.6))
    of_general, shared = counted(lambda: fisher_diagonal(model, fisher_batches(general)))
    of_domain, own = counted(lambda: fisher_diagonal(model, fisher_batches(domain)))
    fishers = [of_domain, of_general]
    _, walk = counted(lambda: compensate_walk(model, [general, domain], mixed_fisher(fishers), allotted(model, fishers, 0.6), refined=RunConfig().refine))
    return {"sparsegpt": baseline, "walk": walk, "fisher of the domain": own, "fisher of the open domain": shared,
            "ratio": (walk + own) / baseline, "ratio with both": (walk + own + shared) / baseline}


def main(row) -> None:
    """Measure, print a row for each figure, and keep all of them."""
    models = {"starter": ("starter", "float32")} | ({"smollm2": (str(smollm2.FOLDER), "bfloat16")} if smollm2.FOLDER.is_dir() else {})
    found = {"machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {device()}",
             "shape": list(SHAPE), "products": products(), "bytes": sizes(), "walk": {name: walk_cost(*how) for name, how in models.items()}}
    for r in found["products"]:
        row(f"{r['how']}, {r['sparsity']:.0%} zeros, {r['tokens']} token(s)", f"dense {SHAPE[0]} × {SHAPE[1]}",
            f"{r['value']:.2f}× as fast ({r['low']:.2f} to {r['high']:.2f})", "told")
    for r in found["bytes"]:
        row(f"starter at {r['sparsity']:.0%}, kept weights + packed mask", "dense bytes", f"{r['kept weights + packed mask']:.2f}×", "told")
    for name, walk in found["walk"].items():
        row(f"dual walk of {name} and the domain's Fisher, processor seconds", f"SparseGPT ({walk['sparsegpt']:.1f} s)", f"{walk['ratio']:.2f}×", "≤ 2×")
    write_json(STORED, found)

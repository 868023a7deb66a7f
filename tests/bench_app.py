"""The benchmarks of the app: what a change of the selection costs the server, on a run of the starter and on one with the shapes of LLaMA-2-7B."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

MAIN = str(Path(__file__).parents[1] / "app" / "main.py")
SEEN = ("layers", "overlap", "similarity", "explore", "results")
LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
         "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}   # LLaMA-2-7B, 32 blocks
BLOCKS = 32
FLOOR, BIN = 1 / 3, 256


def opened(view: str, **selection):
    """(the page drawn, seconds it took)."""
    from streamlit.testing.v1 import AppTest
    page = AppTest.from_file(MAIN, default_timeout=300)
    page.switch_page(f"views/{view}.py")
    return changed(page, **selection)


def changed(page, **selection):
    """The page drawn anew with other values of its widgets, and the seconds that took the server; a page with an error does not count."""
    for key, value in selection.items():
        page.session_state[key] = value
    start = time.perf_counter()
    page.run()
    seconds = time.perf_counter() - start
    problems = [e.value for e in page.error] + [e.message for e in page.exception]
    if problems:
        raise RuntimeError(f"{selection}: {problems[0]}")
    return page, seconds


def largest_figure(page) -> int:
    """Bytes of the largest figure of a page, as sent to the browser."""
    return max((len(e.proto.spec) for e in page.get("plotly_chart")), default=0)


# ---- a finished run of the starter


def small(row) -> None:
    """The demonstration run; every value is new to the app, so nothing comes from its cache."""
    from app import demo, state
    from dpruner import pipeline
    with tempfile.TemporaryDirectory() as folder:
        state.RUNS, state.CACHE = Path(folder, "runs"), Path(folder, "cache")
        pipeline.run(demo.CONFIG, runs=state.RUNS, cache=state.CACHE)
        changes = [{"sparsity": 61}, {"sparsity": 33}, {"block": 3}, {"module": "mlp.up_proj"}, {"domain": "legal"}, {"sparsity": 72},
                   {"method": "magnitude"}, {"method": "dpruner", "domain": "healthcare"}, {"block": 6}, {"sparsity": 15}]
        for view in SEEN:
            page, _ = opened(view)
            figures, seconds = [largest_figure(page)], []
            for change in changes:
                page, took = changed(page, **change)
                seconds.append(took)
                figures.append(largest_figure(page))
            row(f"page {view.capitalize()}, a change of the selection, starter", f"the slowest of {len(seconds)}: {max(seconds) * 1e3:.0f} ms",
                f"median {statistics.median(seconds) * 1e3:.0f} ms", "≤ 300 ms")
            row(f"page {view.capitalize()}, its largest figure", "2 MB", f"{max(figures) / 1e3:.0f} kB", "≤ 2 MB")


# ---- a run with the shapes of LLaMA-2-7B


def shapes() -> dict[str, tuple[int, int]]:
    """{matrix: (out, in)} of LLaMA-2-7B's prunable weights, 6.5 billion."""
    return {f"model.layers.{b}.{module}.weight": shape for b in range(BLOCKS) for module, shape in LLAMA.items()}


def write_large(runs: Path) -> None:
    """A finished run of two domains with random ranks, written as the pipeline writes it."""
    from safetensors.numpy import save_file

    from dpruner import RunConfig, store
    from dpruner.stats import in_parts
    run = store.new_run(runs, "llama-2-7b-shapes")
    config = RunConfig(model="meta-llama/Llama-2-7b-hf", domains=("healthcare", "legal"), methods=("dpruner",), evaluate=False, halves=False)
    weights = sum(map(math.prod, shapes().values()))
    store.write_json(run.folder / "run.json", {
        "config": config.to_dict(), "created": "2024-01-01T00:00:00+0000", "versions": {}, "calibration": {}, "device": {"precision": "float16"},
        "model": {"class": "LlamaForCausalLM", "fingerprint": "synthetic", "prunable_weights": weights, "weights": weights, "skipped": {},
                  "transposed": [], "heads": {n: ["column" if "o_proj" in n else "row", 128] for n in shapes() if "self_attn" in n}}})
    for kind in ("masks", "ranks", "edges"):
        (run.folder / kind).mkdir()
    tables = {}
    for number, (method, domain) in enumerate(itertools.product(("dpruner", "general", "domain"), config.domains)):
        rng, ranks, masks, edges = np.random.default_rng(number), {}, {}, {}
        for name, (out, into) in shapes().items():
            found = np.frombuffer(rng.bytes(out * into), np.uint8).reshape(out, into)
            ranks[name], edges[name] = found, np.sort(rng.random(BIN + 1, dtype=np.float32))
            if method == "dpruner":
                kept = found >= BIN // 2
                masks[name] = np.packbits(kept, axis=-1, bitorder="little")
                tables.setdefault(domain, []).append(counted(name, kept))
        save_file(ranks, run.path("ranks", method, domain))
        save_file(edges, run.path("edges", method, domain))
        if masks:
            save_file(masks, run.path("masks", method, domain), {"shapes": json.dumps(shapes())})
    store.write_tables(run.folder / "stats.parquet", (in_parts(pd.concat(tables[d], ignore_index=True), method=("dpruner", config.methods),
                                                               domain=(d, config.domains)) for d in sorted(tables)))
    exact = [("dpruner", "healthcare", "legal", "jaccard", FLOOR), ("dpruner", "healthcare", "legal", "jaccard floor", FLOOR)]
    store.write_table(run.folder / "metrics.parquet", pd.DataFrame(
        [(*e, math.nan, math.nan, weights) for e in exact], columns=["method", "domain", "text", "metric", "value", "low", "high", "n"]))
    store.write_json(run.folder / "status.json", {"state": "done", "stage": "", "about": "", "done": 1, "total": 1, "progress": 1.0,
                                                  "eta_seconds": 0.0, "elapsed_seconds": 1.0, "error": None, "pid": None})


def counted(name: str, kept: np.ndarray) -> pd.DataFrame:
    """Rows of stats.parquet of one matrix, as `dpruner.stats` makes them."""
    from dpruner.stats import _part
    parts = {"matrix": kept.reshape(1, -1), "row": kept, "column": kept.T}
    if "self_attn" in name:
        turned = kept.T if "o_proj" in name else kept
        parts["head"] = turned.reshape(32, -1)
    return pd.concat([_part(name, part, bits, np.ones((len(bits), 1), np.float32)).assign(weights=bits.shape[1]) for part, bits in parts.items()])


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of all files, so that they are read from the disk again."""
    os.sync()
    for path in folder.rglob("*.*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Memory(threading.Thread):
    """The largest resident memory of this process while it works, without the pages of files that only happen to be mapped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest = 0
        self.start()

    def run(self):
        process = psutil.Process()
        while True:
            found = process.memory_info()
            self.largest = max(self.largest, found.rss - found.shared)
            time.sleep(0.02)


def visit_large(runs: Path, results) -> None:
    """One process from its start: every page on the large run, cold, and the memory it took."""
    from app import state
    state.RUNS, state.CACHE = runs, runs.parent / "cache"
    memory, found = Memory(), {}
    opened("generate")   # the libraries
    forget(runs)
    _, found["similarity"] = opened("similarity")
    forget(runs)
    page, found["layers"] = opened("layers")
    page, _ = opened("explore")
    moves = [{"explore-row": 640, "explore-column": 1280}, {"block": 17}, {"module": "mlp.down_proj"}, {"explore-row": 4000, "explore-column": 10000},
             {"domain": "legal"}, {"sparsity": 70}, {"block": 31}]
    for number, move in enumerate(moves):
        page, found[f"tile {number} {move}"] = changed(page, **move)
    found["memory"] = memory.largest
    results.put(found)


def large(row) -> None:
    """6.5 billion weights, synthetic."""
    with tempfile.TemporaryDirectory() as folder:
        write_large(Path(folder, "runs"))
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=visit_large, args=(Path(folder, "runs"), results))
        process.start()
        found = results.get(timeout=600)
        process.join()
    tiles = [seconds for what, seconds in found.items() if what.startswith("tile")]
    row("page Similarity, two masks of 6.5 billion weights, cold", "4 s", f"{found['similarity']:.1f} s", "≤ 4 s")
    row("page Layers, 6.5 billion weights, cold", "2 s", f"{found['layers']:.1f} s", "≤ 2 s")
    row(f"page Explore, 6.5 billion weights, {len(tiles)} moves", f"the slowest: {max(tiles) * 1e3:.0f} ms",
        f"median {statistics.median(tiles) * 1e3:.0f} ms", "≤ 300 ms")
    row("memory of the app on 6.5 billion weights", "2 GB", f"{found['memory'] / 1e9:.2f} GB", "≤ 2 GB")

"""Estimated against measured peak memory of whole runs, each a process of its own; part of the benchmarks."""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTJConfig, LlamaConfig

from dpruner import RunConfig, estimate, loading, memory, peak, pipeline, starter, store

ROOT = Path(__file__).parents[1]
BASE = RunConfig(domains=("legal",), nsamples=4, seqlen=128, eval_documents=1, eval_seqlen=256, halves=False, general_mode="static", device="cpu")
STARTER = {"balanced": {}, "taylor, two domains, halves": {"formula": "taylor", "domains": ("legal", "finance"), "halves": True},
           "512 tokens": {"seqlen": 512}, "fine-tuning": {"finetune": True, "epochs": 1, "seqlen": 512}, "compensate after": {"compensate": "after"},
           "walk": {"compensate": "walk"}}
TEN = {"balanced": {}, "balanced, at most 720MB": {"memory": "720MB"}, "release, fine-tuning, at most 1GB": {"formula": "release", "finetune": True, "epochs": 1, "memory": "1GB"},
       "halves, compensate after, at most 820MB": {"halves": True, "compensate": "after", "memory": "820MB"}}


LLAMA = {"vocab_size": 8192, "max_position_embeddings": 1024}
SHAPES = {   # of random weights, with the starter's tokenizer; no constant of the estimate was set by any but the first
    "ten times the starter": LlamaConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2304, num_attention_heads=12,
                                         num_key_value_heads=12, tie_word_embeddings=True, **LLAMA),
    "deep": LlamaConfig(hidden_size=512, num_hidden_layers=12, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=8, **LLAMA),
    "wide": LlamaConfig(hidden_size=1280, num_hidden_layers=3, intermediate_size=3456, num_attention_heads=10, num_key_value_heads=2,
                        tie_word_embeddings=True, **LLAMA),
    "small": LlamaConfig(hidden_size=128, num_hidden_layers=8, intermediate_size=344, num_attention_heads=4, num_key_value_heads=4, **LLAMA),
    "gpt2": GPT2Config(n_embd=640, n_layer=8, n_head=10, vocab_size=8192, n_positions=512),
    "gptj": GPTJConfig(n_embd=512, n_layer=8, n_head=8, rotary_dim=32, vocab_size=8192, n_positions=1024),   # its attention is not fused
}
KINDS = {"ten times the starter": TEN,
         "deep": {"walk": {"compensate": "walk", "general_mode": "sequential"}, "walk, at most 560MB": {"compensate": "walk", "memory": "560MB"},
                  "global, 1,024 tokens": {"granularity": "global", "seqlen": 1024},
                  "compensate after, 1,024 tokens, at most 750MB": {"compensate": "after", "seqlen": 1024, "evaluate": False, "memory": "750MB"}},
         "wide": {"walk": {"compensate": "walk", "evaluate": False},
                  "walk, bfloat16": {"compensate": "walk", "dtype": "bfloat16", "evaluate": False}, "taylor, 512 tokens": {"formula": "taylor", "seqlen": 512},
                  "walk, bfloat16, at most 1400MB": {"compensate": "walk", "dtype": "bfloat16", "evaluate": False, "memory": "1400MB"}},
         "gpt2": {"compensate after": {"compensate": "after"},
                  "halves, two domains, compensate after": {"methods": ("dpruner", "wanda"), "domains": ("legal", "finance"), "halves": True,
                                                            "compensate": "after"},
                  "wanda and random, 512 tokens": {"methods": ("wanda", "random"), "seqlen": 512, "evaluate": False},
                  "release, fine-tuning, at most 850MB": {"formula": "release", "finetune": True, "epochs": 1, "seqlen": 256, "memory": "850MB"}},
         "gptj": {"taylor, 1,024 tokens": {"formula": "taylor", "seqlen": 1024, "evaluate": False},
                  "balanced, 1,024 tokens, evaluated": {"seqlen": 1024, "eval_seqlen": 1024}}}
PLAYED = {"balanced": {}, "taylor": {"formula": "taylor"}, "release, fine-tuning": {"formula": "release", "finetune": True, "epochs": 1},
          "walk": {"compensate": "walk", "general_mode": "sequential", "refine": 1}}


def random_model(name: str, folder: Path) -> Path:
    """A model of random weights of one of SHAPES, in a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[name]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter.PATH).save_pretrained(folder)
    return folder


def own_memory(pid: int) -> int:
    """Bytes that belong to a process alone; pages of files, which the system can drop, are not counted (Linux). 0 for one that has ended."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def peak_of(config: RunConfig, folder: Path) -> int:
    """Most memory that belonged to the process of a run alone, in bytes."""
    store.write_json(folder / "config.json", config.to_dict())
    process = subprocess.Popen([sys.executable, "-m", "dpruner", "prune", "--config", str(folder / "config.json"), "--runs", str(folder / "runs"),
                                "--cache", str(folder / "cache"), "--json"], cwd=ROOT, env={**os.environ, "DPRUNER_QUEUE": str(folder / "queue")},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    return peak


@contextlib.contextmanager
def on_played_card():
    """An accelerator that the CPU plays, see card.py, and a folder for its runs."""
    import card

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.dict(os.environ, {"DPRUNER_QUEUE": f"{folder}/queue"}))
        for module in (pipeline, estimate, loading):
            patched.enter_context(mock.patch.object(module, "pick_device", lambda device: card.DEVICE))
        yield Path(folder)


def played(row):
    """A row for each kind of run on an accelerator that the CPU plays, without a limit and with all that saves memory there."""
    import card

    with on_played_card() as folder, mock.patch.object(memory, "SMALLEST", 2**12):
        model = random_model("small", folder / "small")
        for number, (kind, changes) in enumerate(PLAYED.items()):
            config = dataclasses.replace(BASE, model=str(model), seqlen=64, dtype="float32", evaluate=False, **changes)
            for plan in (memory.Plan(), memory.Plan(outside=True, offload=True, passes=4)):
                told = estimate.peak_memory(config, loading.blank_model(str(model)), "cuda", plan)
                needed = sum(size for what, size in told.items() if what != "program") / peak.SPARE   # no context, no allocator
                with card.present() as at_card, mock.patch.object(estimate, "plan_of", lambda *_, plan=plan: plan):
                    pipeline.run(config, runs=f"{folder}/runs", cache=f"{folder}/{number} {plan.offload}")
                row(f"played accelerator, {kind}, {'offloaded, 4 passes' if plan.offload else 'no limit'}: {at_card.peak / 1e6:.2f} MB",
                    f"told before: {needed / 1e6:.2f} MB", f"{needed / at_card.peak - 1:+.0%}", "± 20 %")


def hosts(row):
    """A row for each kind of run whose weights and scores wait on the host of such an accelerator, or in files there."""
    for kind, dtype, files in (("balanced", "float32", False), ("balanced", "float32", True), ("taylor", "bfloat16", False), ("release, fine-tuning", "float32", False)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:   # with nothing of an earlier run in it
            told, peak = process.submit(host_peak, kind, dtype, files).result()
        row(f"host of a played accelerator, {kind}, {dtype}, {'files' if files else 'in memory'}: {peak / 1e6:.0f} MB", f"told before: {told / 1e6:.0f} MB",
            f"{told / peak - 1:+.0%}", "± 20 %")


def host_peak(kind: str, dtype: str, files: bool) -> tuple[int, int]:
    """(bytes that were told of the host, the most that this process had while a run went on, without what is the played accelerator's)."""
    import card

    plan = memory.Plan(outside=True, offload=True, passes=2, files=files)
    torch.set_num_threads(1)
    with on_played_card() as folder:
        config = dataclasses.replace(BASE, model=str(random_model("deep", folder / "deep")), nsamples=2, seqlen=32, dtype=dtype, evaluate=False,
                                     **PLAYED[kind])
        blank = loading.blank_model(config.model)
        waiting = {} if files else estimate.outside(config, blank, "cuda", plan)
        told = sum(estimate.host_memory(config, blank, "cuda", plan).values()) + sum(waiting.values())
        with card.present() as at_card, mock.patch.object(estimate, "plan_of", lambda *_: plan), ThreadPoolExecutor(1) as beside:
            over = threading.Event()
            looked = beside.submit(most_beside, at_card, over)
            try:
                pipeline.run(config, runs=folder / "runs", cache=folder / "cache")
            finally:
                over.set()
    return told, looked.result()


def most_beside(at_card, over: threading.Event) -> int:
    """The most memory of this process, without that of a played accelerator, until something is over; in bytes."""
    most = 0
    while not over.wait(0.01):
        before, own = at_card.used, own_memory(os.getpid())
        most = max(most, own - max(before, at_card.used))   # what it gives back in between is no host's
    return most


def estimates(row):
    """A row for each kind of run, of the starter and of models of other shapes."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"starter": ("starter", STARTER)} | {n: (str(random_model(n, Path(folder) / n)), kinds) for n, kinds in KINDS.items()}
        for what, (name, kinds) in models.items():
            for kind, changes in kinds.items():
                config = dataclasses.replace(BASE, model=name, **changes)
                told = sum(estimate.peak_memory(config, loading.blank_model(name), "cpu").values())
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    peak = peak_of(config, Path(scratch))
                row(f"peak memory, {what}, {kind}: {peak / 1e6:.0f} MB", f"told before: {told / 1e6:.0f} MB", f"{told / peak - 1:+.0%}", "± 20 %")

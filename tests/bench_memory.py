"""Estimated against measured peak memory of whole runs, each a process of its own; part of the benchmarks."""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpruner import RunConfig, estimate, loading, starter, store

ROOT = Path(__file__).parents[1]
BASE = RunConfig(domains=("legal",), nsamples=4, seqlen=128, eval_documents=1, eval_seqlen=256, halves=False, general_mode="static", device="cpu")
STARTER = {"balanced": {}, "taylor, two domains, halves": {"formula": "taylor", "domains": ("legal", "finance"), "halves": True},
           "512 tokens": {"seqlen": 512}, "fine-tuning": {"finetune": True, "epochs": 1, "seqlen": 512}, "compensate after": {"compensate": "after"},
           "walk": {"compensate": "walk"}}
TEN = {"balanced": {}, "balanced, at most 700MB": {"memory": "700MB"}, "release, fine-tuning, at most 1GB": {"formula": "release", "finetune": True, "epochs": 1, "memory": "1GB"},
       "halves, compensate after, at most 800MB": {"halves": True, "compensate": "after", "memory": "800MB"}}


def ten_times_the_starter(folder: Path) -> Path:
    """A model of 129 million random weights with the starter's tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=768, num_hidden_layers=16, intermediate_size=2304, num_attention_heads=12, num_key_value_heads=12,
                                 vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter.PATH).save_pretrained(folder)
    return folder


def peak_of(config: RunConfig, folder: Path) -> int:
    """Most memory that belonged to the process of a run alone, in bytes; pages of files, which the system can drop, are not counted (Linux)."""
    store.write_json(folder / "config.json", config.to_dict())
    process = subprocess.Popen([sys.executable, "-m", "dpruner", "prune", "--config", str(folder / "config.json"), "--runs", str(folder / "runs"),
                                "--cache", str(folder / "cache"), "--json"], cwd=ROOT, env={**os.environ, "DPRUNER_QUEUE": str(folder / "queue")},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        if found := re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            peak = max(peak, 1024 * int(found[1]))
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()
    return peak


def estimates(row):
    """A row for each kind of run, of the starter and of a model ten times as large."""
    with tempfile.TemporaryDirectory() as folder:
        large = ten_times_the_starter(Path(folder) / "model")
        for what, name, kinds in (("starter", "starter", STARTER), ("ten times the starter", str(large), TEN)):
            for kind, changes in kinds.items():
                config = dataclasses.replace(BASE, model=name, **changes)
                told = sum(estimate.peak_memory(config, loading.blank_model(name), "cpu").values())
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    peak = peak_of(config, Path(scratch))
                row(f"peak memory, {what}, {kind}: {peak / 1e6:.0f} MB", f"told before: {told / 1e6:.0f} MB", f"{told / peak - 1:+.0%}", "± 20 %")

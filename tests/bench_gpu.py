"""The benchmark for a GPU: a model with the shapes of LLaMA-2-7B and random weights, general importance and a domain pass.

`python tests/bench_gpu.py` on a machine with CUDA; `--memory 12GB` keeps to a limit, as a run does; `--blocks 2 --device cpu --nsamples 2 --domain 2`
tries the script itself anywhere.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpruner import RunConfig, estimate, memory, obs
from dpruner.domain import domain_importance
from dpruner.general import general_importance
from dpruner.memory import Plan
from dpruner.model import decoder_blocks
from dpruner.offload import offload
from dpruner.walk import checkpointing

SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
          "max_position_embeddings": 4096}


def random_model(blocks: int, device: str, **shapes) -> LlamaForCausalLM:
    """An untrained Llama of these shapes in bfloat16, made on the device itself."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **{**SHAPES, **shapes})).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(nsamples: int, seqlen: int, vocabulary: int) -> list[torch.Tensor]:
    return list(torch.randint(0, vocabulary, (nsamples, seqlen), generator=torch.Generator().manual_seed(0)).split(1))


def timed(device: str, task):
    """(seconds, result), everything the device was given being done."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    result = task()
    wait()
    return time.perf_counter() - start, result


def loop_against_solve(device: str, rows: int, columns: int) -> tuple[float, float]:
    """Seconds of one sweep over a matrix, by this package and by a loop over single columns, half of each block of columns removed."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator).to(device)
    U = (torch.randn(columns, columns, generator=generator).triu(1) * 0.01 + torch.eye(columns)).to(device)

    def choose(W1, d, where):
        return W1.abs() <= W1.abs().median()

    ours, looped = (lambda: obs.sweep(W, U, choose)), (lambda: _sweep_by_columns(W, U, choose))
    ours(), looped()
    return timed(device, ours)[0], timed(device, looped)[0]


def _sweep_by_columns(W, U, choose):
    """The same sweep as SparseGPT's paper writes it: one column after the other."""
    with mock.patch.object(obs, "eliminate", lambda T, P, U, E, base=None: obs._eliminate_by_columns(T, P, U, E)):
        return obs.sweep(W, U, choose)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--nsamples", type=int, default=128, help="sequences of 2,048 tokens of open-domain text, as many as fit")
    parser.add_argument("--domain", type=int, default=1000, help="sequences of 512 tokens of domain text")
    parser.add_argument("--memory", help="such as 12GB: a limit to keep to (default: none)")
    parser.add_argument("--hidden", type=int, default=SHAPES["hidden_size"])
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name(args.device) if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}\n\n| what | figure | wanted |\n|---|---|---|")
    seconds, looped = loop_against_solve(args.device, args.hidden, args.hidden)
    print(f"| sequential OBS, {args.hidden} × {args.hidden}, against a loop over columns ({looped:.2f} s) | {looped / seconds:.1f}× faster | ≥ 5× |")
    config = RunConfig(nsamples=args.nsamples, seqlen=2048, dtype="bfloat16", evaluate=False, memory=args.memory)
    blank = random_model(args.blocks, "meta", hidden_size=args.hidden, intermediate_size=args.hidden * 43 // 16)
    plan = estimate.choose(config, blank, args.device, memory.parse_size(args.memory)) if args.memory else Plan()
    told = estimate.peak_memory(config, blank, args.device, plan)
    print(f"| plan | {plan} | |")
    with tempfile.TemporaryDirectory() as folder, memory.following(plan, Path(folder)), contextlib.ExitStack() as opened:
        model = random_model(args.blocks, "cpu" if plan.offload else args.device, hidden_size=args.hidden, intermediate_size=args.hidden * 43 // 16)
        model = offload(model, torch.device(args.device)) if plan.offload else model
        opened.enter_context(checkpointing(decoder_blocks(model)[1]))
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        first, G = timed(args.device, lambda: general_importance(model, tokens(args.nsamples, 2048, SHAPES["vocab_size"])))
        print(f"| general importance, {args.nsamples} × 2,048 tokens | {first:.0f} s | |")
        second, _ = timed(args.device, lambda: domain_importance(model, tokens(args.domain, 512, SHAPES["vocab_size"]), G, passes=plan.passes))
    print(f"| domain pass, {args.domain} × 512 tokens | {second:.0f} s | |")
    print(f"| together | {(first + second) / 60:.1f} min | {'' if args.memory else '≤ 10 min'} |")
    if cuda:
        print(f"| peak memory, told {sum(told.values()) / 1e9:.1f} GB for a whole run | {torch.cuda.max_memory_allocated(args.device) / 1e9:.1f} GB "
              f"| ≤ {args.memory or '120 GB'} |")


if __name__ == "__main__":
    main()

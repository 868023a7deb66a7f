"""The benchmark for a GPU: a model with the shapes of LLaMA-2-7B and random weights, general importance and a domain pass.

`python tests/bench_gpu.py` on a machine with CUDA; `--memory 12GB` keeps to a limit, as a run does; `--tiny --device cpu` tries the script itself anywhere.
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

FULL = {"hidden": 4096, "blocks": 32, "nsamples": 128, "domain": 1000, "seqlen": 2048, "vocab_size": 32000}
TINY = {"hidden": 128, "blocks": 2, "nsamples": 2, "domain": 3, "seqlen": 128, "vocab_size": 512}


def random_model(blocks: int, device: str, **shapes) -> LlamaForCausalLM:
    """An untrained Llama of these shapes in bfloat16, made on the device itself."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, num_attention_heads=32, max_position_embeddings=4096, **shapes)).eval()
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


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, help="(default: 32)")
    parser.add_argument("--nsamples", type=int, help="sequences of 2,048 tokens of open-domain text (default: 128, as many as fit)")
    parser.add_argument("--domain", type=int, help="sequences of 512 tokens of domain text (default: 1,000)")
    parser.add_argument("--memory", help="such as 12GB: a limit to keep to (default: none)")
    parser.add_argument("--hidden", type=int, help="(default: 4,096)")
    parser.add_argument("--tiny", action="store_true", help="a model and texts of next to nothing, to try the script itself")
    args = parser.parse_args(arguments)
    usual = TINY if args.tiny else FULL
    blocks, nsamples, domain, hidden = (getattr(args, name) or usual[name] for name in ("blocks", "nsamples", "domain", "hidden"))
    length, shorter, vocabulary = usual["seqlen"], usual["seqlen"] // 4, usual["vocab_size"]
    shapes = {"hidden_size": hidden, "intermediate_size": hidden * 43 // 16, "vocab_size": vocabulary}
    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name(args.device) if cuda else args.device
    print(f"{name}, torch {torch.__version__}\n\n| what | figure | wanted |\n|---|---|---|")
    seconds, looped = loop_against_solve(args.device, hidden, hidden)
    print(f"| sequential OBS, {hidden} × {hidden}, against a loop over columns ({looped:.2f} s) | {looped / seconds:.1f}× faster | ≥ 5× |")
    config = RunConfig(nsamples=nsamples, seqlen=length, dtype="bfloat16", evaluate=False, memory=args.memory)
    blank = random_model(blocks, "meta", **shapes)
    plan = Plan()
    if args.memory:
        plan = estimate.placed(estimate.choose(config, blank, args.device, memory.parse_size(args.memory)), config, blank, args.device)
    told = estimate.peak_memory(config, blank, args.device, plan)
    print(f"| plan | {plan} | |")
    with tempfile.TemporaryDirectory() as folder, memory.following(plan, Path(folder)), contextlib.ExitStack() as opened:
        model = random_model(blocks, "cpu" if plan.offload else args.device, **shapes)
        model = offload(model, torch.device(args.device)) if plan.offload else model
        opened.enter_context(checkpointing(decoder_blocks(model)[1]))
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        first, G = timed(args.device, lambda: general_importance(model, tokens(nsamples, length, vocabulary)))
        print(f"| general importance, {nsamples:,} × {length:,} tokens | {first:.0f} s | |")
        second, _ = timed(args.device, lambda: domain_importance(model, tokens(domain, shorter, vocabulary), G, passes=plan.passes))
    print(f"| domain pass, {domain:,} × {shorter:,} tokens | {second:.0f} s | |")
    print(f"| together | {(first + second) / 60:.1f} min | {'' if args.memory else '≤ 10 min'} |")
    print(f"| what waits outside, told | {sum(estimate.outside(config, blank, args.device, plan).values()) / 1e9:.1f} GB | |")
    if cuda:
        print(f"| peak memory, told {sum(told.values()) / 1e9:.1f} GB for a whole run | {torch.cuda.max_memory_allocated(args.device) / 1e9:.1f} GB "
              f"| ≤ {args.memory or '120 GB'} |")


if __name__ == "__main__":
    main()

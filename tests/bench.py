"""The benchmarks: `make bench` prints docs/BENCHMARKS.md.

Every figure is a ratio against a named alternative measured in the same run, so that it means the same on another machine.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_app
import bench_learn
import bench_memory
import bench_speed
import plain
import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from dpruner.calibration import load_calibration
from dpruner.domain import consumed_gradients, domain_importance, next_token_loss
from dpruner.general import SPARSITY, general_importance, release_cut, saliency, sweep_group
from dpruner.loading import load_model
from dpruner.model import prunable_linears
from dpruner.walk import walk

ROOT = Path(__file__).parents[1]


def best(task, repeats=3):
    """Seconds of the fastest of some runs, after one that warms up, and what the last returned."""
    task()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = task()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def random_llama(hidden, blocks, intermediate, vocabulary=8192):
    """An untrained Llama on the CPU, float32, of the starter's make."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=hidden, num_hidden_layers=blocks, intermediate_size=intermediate, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=vocabulary, max_position_embeddings=512, tie_word_embeddings=True)).eval()


def tokens(nsamples, seqlen=128, vocabulary=8192):
    return list(torch.randint(0, vocabulary, (nsamples, seqlen), generator=torch.Generator().manual_seed(0)).split(1))


def row(what, alternative, ratio, wanted):
    print(f"| {what} | {alternative} | {ratio} | {wanted} |", flush=True)


# ---- general importance


def general():
    """Speed and sameness against the straightforward version."""
    model, tokenizer = load_model("starter", device="cpu")
    half, _ = load_model("starter", device="cpu", dtype="bfloat16")
    batches = load_calibration("general", tokenizer)
    slow, _ = best(lambda: plain.general_importance(model, batches))
    fast, _ = best(lambda: general_importance(model, batches))
    row("general importance, float32", f"straightforward ({slow:.2f} s)", f"{slow / fast:.2f}× faster", "≥ 1.5×")
    faster, _ = best(lambda: general_importance(half, batches))
    row("general importance, bfloat16 forward", f"straightforward in float32 ({slow:.2f} s)", f"{slow / faster:.2f}× faster", "≥ 2.5×")
    for what, figure in sameness(model, batches).items():
        row(what, "straightforward", *figure)


def sameness(model, batches):
    """Whether the fast walk computes what the straightforward one does.

    Which of two equal scores is removed hangs on the last bit, and all that follows in the walk hangs on that. So all walks are made to take
    the straightforward one's decisions, and their scores are compared with the same walk in float64; the fast walk's own decisions may differ
    only where scores tie.
    """
    decisions, differing, worst = {}, 0, 0.0
    straightforward = plain.general_importance(model, batches, decisions=decisions)

    def led(model):
        """G of a walk that takes the straightforward one's decisions."""
        G = {}

        def visit(rows, hessians):
            def choose(name, W1, d, columns):
                G.setdefault(name, []).append(saliency(W1, d))
                count(G[name][-1], decisions[name][:, columns])
                return decisions[name][:, columns]
            return sweep_group(rows, hessians[0].mean(), choose)[0]

        walk(model, [batches], visit)
        return {n: torch.cat(g, 1) for n, g in G.items()}

    def count(scores, theirs):
        nonlocal differing, worst
        mine = release_cut(scores, SPARSITY)
        if (mine ^ theirs).any():
            threshold = scores[mine].max()
            differing += int((mine ^ theirs).sum())
            worst = max(worst, float(((scores[mine ^ theirs] - threshold).abs() / threshold).max()))

    def off(G):
        return max(float((G[n] - g).norm() / g.norm()) for n, g in exact.items())

    fast, counted = led(model), (differing, worst)
    exact = led(load_model("starter", device="cpu", dtype=torch.float64)[0])
    total = sum(m.weight.numel() for m in prunable_linears(model).values())
    return {"G, its matrix furthest from the same walk in float64, in units of its norm": (f"{off(fast):.1e}; straightforward {off(straightforward):.1e}", "1e-5"),
            "decisions of the walk that differ": (f"{counted[0]} of {total:,}, within {counted[1]:.0e} of the threshold", "ties only")}


# ---- domain pass


def plain_passes(model, batches):
    """Forward and backward for the same weights, each gradient freed as soon as it is complete, nothing scored."""
    for p in model.parameters():
        p.requires_grad_(False)
    with consumed_gradients({n: m.weight for n, m in prunable_linears(model).items()}, lambda name, g: None):
        for ids in batches:
            next_token_loss(model, ids).backward()


def domain():
    """Overhead of scoring over plain passes."""
    for what, model, batches in (("starter, 64 × 128 tokens", load_model("starter", device="cpu")[0], tokens(64)),
                                 ("ten times the starter, 16 × 512 tokens", random_llama(768, 16, 2304), tokens(16, 512))):
        G = general_importance(model, batches[:2], mode="static")
        bare, _ = best(lambda: plain_passes(model, batches), 2)
        scored, _ = best(lambda: domain_importance(model, batches, G), 2)
        row(f"domain pass, {what}", f"forward + backward ({bare / len(batches) * 1000:.0f} ms a batch)", f"{scored / bare - 1:+.1%} time", "≤ +15 %")


def peak(task):
    """Largest number of bytes of tensors that the task had allocated at once, counted allocation by allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        task()
    held = highest = 0
    for event in sorted((e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def memory():
    """Peak of the whole domain pass above the weights, over what plain passes need and the accumulators that the formula keeps."""
    for what, model in (("starter", load_model("starter", device="cpu")[0]), ("ten times the starter", random_llama(768, 16, 2304))):
        batches = tokens(2)
        G = general_importance(model, batches, mode="static")
        sizes = [4 * m.weight.numel() for m in prunable_linears(model).values()]
        for formula, accumulators in (("balanced", 2), ("taylor", 3)):   # what is handed back, .dual and .domain, among them
            bare = peak(lambda: plain_passes(model, batches))   # activations and one gradient
            scored = peak(lambda: domain_importance(model, batches, G, formula))
            extra = (scored - bare - accumulators * sum(sizes)) / max(sizes)
            row(f"domain pass, {what}, {formula}: {scored / 1e6:.0f} MB above the weights",
                f"{accumulators} accumulators ({accumulators * sum(sizes) / 1e6:.0f} MB), activations and one gradient ({bare / 1e6:.0f} MB)",
                f"{extra:+.2f} × the largest gradient", "≤ +0.3")


# ---- cost


def linear_cost():
    """Time at 1×, 2× and 4× the tokens and the blocks."""
    model, _ = load_model("starter", device="cpu")
    for what, task in (("general importance", lambda b: general_importance(model, b)),
                       ("domain pass", lambda b, G=general_importance(model, tokens(4), mode="static"): domain_importance(model, b, G))):
        seconds = [best(lambda n=n: task(tokens(n)), 2)[0] for n in (32, 64, 128)]
        row(f"{what}, 1× · 2× · 4× the tokens", f"1× ({seconds[0]:.2f} s)", " · ".join(f"{s / seconds[0]:.2f}×" for s in seconds), "linear")
    for what, blocks_task in (("general importance", lambda m, b: general_importance(m, b)),
                              ("domain pass", lambda m, b: domain_importance(m, b, general_importance(m, b[:1], mode="static")))):
        seconds = []
        for blocks in (4, 8, 16):
            model = random_llama(320, blocks, 864)
            seconds.append(best(lambda m=model: blocks_task(m, tokens(32)), 2)[0])
        row(f"{what}, 1× · 2× · 4× the blocks", f"1× ({seconds[0]:.2f} s)", " · ".join(f"{s / seconds[0]:.2f}×" for s in seconds), "linear")


def demo():
    """`make demo` after set-up, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dpruner", "prune", "--domain", "healthcare", "--domain", "legal", "--method", "dpruner", "--method",
                        "magnitude", "--method", "random", "--runs", f"{folder}/runs", "--cache", f"{folder}/cache", "--json"],
                       cwd=ROOT, check=True, capture_output=True)
        row("`make demo`", "one minute", f"{time.perf_counter() - start:.0f} s", "≤ 60 s")


PARTS = {"general": general, "domain": domain, "memory": memory, "cost": linear_cost, "demo": demo,
         "budget": lambda: bench_memory.estimates(row), "card": lambda: bench_memory.played(row), "host": lambda: bench_memory.hosts(row), "app": lambda: bench_app.small(row), "learn": lambda: bench_learn.lesson(row),
         "large": lambda: bench_app.large(row), "speed": lambda: bench_speed.main(row)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which to run: {', '.join(PARTS)} (default: all)")
    parts = parser.parse_args().parts or PARTS
    print("# Benchmarks\n\nPrinted by `make bench`. Every figure is measured against the alternative named beside it, in the same run.\n")
    print(f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
          f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | against | figure | wanted |\n|---|---|---|---|")
    for part in parts:
        PARTS[part]()


if __name__ == "__main__":
    main()

"""A run that keeps to a limit of memory: the same bits, in as much memory as it was allowed, or a sentence that says why not."""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save
from families import tiny, tiny_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import content
from transformers import LlamaConfig, LlamaForCausalLM

from dpruner import InputError, RunConfig, cli, domain_importance, estimate, general_importance, loading, memory, peak, pipeline
from dpruner.domain import fisher_diagonal, stream_gradients
from dpruner.memory import Plan, parse_size
from dpruner.model import decoder_blocks
from dpruner.walk import checkpointing

ROOT = Path(__file__).parents[1]
SPARING = Plan(outside=True, files=True, checkpointing=True, passes=3)


@given(st.integers(1, 10**9), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "B", "b"]), st.sampled_from(["", " "]))
@settings(deadline=None, database=None)
def test_sizes_are_read_as_people_write_them(number, unit, byte, space):
    assert parse_size(f"{number}{space}{unit}{byte}") == number * 1000 ** ["", "K", "M", "G", "T"].index(unit)
    assert parse_size(f" {number}{unit.lower()}i{byte}" if unit else f"{number}") == number * 1024 ** ["", "K", "M", "G", "T"].index(unit)


@pytest.mark.parametrize("words", ["", "GB", "-1GB", "0GB", "1e9", "1 G B", "16 gigs", "nan", "inf", "9" * 40, "1GBB", "١GB", "0x10"])
def test_what_is_no_size_is_refused(words):
    with pytest.raises(InputError, match="amount such as 16GB"):
        RunConfig(memory=words).check()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Everything lives outside, however small; the folder it lives in."""
    monkeypatch.setattr(memory, "SMALLEST", 0)
    with memory.following(SPARING, tmp_path / "files"):
        yield tmp_path / "files"


def test_tensors_outside_lie_in_files_that_have_no_name(outside):
    a, b = torch.arange(6.0).view(2, 3), memory.zeros(torch.ones(2, 3), torch.bool)
    for tensor, expected in ((memory.copied(a), a), (memory.kept(a), a), (b, torch.zeros(2, 3, dtype=torch.bool))):
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
        assert tensor.untyped_storage().filename.startswith(str(outside)) and tensor.is_contiguous()
    assert memory.kept(b) is b and not any(outside.iterdir())
    assert memory.copied(torch.ones(0, 3)).shape == (0, 3)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(outside):
    with pytest.raises(OSError):
        memory.zeros(torch.zeros(1).expand(2**57))


RUNS = {"after": {"methods": ("dpruner", "wanda", "random"), "compensate": "after"}, "walk": {"methods": ("dpruner", "sparsegpt"), "compensate": "walk"},
        "finetune": {"methods": ("dpruner", "magnitude"), "formula": "release", "finetune": True, "epochs": 1, "granularity": "global"}}


@pytest.mark.parametrize(("name", "dtype"), [("after", "float32"), ("walk", "bfloat16"), ("finetune", "float32")])
def test_a_sparing_run_ends_with_the_same_bits(name, dtype, llama, tmp_path, monkeypatch):
    config = RunConfig(model=str(llama), domains=("legal",), **SMALL | {"device": "cpu", "dtype": dtype} | RUNS[name])
    usual = pipeline.run(config, runs=tmp_path / "usual", cache=tmp_path / "cache of usual")
    monkeypatch.setattr(memory, "SMALLEST", 0)
    monkeypatch.setattr(estimate, "plan_of", lambda *_: SPARING)
    sparing = pipeline.run(config, runs=tmp_path / "sparing", cache=tmp_path / "cache of sparing")
    assert content(sparing) == content(usual) and not list(tmp_path.rglob(".outside*"))


@pytest.mark.parametrize("passes", [2, 3, 1000])
@pytest.mark.parametrize("formula", ["balanced", "taylor", "release"])
def test_several_passes_score_the_same_bits(formula, passes):
    model, batches = tiny("llama"), tiny_batches(3)
    G, told = general_importance(model, batches, mode="static"), []
    one, several = (domain_importance(model, batches, G, formula, passes=n, progress=lambda *step: told.append(step)) for n in (1, passes))
    for a, b in ((one.dual, several.dual), (one.domain, several.domain)):
        assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    told = told[4:]
    assert [step for _, step, _ in told if step] == sorted(step for _, step, _ in told if step) and told[-1][1] == told[-1][2] and told[0][1] == 0
    assert sum(step == 0 for _, step, _ in told) == 1
    f, g = (fisher_diagonal(model, batches, passes=n) for n in (1, passes))
    assert all(torch.equal(f[n], g[n]) for n in f)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])   # two of them would drop out in training mode
def test_checkpointing_gives_the_same_gradients_and_leaves_the_model_as_it_was(family, tmp_path):
    model, batches = tiny(family), tiny_batches(2)

    def gradients():
        found = []
        stream_gradients(model, batches, lambda name, g, part: found.append((name, g.clone())), stage="")
        return found

    calls, block = [], decoder_blocks(model)[1][0]
    block.register_forward_hook(lambda *_: calls.append(1))
    usual = gradients()
    with memory.following(SPARING, tmp_path), checkpointing(decoder_blocks(model)[1]):
        assert "forward" in block.__dict__
        sparing = gradients()
    assert len(usual) == len(sparing) and "forward" not in block.__dict__
    order = dict.fromkeys(name for name, _ in usual)
    for name in order:
        assert all(torch.equal(a, b) for a, b in zip([g for n, g in usual if n == name], [g for n, g in sparing if n == name], strict=True))


CHILD = """
import ctypes, gc, sys
from pathlib import Path
import torch
from dpruner import domain_importance, general_importance, load_model, make_masks, memory, pipeline, pruned, store

folder = Path(sys.argv[1])
with memory.following(memory.Plan(outside=True, files=True, checkpointing=True), folder), torch.no_grad():
    load_model("starter", device="cpu")   # what libraries set up at their first use
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    sys.stdin.readline()
    model, _ = load_model(str(folder / "model"), device="cpu")
    batches = list(torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(0)).split(1))
    G = general_importance(model, batches, mode="static")
    with torch.enable_grad():
        S = domain_importance(model, batches, G)
    masks = make_masks(S.dual, 0.5)
    run = store.new_run(folder, "run")
    pipeline.save_ranks(run, "dpruner", "legal", S.dual)
    store.write_masks(run.path("masks", "dpruner", "legal"), masks)
    with pruned(model, masks):
        model(input_ids=batches[0])
    total = sum(4 * p.numel() for p in model.parameters()) + sum(4 * s.numel() for scores in (G, S.dual, S.domain) for s in scores.values())
    print(total + sum(2 * m.numel() for m in masks.values()))
"""


def own_memory(process: subprocess.Popen) -> int:
    """Bytes that belong to a process alone now; pages of files, which the system can drop, are not counted (Linux)."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_several_times_its_memory_is_loaded_and_pruned(tmp_path):
    save(LlamaForCausalLM(LlamaConfig(hidden_size=256, num_hidden_layers=24, intermediate_size=768, num_attention_heads=4, num_key_value_heads=4,
                                      vocab_size=97)), tmp_path / "model")
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        before = peak = own_memory(child)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:   # seen from outside, which its own work cannot keep from looking
            with contextlib.suppress(TypeError):   # it has just ended
                peak = max(peak, own_memory(child))
            time.sleep(0.001)
        total = int(child.stdout.read())
    assert child.returncode == 0 and total > 5 * (peak - before), f"{(peak - before) / 1e6:.0f} MB for {total / 1e6:.0f} MB of weights, scores and masks"


def test_all_that_may_live_outside_is_counted_under_its_name():
    model, names = loading.blank_model("starter"), set()
    for changes in ({"finetune": True}, {"methods": ("dpruner", "wanda"), "compensate": "after"}, {"compensate": "walk"}):
        for parts in peak._stages(RunConfig(**changes), model, 4, SPARING, "cpu"):
            names |= parts.keys()
    assert set(peak.OUTSIDE) <= names


def test_the_plan_changes_as_little_as_it_must():
    model, config = loading.blank_model("starter"), RunConfig(device="cpu", seqlen=1024, finetune=True)
    sizes = {plan: sum(estimate.peak_memory(config, model, "cpu", plan).values())
             for plan in (Plan(), Plan(outside=True), Plan(outside=True, checkpointing=True))}
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for plan, size in sizes.items():
        assert estimate.choose(config, model, "cpu", size) == plan
    assert estimate.choose(config, model, "cpu", 1) == Plan(outside=True, checkpointing=True)
    assert estimate.choose(config, model, "cuda", 1) == Plan(outside=True, offload=True, passes=32)


def test_a_limit_that_cannot_be_kept_is_refused_with_advice(tmp_path, capsys):
    assert cli.main(["prune", "--memory", "200MB", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("The run does not fit into 200MB of memory: at its most sparing it takes 0.") and "most of it for program (0.380 GB)" in said
    assert "allow it 0." in said and said.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_memory_that_runs_out_ends_in_a_sentence_with_advice(error, llama, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise error
    monkeypatch.setattr(pipeline, "general_importance", exhausted)
    monkeypatch.setattr(peak, "PROGRAM", {})   # which is most of all where the model is tiny
    with pytest.raises(InputError, match="The run needs more memory than there is: .*; keep to a limit .*or use the precision bfloat16") as caught:
        pipeline.run(RunConfig(model=str(llama), device="cpu", seqlen=64), runs=tmp_path / "runs", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)

"""A model larger than its accelerator: blocks visit it one by one, and all is as if they had stayed. The accelerator is played, see card.py."""

import dataclasses
import gc
import weakref
from types import SimpleNamespace

import bench_gpu
import card
import pytest
import torch
from conftest import save
from families import FAMILIES, tiny, tiny_batches, tiny_tokenizer
from test_resume import content
from transformers import LlamaConfig, LlamaForCausalLM

from dpruner import InputError, RunConfig, domain_importance, estimate, general_importance, load_model, loading, memory, offload, peak, perplexity, pipeline
from dpruner.domain import FineTune, stream_gradients
from dpruner.finetune import finetuned, tune_kept
from dpruner.generate import generate
from dpruner.masks import make_masks, pruned
from dpruner.memory import Plan
from dpruner.model import decoder_blocks, prunable_linears

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_visits(monkeypatch):
    """However small it is."""
    monkeypatch.setattr(memory, "SMALLEST", 0)


def counted(monkeypatch, module, name, owner):
    """{"now", "most"}: bytes of the tensors that a function gives, at any moment and at most; each counts while `owner(tensor)` lives."""
    seen, give = {"now": 0, "most": 0}, getattr(module, name)

    def gone(size):
        seen["now"] -= size

    def given(*args):
        tensor = give(*args)
        size = tensor.numel() * tensor.element_size()
        weakref.finalize(owner(tensor), gone, size)
        seen["now"] += size
        seen["most"] = max(seen.values())
        return tensor

    monkeypatch.setattr(module, name, given)
    return seen


@pytest.fixture
def visitors(monkeypatch):
    """Weights that visit."""
    return counted(monkeypatch, offload, "brought", lambda copy: copy.use)


def values(tensors):
    return {n: (t.values if isinstance(t, card.OnCard) else t).clone() for n, t in tensors.items()}


def scored(model):
    """All that a walk and passes with gradients make of a model."""
    batches = tiny_batches(2)
    G = general_importance(model, batches)
    S = [domain_importance(model, batches, G), domain_importance(model, batches, G, "taylor", passes=2),
         domain_importance(model, batches, G, "release", finetune=FineTune(epochs=1, batch_size=1))]
    return [values(scores) for scores in (G, *(s.dual for s in S), *(s.domain for s in S))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_scores_are_those_of_a_model_that_stays(family):
    with card.present() as at_card:
        stays = scored(tiny(family).to(card.DEVICE))
        model = tiny(family)
        before = {n: p.clone() for n, p in model.named_parameters()}
        offload.offload(model, card.DEVICE)
        rest = at_card.used
        visits = scored(model)
        gc.collect()
        assert at_card.used == rest
    for a, b in zip(stays, visits, strict=True):
        assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(before[n], p) for n, p in values(dict(model.named_parameters())).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_where_its_embeddings_are(family):
    with card.present():
        model = offload.offload(tiny(family), card.DEVICE)
        assert model.device == card.DEVICE == offload.computes_on(model.get_input_embeddings().weight)
        for block in decoder_blocks(model)[1]:
            assert {p.device for p in block.parameters()} == {CPU} and {offload.computes_on(p) for p in block.parameters()} == {card.DEVICE}


def test_one_block_at_a_time_is_there_and_none_at_rest(visitors):
    with card.present():
        model = offload.offload(tiny("llama"), card.DEVICE)
        largest = max(sum(4 * p.numel() for p in block.parameters()) for block in decoder_blocks(model)[1])
        scored(model)
        gc.collect()
        assert visitors == {"now": 0, "most": largest}


@pytest.mark.parametrize("during", ["walk", "gradients"])
def test_an_error_in_a_block_leaves_nothing_behind(during, visitors):
    with card.present():
        model = offload.offload(tiny("llama"), card.DEVICE)
        block = decoder_blocks(model)[1][1]
        weights = dict(block.named_parameters())

        def fails(*_):
            assert visitors["now"]
            raise MemoryError

        handle = block.mlp.register_forward_hook(fails)
        with pytest.raises(MemoryError):
            if during == "walk":
                general_importance(model, tiny_batches(1))
            else:
                stream_gradients(model, tiny_batches(1), lambda *_: None, stage="")
        handle.remove()
        gc.collect()
        assert visitors["now"] == 0 and all(weights[n] is p and p.grad is None for n, p in block.named_parameters())
        model(input_ids=tiny_batches(1)[0].to(card.DEVICE))
    assert visitors["now"] == 0


def test_an_error_in_backward_leaves_nothing_behind():
    model = offload.offload(tiny("llama"), CPU)

    def fails(name, g, part):
        raise MemoryError

    with pytest.raises(MemoryError):
        stream_gradients(model, tiny_batches(1), fails, stage="")
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    found = []
    stream_gradients(model, tiny_batches(1), lambda name, g, part: found.append(name), stage="")
    assert set(found) == set(prunable_linears(model))   # each again, and by nobody who took it before


def test_gradients_nobody_takes_go_home():
    ids, stays, visits = tiny_batches(1)[0], tiny("llama"), offload.offload(tiny("llama"), CPU)
    for model in (stays, visits):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(stays.parameters(), visits.parameters(), strict=True))


def test_a_pruned_model_reads_writes_and_is_tuned_as_one_that_stays():
    tokenizer, found = tiny_tokenizer(), []
    with card.present():
        for place in (lambda m: m.to(card.DEVICE), lambda m: offload.offload(m, card.DEVICE)):
            model = place(tiny("llama"))
            masks = make_masks(values({n: p.abs() for n, p in model.named_parameters() if "proj" in n}), 0.5)
            with pruned(model, masks):
                text = [t.text for t in generate(model, tokenizer, "The court", max_new_tokens=8, stop=False)]
                found.append((float(perplexity(model, tokenizer, ["The court held that the party had waived it."])), text,
                              values(tune_kept(model, tiny_batches(4), masks, epochs=1))))
    (a, said, tuned), (b, repeated, visited) = found
    assert a == b and said == repeated
    assert all(torch.allclose(tuned[n], visited[n], atol=1e-6) and (visited[n] == 0).sum() >= tuned[n].numel() // 2 for n in tuned)


@pytest.fixture
def on_card(monkeypatch):
    """Runs take place on the card."""
    for module in (pipeline, estimate, loading):
        monkeypatch.setattr(module, "pick_device", lambda device=None: card.DEVICE)
    with card.present() as at_card:
        yield at_card


RUNS = {"taylor": {"formula": "taylor", "general_mode": "static"}, "walk": {"compensate": "walk", "refine": 1}}
SPARING = Plan(outside=True, offload=True, passes=4)


@pytest.fixture
def waiting(monkeypatch):
    """What lives outside the device's memory."""
    return counted(monkeypatch, memory, "_room", lambda file: file.untyped_storage())


@pytest.mark.parametrize(("name", "files"), [("taylor", True), ("walk", True), ("walk", False)])
def test_a_run_ends_with_the_same_bits_in_the_memory_that_was_told(name, files, on_card, waiting, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SMALLEST", 4096)
    save(LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=6, intermediate_size=172, num_attention_heads=4, num_key_value_heads=4,
                                      vocab_size=97)), tmp_path / "model")
    config = RunConfig(model=str(tmp_path / "model"), domains=("legal",), dtype="float32", nsamples=2, seqlen=32, halves=False, evaluate=False, **RUNS[name])
    runs, peaks, sparing = [], [], dataclasses.replace(SPARING, files=files)
    for plan in (Plan(), sparing):
        monkeypatch.setattr(estimate, "plan_of", lambda *_, plan=plan: plan)
        on_card.peak = 0
        runs.append(pipeline.run(config, runs=tmp_path / f"runs {plan.offload}", cache=tmp_path / f"cache {plan.offload}"))
        told = estimate.peak_memory(config, loading.blank_model(config.model), "cuda", plan)
        needed = sum(size for what, size in told.items() if what != "program") / peak.SPARE
        assert 0.8 < needed / on_card.peak < 1.2, f"{on_card.peak} bytes, told {needed:.0f}: {told}"
        peaks.append(on_card.peak)
        gc.collect()
        assert on_card.used == 0
    assert content(runs[0]) == content(runs[1]) and peaks[1] < peaks[0] / 2
    told = estimate.outside(config, loading.blank_model(config.model), "cuda", sparing)
    assert waiting["now"] == 0 and 0.8 < sum(told.values()) / waiting["most"] < 1.2, f"{waiting}, told {told}"


def test_what_an_earlier_run_has_left_on_the_host_serves_the_next_one(on_card, llama, tmp_path):
    config = RunConfig(model=str(llama), domains=("legal",), nsamples=2, seqlen=32, halves=False, evaluate=False, **RUNS["walk"])
    first, second = (pipeline.run(config, runs=tmp_path / name, cache=tmp_path / "cache") for name in ("first", "second"))
    assert content(first) == content(second)


def test_what_has_no_room_visits_when_it_is_loaded(on_card, llama, monkeypatch):
    size = sum(4 * p.numel() for p in tiny("llama").parameters())
    stays, _ = load_model(str(llama), most=2 * size)
    visits, _ = load_model(str(llama), most=size)
    assert {p.device for p in stays.parameters()} == {card.DEVICE} and {p.device for p in visits.parameters()} == {card.DEVICE, CPU}
    monkeypatch.setattr(memory, "available_memory", lambda device: size)
    assert {p.device for p in load_model(str(llama))[0].parameters()} == {card.DEVICE, CPU}
    ids = tiny_batches(1)[0].to(card.DEVICE)
    assert torch.equal(stays(input_ids=ids).logits, visits(input_ids=ids).logits)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_models_are_tuned_to_the_same_bits_where_tuning_has_no_room(way, on_card, llama, tmp_path, monkeypatch):
    if way == "lora":
        pytest.importorskip("peft")
    config = RunConfig(model=str(llama), domains=("legal",), dtype="bfloat16", nsamples=4, seqlen=32, halves=False, evaluate=False)
    size, found = sum(2 * p.numel() for p in tiny("llama").parameters()), []
    for free in (10**9, 2 * size):   # the second is enough to generate with
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: free)
        run = pipeline.run(config, runs=tmp_path / f"runs {free}", cache=tmp_path / "cache")
        gc.collect()
        on_card.peak = on_card.used
        finetuned(run, way, epochs=1)
        found.append((run.weights("dpruner", "legal"), on_card.peak))
    (stays, most), (visits, least) = found
    assert least < most / 1.5 and all(torch.equal(stays[n], visits[n]) for n in stays)
    assert any((stays[n] != 0).any() for n in stays) and all((stays[n][~mask] == 0).all() for n, mask in run.masks("dpruner", "legal").items())


SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}


def test_blocks_visit_only_where_nothing_milder_helps():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SEVEN))
    config = RunConfig(seqlen=512, nsamples=128, dtype="bfloat16")
    plans = {gigabytes: estimate.choose(config, model, "cuda", gigabytes * 10**9) for gigabytes in (160, 40, 16, 10)}
    assert plans[160] == Plan() and not plans[40].offload and plans[16].offload and plans[10].offload
    for gigabytes, plan in plans.items():
        assert sum(estimate.peak_memory(config, model, "cuda", plan).values()) <= gigabytes * 10**9
    with pytest.raises(InputError, match="does not fit into 8GB of memory: at its most sparing it takes .* GB, most of it for one block"):
        estimate.require_memory(dataclasses.replace(config, memory="8GB"), model, "cuda")


@pytest.mark.parametrize(("free", "said"), [(200, ""), (60, "GB of weights, scores and masks wait in files of the cache folder, and 60.0 GB of memory are free"),
                                            (0.5, "will probably not fit into the memory of the host: it takes about 904 MB there and 500 MB are free")])
def test_what_waits_on_the_host_is_told_and_compared_with_what_is_free(free, said, monkeypatch):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SEVEN))
    config = RunConfig(seqlen=512, nsamples=128, dtype="bfloat16")
    monkeypatch.setattr(estimate, "available_memory", lambda device: (free if device == "cpu" else 40) * 10**9)
    found = estimate.cautions(config, model, "cuda", SPARING)
    assert len(found) == bool(said) and all(said in sentence for sentence in found)
    assert estimate.placed(SPARING, config, model, "cuda").files == bool(said)
    assert 80e9 < sum(estimate.outside(config, model, "cuda", SPARING).values()) < 120e9   # weights 13, G 26, scores 52
    assert estimate.outside(config, model, "cuda", Plan()) == {} == estimate.host_memory(config, model, "cpu", SPARING)


def test_files_that_the_disk_has_no_room_for_are_refused_before_anything_is_written(on_card, llama, tmp_path, monkeypatch):
    config = RunConfig(model=str(llama), domains=("legal",), nsamples=2, seqlen=32)
    monkeypatch.setattr(estimate, "plan_of", lambda *_: dataclasses.replace(SPARING, files=True))
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="The disk has no room for what the run keeps outside the device: .* another disk with --cache"):
        pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")
    with pytest.raises(InputError, match="The disk has no room"):
        estimate.told(config, tmp_path / "runs", tmp_path / "cache")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("limit", "plan"), [([], "outside=False, offload=False"), (["--memory", "5MB"], "outside=True, offload=True")])
def test_the_benchmark_for_a_gpu_comes_to_its_end(limit, plan, capsys):
    with card.present():
        bench_gpu.main(["--tiny", "--device", "card:0", *limit])
    printed = capsys.readouterr().out
    assert plan in printed and all(row in printed for row in ("| sequential OBS, 128 × 128", "| domain pass, 3 × 32 tokens", "| together", "| what waits outside"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_no_more_than_it_may():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=512, num_hidden_layers=24, intermediate_size=1376, num_attention_heads=8, vocab_size=97)).eval()
    stays = scored(model.cuda())
    model = offload.offload(model.cpu(), torch.device("cuda:0"))
    block = sum(4 * p.numel() for p in decoder_blocks(model)[1][0].parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated()
    visits = scored(model)
    assert torch.cuda.memory_allocated() - rest < block
    general_importance(model, tiny_batches(2))
    torch.cuda.reset_peak_memory_stats()
    stream_gradients(model, tiny_batches(2), lambda *_: None, stage="")
    assert torch.cuda.max_memory_allocated() - rest < 3 * block
    for a, b in zip(stays, visits, strict=True):
        assert all(torch.equal(a[n].cpu(), b[n].cpu()) for n in a)

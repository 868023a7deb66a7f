"""An exported checkpoint: loads anywhere, holds its mask in zeros, and says so; what cannot be exported is refused."""

import json
import shutil

import pytest
import torch
from conftest import save
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpruner import RunConfig, pipeline
from dpruner.baselines import magnitude
from dpruner.errors import InputError
from dpruner.export import MASK_FILE, calibrated_on, export, verify
from dpruner.loading import load_model
from dpruner.masks import make_masks, pruned
from dpruner.model import prunable_linears
from dpruner.store import Run, read_masks, write_masks


def run_of(model, tmp_path, **settings) -> Run:
    folder = save(model, tmp_path / "model")
    config = RunConfig(model=str(folder), domains=("legal",), nsamples=4, seqlen=16, evaluate=False, halves=False, general_mode="static",
                       **settings)
    return pipeline.run(config, runs=tmp_path / "runs", cache=tmp_path / "cache")


def refused(match, run, method="dpruner", domain="legal", to=None) -> str:
    """Asserts that an export is refused in one line and leaves the folder above it as it was."""
    above = sorted(to.parent.iterdir()) if to.parent.is_dir() else None
    with pytest.raises(InputError, match=match) as caught:
        export(run, method, domain, to)
    assert "\n" not in str(caught.value) and all((caught.value.what, caught.value.why, caught.value.fix))
    assert (sorted(to.parent.iterdir()) if to.parent.is_dir() else None) == above
    return str(caught.value)


def test_an_export_loads_anywhere_with_zeros_where_the_mask_says_and_the_rest_as_it_was(small, tmp_path):
    out = export(small.run, "dpruner", "legal", tmp_path / "new" / "legal")
    original, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small.config.model, out))
    masks = small.run.masks("dpruner", "legal")
    for (name, before), after in zip(original.named_parameters(), pruned.parameters(), strict=True):
        expected = before.masked_fill(~masks[name], 0) if name in masks else before
        assert torch.equal(after, expected), name
    assert set(masks) == set(prunable_linears(original)) and [path.name for path in out.parent.iterdir()] == ["legal"]
    text = "The court finds for the plaintiff."
    ids = [AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (small.config.model, out)]
    assert ids[0] == ids[1]
    model, _ = load_model(str(out))   # and it can be pruned again
    assert set(prunable_linears(model)) == set(masks)


def test_an_export_brings_its_mask_and_a_card_that_says_what_was_done(small, tmp_path):
    out = export(small.run, "random", "healthcare", tmp_path / "out")
    masks, told = small.run.masks("random", "healthcare"), read_masks(out / MASK_FILE)
    assert set(told) == set(masks) and all(torch.equal(told[n], masks[n]) for n in masks)
    card = (out / "README.md").read_text(encoding="utf-8")
    zeros, prunable = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert card.startswith("---\nbase_model: ") and f"{zeros:,} of {prunable:,} prunable weights are zero (50.00%;" in card
    found = small.run.metrics().query("metric == 'perplexity' and domain == 'healthcare' and text == 'general'").set_index("method")
    for method in ("dense", "random"):
        row = found.loc[method]
        assert f"| {method} | general | {row.value:.2f} | {row.low:.2f} to {row.high:.2f} | {row.n} |" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == small.run.config
    assert "No text was looked at; seed 0." in card and "| magnitude |" not in card


@pytest.mark.parametrize(("method", "settings", "said"), [
    ("dpruner", {}, "from mine.txt and as many of the open domain (general), seed 0."), ("domain", {}, "from mine.txt, seed 0."),
    ("general", {}, "from the open domain (general), seed 0."), ("wanda", {}, "from the open domain (general), seed 0."),
    ("sparsegpt", {"baseline_calibration": "domain"}, "from mine.txt, seed 0."), ("magnitude", {}, "No text was looked at; seed 0."),
    ("magnitude", {"compensate": "after"}, "from mine.txt and as many of the open domain (general), seed 0.")])
def test_a_card_names_the_text_that_its_method_has_seen(method, settings, said):
    assert calibrated_on(RunConfig(domains=("contracts=texts/mine.txt",), **settings), method, "contracts").endswith(said)


@pytest.mark.parametrize("family, stored, loaded", [("gpt2", torch.bfloat16, None), ("llama", torch.float16, "bfloat16"),
                                                    ("qwen2", torch.float32, None)])
def test_the_precision_on_disk_is_that_of_the_original(family, stored, loaded, tmp_path):
    # gpt2: weights the other way round, and a head tied to the embeddings
    run = run_of(tiny(family).to(stored), tmp_path, methods=("magnitude",), dtype=loaded)
    out = export(run, "magnitude", "legal", tmp_path / "out")
    before, after = (folder / "model.safetensors" for folder in (tmp_path / "model", out))
    original, written, masks = load_file(before), load_file(after), run.masks("magnitude", "legal")
    assert set(original) == set(written) and after.stat().st_size == before.stat().st_size
    assert {t.dtype for t in written.values()} == {stored}
    prefix = "" if set(masks) <= set(written) else next(n for n in masks).partition(".")[0] + "."
    for name, before in original.items():
        mask = masks.get(prefix + name if prefix + name in masks else name)
        expected = before if mask is None else before.masked_fill(~mask, 0)
        if loaded:
            assert torch.equal(written[name], expected.to(torch.bfloat16).to(stored)), name   # what the run saw
        else:
            assert torch.equal(written[name], expected), name
    assert str(json.loads((out / "config.json").read_text())["dtype"]) == str(stored).removeprefix("torch.")


@pytest.mark.parametrize("settings", [{"compensate": "after"}, {"compensate": "walk"}, {"methods": ("sparsegpt",)}], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_moved_weights_are_exported_moved(settings, stored, tmp_path):
    run = run_of(tiny("llama").to(stored), tmp_path, **settings)
    ((method, domain),) = run.pairs()
    out = AutoModelForCausalLM.from_pretrained(export(run, method, domain, tmp_path / "out"), dtype="auto")
    masks, weights, original = run.masks(method, domain), run.weights(method, domain), dict(tiny("llama").to(stored).named_parameters())
    assert out.dtype == stored
    changed = 0
    for name, after in out.named_parameters():
        if name in masks:
            assert torch.equal(after, weights[name].to(stored)) and not after[~masks[name]].any()
            changed += int((after != original[name])[masks[name]].sum())
        else:
            assert torch.equal(after, original[name])
    assert changed > 0


def test_the_starter_is_exported_in_its_own_size(tmp_path):
    run = pipeline.run(RunConfig(domains=("legal",), methods=("magnitude",), nsamples=1, seqlen=16, evaluate=False, general_mode="static"),
                       runs=tmp_path / "runs", cache=tmp_path / "cache")
    from dpruner.starter import PATH
    out = export(run, "magnitude", "legal", tmp_path / "out")
    assert (out / "model.safetensors").stat().st_size == pytest.approx((PATH / "model.safetensors").stat().st_size, abs=200)
    assert "(50.00%;" in (out / "README.md").read_text(encoding="utf-8")


def test_an_empty_folder_is_filled_and_a_run_is_taken_by_its_folder(small, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(small.run.folder, "magnitude", "legal", tmp_path / "out") / "model.safetensors").is_file()


# ---- verified from the file ----


def tampering(monkeypatch, change):
    """Every checkpoint that is saved has its first prunable weight changed on disk."""
    real = LlamaForCausalLM.save_pretrained

    def save_and_change(self, folder, **options):
        real(self, folder, **options)
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights, next(iter(prunable_linears(self))))
        save_file(weights, path, {"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_and_change)


def test_a_weight_that_should_be_zero_and_is_not_stops_the_export(small, tmp_path, monkeypatch):
    masks = small.run.masks("dpruner", "legal")

    def put_one_back(weights, name):
        row, column = (~masks[name]).nonzero()[-1].tolist()
        weights[name][row, column] = 1e-30

    tampering(monkeypatch, put_one_back)
    said = refused("not as sparse as its mask", small.run, to=tmp_path / "out")
    assert next(iter(prunable_linears(tiny("llama")))) in said


def test_a_weight_that_is_missing_from_the_file_stops_the_export(small, tmp_path, monkeypatch):
    tampering(monkeypatch, lambda weights, name: weights.pop(name))
    refused("incomplete", small.run, to=tmp_path / "out")


def test_weights_that_a_family_stores_under_other_names_are_verified_as_they_are_loaded(tmp_path):
    sizes = {"hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **sizes, num_local_experts=4, num_experts_per_tok=2))
    masks = make_masks(magnitude(model), 0.5)
    with pruned(model, masks):
        model.save_pretrained(tmp_path)
    assert not set(masks) <= set(load_file(tmp_path / "model.safetensors"))
    assert verify(tmp_path, masks) == sum(int((~m).sum()) for m in masks.values())
    name = next(n for n in masks if n not in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=f"{name} has weights that should be zero"):
        verify(tmp_path, {**masks, name: torch.zeros_like(masks[name])})


def test_verification_reads_every_shard(small, tmp_path):
    model, masks = AutoModelForCausalLM.from_pretrained(small.config.model), small.run.masks("dpruner", "legal")
    removed = sum(int((~m).sum()) for m in masks.values())
    with torch.no_grad():
        for name, m in masks.items():
            model.get_parameter(name).masked_fill_(~m, 0)
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    write_masks(tmp_path / "out" / MASK_FILE, masks)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) >= 3 and verify(tmp_path / "out", masks) == removed
    shards[1].unlink()
    with pytest.raises(InputError, match="incomplete"):
        verify(tmp_path / "out", masks)


# ---- refused ----


def test_a_folder_that_holds_something_is_left_alone(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "mine" in refused("not empty", small.run, to=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    refused("not empty", small.run, to=tmp_path / "file")
    refused("could not be written", small.run, to=tmp_path / "file" / "below")


@pytest.mark.parametrize("method, domain", [("wanda", "legal"), ("dpruner", "finance"), ("", ""), ("dpruner", "../legal")])
def test_a_method_or_domain_that_the_run_does_not_hold_is_refused_with_those_it_holds(method, domain, small, tmp_path):
    said = refused("holds no mask", small.run, method, domain, tmp_path / "out")
    assert "dpruner@legal" in said and "random@healthcare" in said


def test_an_unknown_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="'nowhere' was not found"):
        export("nowhere", "dpruner", "legal", tmp_path / "out")


def test_a_model_that_has_changed_or_gone_since_the_run_is_refused(tmp_path):
    run = run_of(tiny("llama"), tmp_path)
    save(tiny("llama", seed=1), tmp_path / "model")
    refused("not the one that was pruned", run, to=tmp_path / "out")
    shutil.rmtree(tmp_path / "model")
    refused("was not found", run, to=tmp_path / "out")


def test_a_damaged_mask_is_refused_by_name(small, tmp_path):
    run = Run(shutil.copytree(small.run.folder, tmp_path / "run"))
    path = run.path("masks", "dpruner", "legal")
    path.write_bytes(path.read_bytes()[:3000])
    refused("masks/dpruner@legal.safetensors", run, to=tmp_path / "out")


def test_a_run_that_never_got_to_its_figures_is_refused(small, tmp_path):
    run = Run(shutil.copytree(small.run.folder, tmp_path / "run"))
    (run.folder / "metrics.parquet").unlink()
    refused("metrics.parquet", run, to=tmp_path / "out")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(small, tmp_path, monkeypatch):
    def full(self, folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    refused("no space left on device", small.run, to=tmp_path / "out")

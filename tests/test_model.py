"""Loading: what comes out, and what is refused with one clear sentence."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from conftest import save
from families import FAMILIES, VOCAB, tiny, tiny_encoder, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from dpruner.calibration import load_texts
from dpruner.errors import InputError
from dpruner.evaluate import perplexity
from dpruner.loading import load_model, stored_precision
from dpruner.model import count_weights, fingerprint, max_length, prunable_linears, require_length, usual_window

UP = "model.layers.1.mlp.up_proj.weight"


# ---- what comes out ----


def test_the_starter_loads_ready_for_scoring(starter):
    model, tokenizer = starter
    prunable, total = count_weights(model)
    assert not model.training and model.dtype == torch.float32 and total == sum(p.numel() for p in model.parameters())
    assert 0.5 < prunable / total < 1 and len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    assert stored_precision("starter") == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_its_folder_bit_for_bit(family, tmp_path):
    model = tiny(family)
    loaded, tokenizer = load_model(str(save(model, tmp_path / family)), device="cpu")
    assert fingerprint(loaded) == fingerprint(model) and not loaded.training and len(tokenizer) == VOCAB
    assert list(prunable_linears(loaded)) == list(prunable_linears(model))


@pytest.mark.parametrize("asked, found", [(None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16),
                                          ("float16", torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_the_precision_is_the_one_asked_for_and_float32_on_the_cpu(llama, asked, found):
    model, _ = load_model(str(llama), device="cpu", dtype=asked)
    assert {p.dtype for p in model.parameters()} == {found}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_precision_is_that_of_the_files_whatever_the_config_says(precision, tmp_path):
    folder = save(tiny("gpt2").to(precision), tmp_path / "model")
    change_config(folder, dtype="float64")
    assert stored_precision(str(folder)) == precision


def test_the_fingerprint_notices_one_bit_and_a_name():
    model = tiny("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[3, 4] ^= 1
    assert fingerprint(model) != before
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[3, 4] ^= 1
    assert fingerprint(model) == before and fingerprint(tiny("llama", seed=1)) != before
    assert fingerprint(model.to(torch.bfloat16)) != before


def test_the_longest_sequence_is_allowed_and_one_token_more_is_not():
    model = tiny("llama")
    require_length(model, max_length(model))
    with pytest.raises(InputError, match="eval_seqlen to 128 or less"):
        require_length(model, max_length(model) + 1, "eval_seqlen")
    require_length(tiny("bloom"), 10**6)   # ALiBi has no limit


def test_windows_are_no_longer_than_what_the_model_takes_and_has_seen(starter):
    model = tiny("llama")
    assert usual_window(model) == max_length(model)
    model.config.trained_length = 32
    assert usual_window(model) == 32 and usual_window(tiny("bloom")) == 2048
    texts = load_texts("healthcare", "heldout")[:2]
    model, tokenizer = starter
    whole, seen = (float(perplexity(model, tokenizer, texts, *seqlen)) for seqlen in ((), (256,)))
    assert whole == seen < 0.9 * float(perplexity(model, tokenizer, texts, max_length(model)))   # the starter beyond what it has seen


# ---- what is refused ----


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def set_weight(value):
    def change(weights):
        weights[UP][3, 4] = value
    return change


def without_config(folder):
    (folder / "config.json").unlink()


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def encoder(folder):
    shutil.rmtree(folder)
    save(tiny_encoder(), folder)


def translator(folder):
    shutil.rmtree(folder)
    save(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)), folder)


def large_tokenizer(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)


def own_code(folder):
    """A model of an unknown type that brings its code, which would leave a file behind; no tokenizer."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    change_config(folder, model_type="own", architectures=["OwnModel"],
                  auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (folder / "own.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
                                   "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n")


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def another_shape(folder):
    change_weights(folder, lambda weights: weights.update({UP: torch.ones(3, 4)}))


def half_a_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


BROKEN = {   # what is done to the folder of a tiny llama, and words that the refusal must hold beside the folder's name
    "no config": (without_config, "no config.json"),
    "no weights": (without_weights, "no .safetensors file"),
    "pickle": (pickled, "no .safetensors file"),
    "encoder": (encoder, "BertLMHeadModel"),
    "encoder and decoder": (translator, "t5 is not a decoder"),
    "NaN": (lambda folder: change_weights(folder, set_weight(float("nan"))), UP),
    "infinite": (lambda folder: change_weights(folder, set_weight(float("-inf"))), UP),
    "a weight is missing": (lambda folder: change_weights(folder, lambda weights: weights.pop(UP)), UP),
    "a weight of another shape": (another_shape, "other shapes"),
    "large tokenizer": (large_tokenizer, "102 tokens"),
    "no tokenizer": (without_tokenizer, "no tokenizer"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not be loaded"),
    "own code": (own_code, "never allowed"),
    "half a file": (half_a_file, "could not be loaded"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "could not be loaded"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{model"), "not a valid JSON"),
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "impossible config": (lambda folder: change_config(folder, num_attention_heads=7), "(7)"),
}


def broken(llama, tmp_path, how):
    """The folder of a tiny llama with something wrong."""
    folder = shutil.copytree(llama, tmp_path / "broken")
    BROKEN[how][0](folder)
    return folder


def is_one_sentence(error: InputError) -> bool:
    """What is wrong, why, and what to do, on one line."""
    parts = (error.what, error.why, error.fix)
    said = str(error)
    whole = all(part.strip() and not part.endswith(".") for part in parts)
    return whole and "\n" not in said and said == f"{parts[0]}: {parts[1]}; {parts[2]}."


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(how, llama, tmp_path):
    with pytest.raises(InputError) as caught:
        load_model(str(broken(llama, tmp_path, how)), device="cpu")
    assert is_one_sentence(caught.value) and BROKEN[how][1] in str(caught.value), caught.value


@pytest.mark.parametrize("answer", ["y", "n"])
def test_code_that_a_model_brings_never_runs_whatever_is_typed(answer, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    folder = broken(llama, tmp_path, "own code")
    with pytest.raises(InputError, match="its own code"):
        load_model(str(folder))
    assert not (folder / "it-ran").exists()


def test_code_beside_a_known_architecture_is_left_alone(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(llama, tmp_path / "model")
    own_code(folder)
    tiny_tokenizer().save_pretrained(folder)
    change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    model, _ = load_model(str(folder), device="cpu")
    assert type(model).__module__.startswith("transformers.") and not (folder / "it-ran").exists()


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "x" * 300,
                                  "models/nowhere.txt/../deep"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(InputError) as caught:
        load_model(name)
    assert is_one_sentence(caught.value) and repr(name) in str(caught.value)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(InputError, match="no folder of that name"):
        load_model(str(tmp_path / "model.gguf"))


def test_an_unknown_name_is_refused_at_once_and_in_silence_where_the_hub_cannot_be_reached(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("startr", "nobody/no-such-model"):
        with pytest.raises(InputError, match=f"'{name}'.*the hub cannot be reached.*'starter'") as caught:
            load_model(name)
        assert is_one_sentence(caught.value)
    assert capfd.readouterr() == ("", "")


def test_an_impossible_name_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'a b'.*no model of that name"):
        load_model("a b")


@pytest.mark.parametrize("error, word", [("GatedRepoError", "hf auth login"), ("RevisionNotFoundError", "that revision does not exist"),
                                         ("RepositoryNotFoundError", "no model of that name")])
def test_what_the_hub_answers_is_put_into_words(error, word, monkeypatch):
    from huggingface_hub import errors

    def refuse(*_, **__):
        try:
            raise getattr(errors, error)("403 Client Error.\n\nmuch more text", response=Mock())
        except Exception as cause:
            raise OSError("There was a specific connection error.\nmore lines") from cause   # as transformers wraps it

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=word) as caught:
        load_model("nobody/model")
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", "cpu:3", ""])
def test_a_device_that_is_not_there_is_refused(device, llama):
    with pytest.raises(InputError, match="this machine offers cpu") as caught:
        load_model(str(llama), device=device)
    assert is_one_sentence(caught.value) and repr(device) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_is_refused_where_there_is_none(llama):
    with pytest.raises(InputError, match="'cuda'.*this machine offers"):
        load_model(str(llama), device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "fp32", "bfloat"])
def test_an_unknown_precision_is_refused(dtype, llama):
    with pytest.raises(InputError, match="float32, bfloat16, float16"):
        load_model(str(llama), dtype=dtype)

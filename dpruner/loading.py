"""Load a decoder model from the starter, a local folder or the hub, and say in one sentence why it cannot be."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from dpruner import distributed, hub, memory, offload, starter
from dpruner.errors import InputError
from dpruner.model import prunable_linears, require_causal, require_finite

STARTER = "starter"
MOST_BLOCKS = 10_000
ROOM = 1.2   # of the weights of a model: what it needs at least to compute
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}   # as safetensors calls them


@contextlib.contextmanager
def quiet_libraries():
    """While open, transformers shows neither its progress bars nor its advice: commands and jobs have their own."""
    from transformers.utils import logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def pick_device(device: str | None = None) -> torch.device:
    """The device to compute on: the one named, else CUDA, else MPS, else the CPU.

    Raises:
        InputError: the device is not known to torch or not present.
    """
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if device is None or device == "auto":
        return torch.device(available[-1])
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in available or (found.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"The device {device!r} cannot be used", f"this machine offers {', '.join(available)}", "choose one of these or 'auto'")
    return found


def load_model(name: str = STARTER, *, revision: str | None = None, device: str | None = None, dtype: str | torch.dtype | None = None,
               most: int | None = None, room: float = ROOM):
    """Load a causal decoder and its tokenizer, ready for scoring.

    Args:
        name: "starter" (the embedded model), a local folder, or a hub id.
        revision: branch, tag or commit of a hub id; pin a commit to repeat a result.
        device: "cpu", "cuda", "cuda:1", "mps"; default the best there is.
        dtype: "float32", "bfloat16", "float16"; default float32 on the CPU and the stored precision on an accelerator.
        most: bytes that may be used on an accelerator, default what is free there; where that is less than `room` times the weights, those of blocks
            wait on the host and visit it when their block computes, with the same results.
        room: how many times its weights what will be done with the model takes.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        InputError: the model does not exist, is gated, wants to run its own code, is not a decoder, or its weights are missing or not finite.
    """
    device = pick_device(device)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InputError(f"The precision {dtype!r} is not known", "weights are kept in one of three precisions", f"choose one of {', '.join(DTYPES)}")
    dtype = DTYPES.get(dtype, dtype) or (torch.float32 if device.type == "cpu" else "auto")
    source = _source(name)
    where = {"revision": revision, "trust_remote_code": False}   # left out, transformers would ask on the terminal, and take "y" from a pipe
    _require_files(name, source)
    with contextlib.nullcontext() if _is_folder(source) else hub.impatient():
        config = _load_config(name, source, where)
        _require_safe_index(name, source, config, where)
        tokenizer = _guarded(name, lambda: AutoTokenizer.from_pretrained(source, **where))
        outside = memory.holds_weights(device)
        model, info = _guarded(name, lambda: AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype="auto" if outside else dtype, use_safetensors=True, output_loading_info=True, **where))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"The model {name!r} is incomplete", f"{len(missing)} of its weights are not in its files, {missing[0]} first",
                         "give the folder or id of a complete causal language model")
    if outside:
        dtype = model.dtype if dtype == "auto" else dtype
        memory.settle(model, dtype, _on_meta(config, dtype))
    (offload.offload(model, device) if _is_too_large(model, device, most, room) else model.to(device)).eval()
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"The model {name!r} does not fit its tokenizer",
                         f"the tokenizer knows {len(tokenizer)} tokens and the model {model.get_input_embeddings().weight.shape[0]}",
                         "put the tokenizer that the model was trained with into its folder")
    prunable_linears(model)
    require_finite(model)
    require_causal(model)
    return model, tokenizer


def _is_too_large(model: nn.Module, device: torch.device, most: int | None, room: float) -> bool:
    """Whether an accelerator has no room for `room` times the weights of a model."""
    if device.type == "cpu" or distributed.several():
        return False
    size = room * sum(p.numel() * p.element_size() for p in model.parameters())
    return memory.plan().offload or size > (memory.available_memory(str(device)) if most is None else most)


def blank_model(name: str = STARTER, revision: str | None = None) -> nn.Module:
    """A model as its config describes it, on the meta device: every name and shape, no weights.

    Args:
        name, revision: as `load_model` takes them.

    Raises:
        InputError: as `load_model`, of all that can be known without the weights.
    """
    source = _source(name)
    _require_files(name, source)
    with contextlib.nullcontext() if _is_folder(source) else hub.impatient():
        config = _load_config(name, source, {"revision": revision, "trust_remote_code": False})
    with torch.device("meta"):
        model = _guarded(name, lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    prunable_linears(model)
    require_causal(model)
    return model


def _on_meta(config, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def is_here(name: str, revision: str | None = None) -> bool:
    """Whether a model's weights are on this machine already, so that nothing has to be downloaded."""
    from huggingface_hub import try_to_load_from_cache
    source = _source(name)
    return _is_folder(source) or any(isinstance(try_to_load_from_cache(source, file, revision=revision), str)
                                     for file in ("model.safetensors", "model.safetensors.index.json"))


def _source(name: str) -> str:
    return str(starter.PATH) if name == STARTER else name


def _is_folder(source: str) -> bool:
    with contextlib.suppress(OSError):   # a name longer than the file system allows
        return Path(source).is_dir()
    return False


def stored_precision(name: str, revision: str | None = None) -> torch.dtype:
    """The precision of a checkpoint that has been loaded before: that of most weights in its files, whatever it was loaded as.

    Args:
        name, revision: as `load_model` takes them.
    """
    from huggingface_hub import snapshot_download
    source = _source(name)
    folder = Path(source) if _is_folder(source) else Path(snapshot_download(source, revision=revision, local_files_only=True))
    weights = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for part in map(file.get_slice, file.keys()):
                weights[part.get_dtype()] += math.prod(part.get_shape())
    return STORED[max(STORED, key=lambda code: weights[code])]


def _require_files(name, source):
    if _is_folder(source):
        if not (Path(source) / "config.json").is_file():
            raise InputError(f"The folder {name!r} holds no model", "it has no config.json",
                             "give a folder written by save_pretrained, or 'starter' for the embedded model")
        if not any(Path(source).glob("*.safetensors")):
            raise InputError(f"The folder {name!r} holds no weights", "there is no .safetensors file in it, and other formats can run code when read",
                             "save the model with save_pretrained(..., safe_serialization=True)")
    elif len(name) > 255 or Path(source).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"The model {name!r} was not found", "there is no folder of that name", "check the path, or give 'starter' or a hub id")


def _require_safe_index(name, source, config, where):
    """Weights may lie in several files, which an index names: all of them must be safetensors, of this very model."""
    index = _guarded(name, lambda: cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False,
                                               _raise_exceptions_for_connection_errors=False, revision=where["revision"]))
    named = [getattr(config, "transformers_weights", None) or "model.safetensors"]
    if index is not None:
        named += _guarded(name, lambda: list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for file in named:
        if not isinstance(file, str) or not file.endswith((".safetensors", ".safetensors.index.json")) or Path(file).name != file:
            raise InputError(f"The model {name!r} could not be loaded", f"it keeps weights in {str(file)!r}, and only safetensors of its own folder are read: "
                             "other formats can run code", "save the model with save_pretrained(..., safe_serialization=True)")


def _load_config(name, source, where):
    config = _guarded(name, lambda: AutoConfig.from_pretrained(source, **where))
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > MOST_BLOCKS:   # it would be built block by block, for hours
        raise InputError(f"The model {name!r} cannot be pruned here", f"its config.json speaks of {blocks:,} blocks, and no model has so many",
                         "give the folder or id of a complete causal language model")
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"The model {name!r} cannot be pruned here", f"{config.model_type} is not a decoder that predicts the next token",
                         "choose a causal language model such as Llama, Mistral, Qwen or GPT-2")
    return config


def _guarded(name, load):
    """Turn what the hub and the file formats raise into one sentence."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    try:
        return load()
    except Exception as error:
        chain = []
        link = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__ or link.__context__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in str(error):
            why, fix = "it is gated and needs permission", "accept its licence on its page and log in with `hf auth login`"
        elif any(isinstance(e, RevisionNotFoundError) for e in chain):
            why, fix = "that revision does not exist", "give a branch, tag or commit of its page"
        elif any(isinstance(e, RepositoryNotFoundError | HFValidationError) for e in chain):
            why, fix = "no model of that name is on the hub or on this disk", "check the spelling, give a local folder, or 'starter'"
        elif memory.ran_out(error):
            why, fix = "there is too little memory for it", "free some memory, take a precision of fewer bytes, or choose a smaller model"
        elif "instantiate the backend tokenizer" in first:
            why, fix = "it has no tokenizer", "put the tokenizer that the model was trained with into its folder"
        elif "ignore_mismatched_sizes" in first:
            why, fix = "its files hold weights of other shapes than its config.json says", "give the config and the weights of one and the same model"
        elif "trust_remote_code" in str(error):
            why, fix = "it wants to run its own code, which is never allowed here", "choose a model of an architecture that transformers knows"
        elif "does not recognize this architecture" in first:
            why, fix = "its architecture is not known to the installed transformers", "choose another model, or a newer version of transformers"
        elif any(isinstance(e, ConnectionError | TimeoutError | OSError) for e in chain) and not Path(name).exists() and name != STARTER:
            why, fix = "it is neither a folder nor in the local cache, and the hub cannot be reached", \
                "check the spelling and the network, give a local folder, or 'starter'"
        else:
            why, fix = first.rstrip("."), "check that the folder holds a complete model written by save_pretrained"
        raise InputError(f"The model {name!r} could not be loaded", why, fix) from error

"""Load a decoder model and find its parts: blocks, prunable linears, what is left out and why.

Nothing here knows a family by name. The blocks are the one `ModuleList` of the decoder whose items are all transformer layers; a prunable linear
is every `nn.Linear` or `Conv1D` inside them.
"""

import contextlib
import hashlib
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpruner import hub, starter
from dpruner.errors import InputError
from dpruner.masks import Scores, as_rows, precise

STARTER = "starter"
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


def load_model(name: str = STARTER, *, revision: str | None = None, device: str | None = None, dtype: str | torch.dtype | None = None):
    """Load a causal decoder and its tokenizer, ready for scoring.

    Args:
        name: "starter" (the embedded model), a local folder, or a hub id.
        revision: branch, tag or commit of a hub id; pin a commit to repeat a result.
        device: "cpu", "cuda", "cuda:1", "mps"; default the best there is.
        dtype: "float32", "bfloat16", "float16"; default float32 on the CPU and the stored precision on an accelerator.

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
        tokenizer = _guarded(name, lambda: AutoTokenizer.from_pretrained(source, **where))
        model, info = _guarded(name, lambda: AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"The model {name!r} is incomplete", f"{len(missing)} of its weights are not in its files, {missing[0]} first",
                         "give the folder or id of a complete causal language model")
    model.to(device).eval()
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"The model {name!r} does not fit its tokenizer",
                         f"the tokenizer knows {len(tokenizer)} tokens and the model {model.get_input_embeddings().weight.shape[0]}",
                         "put the tokenizer that the model was trained with into its folder")
    prunable_linears(model)
    require_finite(model)
    require_causal(model)
    return model, tokenizer


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


def _load_config(name, source, where):
    config = _guarded(name, lambda: AutoConfig.from_pretrained(source, **where))
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
        elif "instantiate the backend tokenizer" in first:
            why, fix = "it has no tokenizer", "put the tokenizer that the model was trained with into its folder"
        elif "ignore_mismatched_sizes" in first:
            why, fix = "its files hold weights of other shapes than its config.json says", "give the config and the weights of one and the same model"
        elif "trust_remote_code" in str(error):
            why, fix = "it wants to run its own code, which is never allowed here", "choose a model of an architecture that transformers knows"
        elif any(isinstance(e, ConnectionError | TimeoutError | OSError) for e in chain) and not Path(name).exists() and name != STARTER:
            why, fix = "it is neither a folder nor in the local cache, and the hub cannot be reached", \
                "check the spelling and the network, give a local folder, or 'starter'"
        else:
            why, fix = first.rstrip("."), "check that the folder holds a complete model written by save_pretrained"
        raise InputError(f"The model {name!r} could not be loaded", why, fix) from error


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks in order, and the full name of the list that holds them.

    Raises:
        InputError: no list of transformer blocks was found.
    """
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) and all(isinstance(b, GradientCheckpointingLayer) for b in m)]
    if not found:
        raise InputError(f"The architecture {type(model).__name__} cannot be pruned here", "no list of decoder blocks was found in it",
                         "choose a decoder-only causal language model")
    blocks = max(found, key=len)
    name = next(n for n, m in model.named_modules() if m is blocks)
    return name, blocks


def linears_of(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """The prunable linears inside `module`, keyed by the full name of their weight in `model`, in the order of the model.

    A weight that is also used elsewhere (tied to the embeddings, or shared by two linears) appears once or not at all: masking it would change
    more than this linear.
    """
    inside = {id(m) for m in module.modules() if isinstance(m, nn.Linear | Conv1D)}
    outside = {id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None for p in e.parameters()}
    found = {}
    for name, m in model.named_modules():
        if id(m) in inside and id(m.weight) not in outside:
            outside.add(id(m.weight))
            found[f"{name}.weight"] = m
    return found


def prunable_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear that may be pruned: those inside the decoder blocks, never embeddings, norms or the head.

    Returns:
        {full parameter name of the weight: module}, in the order of the model.

    Raises:
        InputError: there is none.
    """
    _, blocks = decoder_blocks(model)
    linears = linears_of(model, blocks)
    if not linears:
        raise InputError(f"The architecture {type(model).__name__} cannot be pruned here", "its decoder blocks hold no linear layers",
                         "choose a model whose blocks are made of nn.Linear or Conv1D")
    return linears


def skipped_weights(model: nn.Module) -> dict[str, int]:
    """Weights inside the blocks with two dimensions or more that are not prunable linears, as in fused mixtures of experts.

    Returns:
        {full parameter name: number of weights}. Empty for dense architectures.
    """
    prefix, blocks = decoder_blocks(model)
    linears = prunable_linears(model)
    return {f"{prefix}.{n}": p.numel() for n, p in blocks.named_parameters() if p.ndim > 1 and f"{prefix}.{n}" not in linears}


def stored_transposed(module: nn.Module) -> bool:
    """Whether the module keeps its weight as (in, out), as transformers' Conv1D does."""
    return isinstance(module, Conv1D)


def transposed_names(model: nn.Module) -> frozenset[str]:
    """Names of the prunable weights that are stored as (in, out)."""
    return frozenset(n for n, m in prunable_linears(model).items() if stored_transposed(m))


def blank_scores(model: nn.Module) -> Scores:
    """Zeros for every prunable weight, to be filled: Scores in float32, or float64 for a float64 model."""
    linears = prunable_linears(model)
    return Scores({n: torch.zeros_like(precise(m.weight.detach())) for n, m in linears.items()}, transposed_names(model))


def heads_of(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Where attention heads lie in the prunable weights.

    An attention module is one that knows the size of its heads. Its output projection, the last of its linears that maps all heads to the hidden
    size, holds them in its columns; its other linears in their rows (fused ones as runs of queries, keys and values).

    Returns:
        {full parameter name: ("row" or "column" of the (out, in) weight, size of a head)}.
    """
    linears = prunable_linears(model)
    names = {id(m): n for n, m in linears.items()}
    found = {}
    for module in model.modules():
        size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        own = [m for m in module.children() if id(m) in names]
        if not isinstance(size, int) or not own:
            continue
        shapes = [as_rows(m.weight, stored_transposed(m)).shape for m in own]
        outputs = [m for m, (out, inner) in zip(own, shapes, strict=True) if out == hidden_size(model) and inner % size == 0]
        for m, (out, inner) in zip(own, shapes, strict=True):
            if outputs and m is outputs[-1]:
                found[names[id(m)]] = ("column", size)
            elif out % size == 0:
                found[names[id(m)]] = ("row", size)
    return found


def count_weights(model: nn.Module) -> tuple[int, int]:
    """(weights in the prunable linears, weights in the whole model; tied ones count once)."""
    return sum(m.weight.numel() for m in prunable_linears(model).values()), sum(p.numel() for p in model.parameters())


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream: what the block inputs have as last dimension."""
    return model.config.get_text_config().hidden_size


def max_length(model: nn.Module) -> int | None:
    """Longest sequence the model was built for, in tokens; None where there is no limit (ALiBi)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_length(model: nn.Module, seqlen: int, setting: str = "seqlen") -> None:
    """Refuse sequences the model has no positions for.

    Args:
        setting: what the user calls this length.

    Raises:
        InputError: seqlen exceeds the model's maximum.
    """
    limit = max_length(model)
    if limit and seqlen > limit:
        raise InputError(f"Sequences of {seqlen} tokens are too long", f"the model was built for at most {limit}", f"set {setting} to {limit} or less")


def require_batches(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """Refuse calibration that is empty or has sequences the model has no positions for.

    Args:
        batches: LongTensors (b, seqlen).

    Raises:
        InputError: says which.
    """
    if not batches:
        raise InputError("There is nothing to calibrate on", "the list of batches is empty", "load at least one sequence")
    require_length(model, max(b.shape[1] for b in batches))


def require_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        InputError: names the first such parameter.
    """
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise InputError(f"The model's weight {name} cannot be used", "it holds NaN or infinite values",
                             "load the model in another precision or repair its checkpoint")


@torch.no_grad()
def require_causal(model: nn.Module) -> None:
    """Refuse a model in which a later token changes an earlier prediction.

    Raises:
        InputError: the model is an encoder.
    """
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device) % model.get_input_embeddings().weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    if not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise InputError(f"{type(model).__name__} cannot be pruned here", "later tokens change its earlier predictions, so it is an encoder",
                         "choose a causal language model such as Llama, Mistral, Qwen or GPT-2")


def fingerprint(model: nn.Module) -> str:
    """sha256 over every parameter's name, shape, precision and bytes: equal exactly when the weights are equal bit for bit."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().contiguous().view(torch.uint8).cpu().numpy() if p.numel() else b"")
    return digest.hexdigest()

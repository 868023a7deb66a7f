"""The parts of a decoder model: its blocks, prunable linears, heads, what is left out and why.

Nothing here knows a family by name. The blocks are the one `ModuleList` of the decoder whose items are all transformer layers; a prunable linear
is every `nn.Linear` or `Conv1D` inside them.
"""

import hashlib

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from dpruner import memory
from dpruner.errors import InputError
from dpruner.masks import Scores, as_rows, precision


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

    A weight tied to the embeddings is left alone, and one that several linears share belongs to the first of them in the model.
    """
    inside = {id(m) for m in module.modules()}
    taken = {id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None for p in e.parameters()}
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear | Conv1D) and id(m.weight) not in taken:
            taken.add(id(m.weight))
            if id(m) in inside:
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
    return Scores({n: memory.zeros(m.weight.detach(), precision(m.weight)) for n, m in linears.items()}, transposed_names(model))


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


def usual_window(model: nn.Module) -> int:
    """Tokens of a window of perplexity where nobody says another number: 2,048, or fewer where the model takes fewer or, as its config may say
    by `trained_length`, has never seen as many: beyond them it predicts worse for that reason alone."""
    known = (max_length(model), getattr(model.config, "trained_length", None))
    return min([2048, *filter(None, known)])


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


def require_batches(model: nn.Module, batches: list[torch.Tensor], least: int = 1) -> None:
    """Refuse calibration that is empty or has sequences that are too short, or that the model has no positions for.

    Args:
        batches: LongTensors (b, seqlen).
        least: tokens of a sequence; 2 where the next token is predicted.

    Raises:
        InputError: says which.
    """
    if not batches:
        raise InputError("There is nothing to calibrate on", "the list of batches is empty", "load at least one sequence")
    lengths = [b.shape[1] for b in batches]
    if min(lengths) < least:
        raise InputError(f"Sequences of {min(lengths)} tokens are too short",
                         "there is no next token to predict in them" if least > 1 else "they say nothing", f"give {least} tokens or more")
    require_length(model, max(lengths))


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

    On the meta device nothing can be tried: there it goes by what the attention modules say of themselves.

    Raises:
        InputError: the model is an encoder.
    """
    if model.device.type == "meta":
        if {m.is_causal for m in decoder_blocks(model)[1].modules() if isinstance(getattr(m, "is_causal", None), bool)} == {False}:
            raise _an_encoder(model)
        return
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device) % model.get_input_embeddings().weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    if not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise _an_encoder(model)


def _an_encoder(model: nn.Module) -> InputError:
    return InputError(f"{type(model).__name__} cannot be pruned here", "later tokens change its earlier predictions, so it is an encoder",
                      "choose a causal language model such as Llama, Mistral, Qwen or GPT-2")


def fingerprint(model: nn.Module) -> str:
    """sha256 over every parameter's name, shape, precision and bytes: equal exactly when the weights are equal bit for bit."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        digest.update(p.detach().contiguous().view(torch.uint8).cpu().numpy() if p.numel() else b"")
    return digest.hexdigest()

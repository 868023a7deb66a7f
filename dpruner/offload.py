"""Weights that wait on the host and visit an accelerator block by block: a model of several times its memory is run there.

A block has its weights on the accelerator while it computes and lets them go when it is done; backward computes it a second time, with its weights there
again. Nobody who runs the model has to know: walks, gradients, evaluation, generation and tuning give the same bits as with all weights on the accelerator.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as again
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from dpruner import memory
from dpruner.model import decoder_blocks

_visits: WeakIdKeyDictionary = WeakIdKeyDictionary()   # weight that waits on the host: the device where it is used
_takers: WeakIdKeyDictionary = WeakIdKeyDictionary()   # weight: {handle's id: who takes its gradient}


def computes_on(weight: torch.Tensor) -> torch.device:
    """The device on which a weight is used, wherever it waits."""
    return _visits.get(weight, weight.device)


def offload(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a model on an accelerator except for the weights of its blocks, which from now on visit it; returns the model.

    Where the host has room enough they wait in pinned memory, which an accelerator reads fastest; else where they are, in memory or in files.
    accelerate's `cpu_offload` would do for inference, but it leaves no gradients behind.

    Args:
        model: on the host; small vectors of its blocks go to the accelerator too.
        device: the accelerator.
    """
    blocks = decoder_blocks(model)[1]
    inside = {id(module) for module in blocks.modules()}
    shared = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}   # with embeddings, say
    waiting = {id(p): p for p in blocks.parameters() if memory.is_large(p) and id(p) not in shared}
    model._apply(lambda t: t if id(t) in waiting else t.to(device))
    size = sum(p.numel() * p.element_size() for p in waiting.values())   # of which torch rounds each up to a power of two
    pinned = torch.cuda.is_available() and not memory.plan().files and memory.available_memory("cpu") > 2 * size
    for p in waiting.values():
        _visits[p] = device
        p.data = p.data.pin_memory() if pinned else p.data
    for block in blocks:
        block.forward = _visited(block, device)
    return model


def taken(weight: nn.Parameter, take: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """From now on `take(g)` gets the gradient of a weight the moment it is complete, on the device where it is used, and it is kept nowhere.

    Returns:
        A handle whose `remove()` ends it.
    """
    if weight not in _visits:
        def hand_over(p):
            g, p.grad = p.grad, None
            take(g)
        return weight.register_post_accumulate_grad_hook(hand_over)
    takers = _takers.setdefault(weight, OrderedDict())
    handle = RemovableHandle(takers)
    takers[handle.id] = take
    return handle


class _Visit(torch.autograd.Function):
    """A weight as a copy on the device; its gradient goes to whoever takes it there, or back to the weight."""

    @staticmethod
    def forward(ctx, weight, device):
        ctx.weight = weight
        return brought(weight, device)

    @staticmethod
    def backward(ctx, g):
        takers = _takers.get(ctx.weight)
        for take in (takers or {}).values():
            take(g)
        return None if takers else g.to(ctx.weight.device), None


def brought(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a weight on the device."""
    return weight.to(device, copy=True)


class _Original(nn.Module):
    """A block's own forward as a module, to be called with other tensors in place of the block's weights."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.own = block, block.forward

    def forward(self, *args, **kwargs):
        return self.own(*args, **kwargs)


def _visited(block: nn.Module, device: torch.device) -> Callable:
    """A block's forward with its weights on the device."""
    original = _Original(block)

    def compute(*args, **kwargs):
        visitors = {n: _Visit.apply(p, device) for n, p in original.named_parameters() if p in _visits or p.device != device}   # adapters come and go
        return functional_call(original, visitors, args, kwargs)

    return computed_twice(compute)


def computed_twice(forward: Callable) -> Callable:
    """A forward that keeps nothing but its input for backward, and runs a second time when that reaches it.

    Not transformers' own: that one asks for training mode, in which some models drop out.
    """
    def run(*args, **kwargs):
        if torch.is_grad_enabled():
            return again(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    return run

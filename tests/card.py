"""An accelerator that is played: tensors that say they are on `cuda` and whose values are computed by the CPU.

It knows what a real one would complain of, tensors of two devices in one operation, and how many bytes of it are in use. What it computes is what the CPU
computes, so that the same bits can be asked for.
"""

import contextlib
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Module(_DummyBackendModule):
    """What torch asks of a kind of device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("card", Module())
DEVICE = torch.device("card:0")
CROSSES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default}


class Use:
    """Lives as long as a tensor that is on it; no weak reference to the tensor itself, which could then not be swapped with another."""


class Card:
    """What is in use of it, and the most that ever was.

    Attributes:
        used, peak: bytes.
        held: {address of a piece of memory: its bytes}, with something that uses it.
    """

    def __init__(self):
        self.users, self.held = Counter(), {}
        self.used = self.peak = 0

    def take(self, tensor: "OnCard") -> None:
        storage = tensor.values.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self.users[address] += 1
        if self.users[address] == 1:
            self.held[address] = size
            self.used += size
            self.peak = max(self.peak, self.used)
        tensor.use = Use()
        weakref.finalize(tensor.use, self.give, address)

    def give(self, address: int) -> None:
        self.users[address] -= 1
        if not self.users[address]:
            self.used -= self.held.pop(address)


card = Card()


class OnCard(torch.Tensor):
    """A tensor on it."""

    @staticmethod
    def __new__(cls, values):
        found = torch.Tensor._make_wrapper_subclass(cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
                                                    dtype=values.dtype, device=DEVICE)
        found.values = values
        card.take(found)
        return found

    def __repr__(self):
        return f"OnCard({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """An operation with any tensor or result on the card."""
    flat, spec = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, OnCard)]
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnCard)]
    target = next((d for d in flat if isinstance(d, torch.device)), None)
    if there and any(t.ndim for t in here) and func not in CROSSES and "index" not in str(func):
        raise RuntimeError(f"Expected all tensors to be on the same device, {func}: {[tuple(t.shape) for t in here]} on the host")
    args, kwargs = tree_unflatten([_on_host(one) for one in flat], spec)
    result = func(*args, **kwargs)
    known = {id(t.values): t for t in there}   # what an operation in place gives back
    known |= {id(t): t for t in here} if target is None or target.type != DEVICE.type else {}
    onto = target.type == DEVICE.type if target is not None else bool(there)
    return tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known and (onto or target is None) else OnCard(t) if onto else t, result)


def _on_host(one):
    """What takes the place of a tensor on the card, or of its name."""
    return one.values if isinstance(one, OnCard) else torch.device("cpu") if isinstance(one, torch.device) else one


class Present(TorchDispatchMode):
    """While on, what is made on `cuda` or sent there is made on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(one, OnCard) or isinstance(one, torch.device) and one.type == DEVICE.type for one in flat):
            return computed(func, args, kwargs or {})
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def present():
    """A new card, free of anything."""
    global card
    card = Card()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)   # a module sent to it keeps which of its weights are one
    try:
        with Present():
            yield card
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@torch.library.impl("aten::empty_strided", "privateuseone")
def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "privateuseone")
def copy_from(source, target, non_blocking=False):
    values = [t.values if isinstance(t, OnCard) else t for t in (source, target)]
    values[1].copy_(values[0])
    return target

"""Where tensors as large as the model live while a run keeps to a limit: outside the device's memory.

Outside means in the host's memory, where an accelerator's host has room, and else in files without a name, which the system reads and writes as they are
needed. What is computed there are the same bits.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil
import torch
from torch import nn

from dpruner import leftovers
from dpruner.errors import InputError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8   # of mallopt(3)
NO_MEMORY = ("can't allocate memory", "Cannot allocate memory")   # how torch says it of a CPU, and the system
SMALLEST = 2**16   # bytes below which a tensor stays where it is


@dataclass(frozen=True)
class Plan:
    """How a run keeps to its limit.

    Attributes:
        outside: scores, masks and, on a CPU, the weights live outside the device's memory.
        offload: on an accelerator, the weights of blocks too: each visits the device while it computes, and a second time for backward.
        checkpointing: a pass with gradients keeps the input of each block only, and computes the rest of it a second time.
        passes: over the calibration, each with gradients of a part of the weights.
        files: what lives outside lies in files; else in the memory of an accelerator's host.
    """

    outside: bool = False
    offload: bool = False
    checkpointing: bool = False
    passes: int = 1
    files: bool = False


_plan = Plan()
_folder: Path | None = None   # where files go


def plan() -> Plan:
    """The plan that is being followed."""
    return _plan


def parse_size(words: str) -> int:
    """Bytes of "16GB", "512 MiB" or "1.5g".

    Raises:
        InputError: it is no size, or none at all.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?I?)B?\s*", words.upper(), re.ASCII)
    usual = "it is an amount such as 16GB, 512MB or 7.5GiB"
    if found is None or found[2] not in UNITS:
        raise InputError(f"The memory {words!r} is not known", usual, "give one of this kind")
    size = int(Fraction(found[1]) * UNITS[found[2]])
    if not size:
        raise InputError(f"The memory {words!r} is too small", usual, "give more than 0")
    return size


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no more memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextlib.contextmanager
def following(plan: Plan, folder: Path) -> Iterator[None]:
    """While open, `copied`, `kept` and `zeros` put tensors outside where the plan says so.

    Args:
        folder: on a disk with room for some multiples of the model; nothing is left in it.
    """
    global _plan, _folder
    before = _plan, _folder
    _plan, _folder = plan, folder
    if plan.outside:
        give_back_at_once(2**16)   # with 2**20, activations and masks left holes of 150 MB
    try:
        yield
    finally:
        _plan, _folder = before


def give_back_at_once(least: int = 2**20) -> None:
    """Let the C library return what is freed to the system: by itself it keeps pieces for later, for every thread, in time as many as make a model.

    Args:
        least: bytes from which on a piece is given back; each then costs a call of the system and its pages anew.
    """
    with contextlib.suppress(OSError, AttributeError):   # other systems have other libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, least)
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def available_memory(device: str) -> int:
    """Bytes that are free on a device now, within the limit of a container where there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):   # "max" where the container has no limit of its own
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def _file(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in a file that has no name any more, so that the system removes it with its last user, however that ends."""
    count = torch.Size(shape).numel()
    _folder.mkdir(parents=True, exist_ok=True)
    path = _folder / f".outside.{leftovers.mark()}.tmp"
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, count * dtype.itemsize)   # a full disk says so here; later it would end the process
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)


def _room(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor outside."""
    return _file(shape, dtype) if _plan.files else torch.empty(shape, dtype=dtype)


def _lives_outside(tensor: torch.Tensor) -> bool:
    return _plan.outside and is_large(tensor)


def is_large(tensor: torch.Tensor) -> bool:
    """Whether a tensor is worth a way out of a device's memory."""
    return tensor.numel() * tensor.element_size() >= max(SMALLEST, 1)


def zeros(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros of the shape of a tensor, for results: outside where things live outside, else on its device."""
    return _room(like.shape, dtype or like.dtype).zero_() if _lives_outside(like) else torch.zeros_like(like, dtype=dtype)


def sums(like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros of the shape of a tensor, to add to with every batch: on its device, but outside a CPU's memory."""
    return zeros(like, dtype) if like.device.type == "cpu" else torch.zeros_like(like, dtype=dtype)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, outside where things live outside."""
    return _room(tensor.shape, tensor.dtype).copy_(tensor) if _lives_outside(tensor) else tensor.clone()


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that nothing else uses, for later: outside where things live outside, else as it is."""
    is_outside = tensor.untyped_storage().filename is not None if _plan.files else tensor.device.type == "cpu"
    return copied(tensor) if _lives_outside(tensor) and not is_outside else tensor


def holds_weights(device: torch.device) -> bool:
    """Whether the weights of a model on this device are to live outside too."""
    return _plan.outside and (device.type == "cpu" or _plan.offload)


def settle(model: nn.Module, dtype: torch.dtype, like: nn.Module) -> None:
    """Move the weights of a model outside, one after the other, in the precision asked for.

    Those of a checkpoint's own file, as it was loaded, would leave that file when they are changed.

    Args:
        like: the same model in that precision, on the meta device; its buffers say which precision they keep.
    """
    for p in model.parameters():
        p.data = copied(p.data.to(dtype))
    for name, buffer in model.named_buffers():
        buffer.data = buffer.data.to(like.get_buffer(name).dtype)

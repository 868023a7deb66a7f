"""Several processes that work on one run: `torchrun --nproc-per-node N -m dpruner prune …`.

The first process does the run as if it were alone, and only it writes. What takes long, a walk or a pass with gradients, it announces to the others:
each takes its share of the calibration, and sums and counts are added up over all of them.
"""

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dpruner import signals, turns
from dpruner.errors import InputError
from dpruner.hessian import Hessian
from dpruner.masks import precision
from dpruner.model import decoder_blocks, fingerprint

ALL = (signal.SIGINT, *signals.ENDING)   # signals that ask a process to end
GRACE = 10.0   # seconds that the first process gets to say why it ends
SAID = "the first process has said what is to be said"
PATIENCE = timedelta(days=30)   # the others wait while the first one evaluates, writes or has no turn yet

_busy = False   # whether the others are at work with the first process, and would not hear an announcement
_members: list[dict] = []   # who the processes are, in their order


class Lost(KeyboardInterrupt):
    """The first process has ended without a word. It may be met anywhere, and nothing that handles errors is to take it for one of its own.

    Attributes:
        first: its `turns.identity`.
    """

    def __init__(self):
        super().__init__("the first process has ended without a word")
        self.first = _members[0]


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def several() -> bool:
    """Whether this process is one of several."""
    return size() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not several() or dist.get_rank() == 0


@contextlib.contextmanager
def team() -> Iterator[bool]:
    """Join the processes that torchrun has started, if it has; yields whether this is the first, which the others then `follow`.

    The first alone is asked to end, by ctrl-C or what is taken as such; the others end with it.

    Raises:
        KeyboardInterrupt: in the first process, caused by an InputError when another one has ended.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield True
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    _members[:] = gathered(turns.identity())
    try:
        with signals.heard(_with_others) if first() else signals.heard(_with_first, ALL):
            yield first()
    finally:
        with contextlib.suppress(RuntimeError):   # they are gone already
            if first():
                _store().set(SAID, "")
            if first() and not _busy:
                dist.broadcast_object_list([None], device="cpu")
        dist.destroy_process_group()


def _store():
    """What torchrun keeps for its processes, and what outlives them."""
    return dist.distributed_c10d._get_default_store()


def _gone(who: dict) -> bool:
    return not turns.elsewhere(who) and not turns.lives(who)


def _first_has_said() -> bool:
    """Whether the first process said why it ends. It may be about to; and what has just been killed takes a moment to be gone."""
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(RuntimeError):
        while not (said := _store().check([SAID])) and not _gone(_members[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return said
    return False


def _with_others() -> BaseException:
    """The first process ends when it is asked to; torchrun also asks all when one has died."""
    stop = KeyboardInterrupt()
    stop.__cause__ = _left_alone() if any(map(_gone, _members)) else None
    return stop


def _with_first() -> BaseException | None:
    """Another process leaves it to the first to end."""
    return Lost() if _gone(_members[0]) else None


def _left_alone() -> InputError:
    return InputError("The run stopped in the middle", f"one of its {size()} processes has ended, killed or out of memory",
                      "resume it, with as many processes or another number: what it has finished is kept")


def _is_lost(error: BaseException) -> bool:
    """Whether an error is that of a connection to another process."""
    return isinstance(error, (Lost, dist.DistError)) or "gloo" in str(error)


@contextlib.contextmanager
def announced(model: nn.Module, work: Callable, **arguments) -> Iterator[None]:
    """While open, the others do `work(their model, **arguments)` along with the first process; nothing where there are no others.

    Raises:
        InputError: they have loaded another model, or one of them has ended.
    """
    global _busy
    if not several() or not first():
        yield
        return
    try:
        dist.broadcast_object_list([(work, arguments)], device="cpu")
        _busy = True
        _require_same(model)
        yield
    except RuntimeError as error:
        raise _left_alone() if _is_lost(error) else error from None
    _busy = False   # not after an error: then the others are left in the middle


def follow(load: Callable[[], nn.Module]) -> None:
    """Do whatever the first process announces, until it is done.

    Args:
        load: gives the model; called when there is something to do.

    Raises:
        Lost: the first process has ended, and has not said why; in one of the others.
    """
    model = None
    try:
        while True:
            received = [None]
            dist.broadcast_object_list(received, device="cpu")
            if received[0] is None:
                return
            work, arguments = received[0]
            model = load() if model is None else model
            _require_same(model)
            with contextlib.suppress(InputError):   # the first process meets it too, and says it
                work(model, **arguments)
    except (Lost, RuntimeError) as error:
        if not _is_lost(error):
            raise
        signals.ignore(ALL)   # torchrun is about to ask
        if dist.get_rank() == 1 and not _first_has_said():   # one of them is enough
            raise Lost from None


def _require_same(model: nn.Module) -> None:
    """Refuse processes whose models differ; asked once for each model."""
    if getattr(model, "_same_everywhere", False):
        return
    found = gathered(fingerprint(model))
    if len(set(found)) > 1:
        raise InputError("The processes cannot work together", "the model is not the same everywhere", "give each machine the same files")
    model._same_everywhere = True


def share(items: list) -> list:
    """This process's part of a list: every N-th item."""
    return items[dist.get_rank()::size()] if several() else items


def rounds(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """This process's batch of every round; where there are fewer batches than processes left, it repeats one."""
    return [batches[min(number, len(batches) - 1)] for number in range(dist.get_rank(), len(batches) + dist.get_rank(), size())]


def gathered(value) -> list:
    """What each process has, in their order."""
    if not several():
        return [value]
    found = [None] * size()
    dist.all_gather_object(found, value)
    return found


def add_up(hessian: Hessian) -> Hessian:
    """The Hessian over the tokens of all processes: sums and counts added up."""
    if several():
        dist.all_reduce(hessian.total)
        hessian.count = sum(gathered(hessian.count))
    return hessian


def spread(tensor: torch.Tensor) -> None:
    """Give the first process's tensor to all, in place."""
    if several():
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        if whole is not tensor:
            tensor.copy_(whole)


class Exchange(ReduceScatter):
    """In place of adding up the processes' gradients, each process gets its rows of every one of them.

    Each has a batch of its own, and what is made of their gradients, such as `Σ g_j²`, is not made of their sum.
    """

    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.received = torch.empty_like(input_tensor)
        dist.all_to_all_single(self.received, input_tensor, group=group)

    def gradients(self, g: DTensor) -> list[torch.Tensor]:
        """The processes' gradients in their order, of this process's rows of a parameter.

        Args:
            g: that parameter's gradient as FSDP hands it over: it has its place in the memory in which their sum would be.
        """
        g = g.to_local()
        return [part.as_strided(g.shape, g.stride(), part.storage_offset() + g.storage_offset()) for part in self.received.chunk(size())]


def sharded(model: nn.Module) -> tuple[nn.Module, Exchange]:
    """A copy of the model of which every process holds its share of each weight's rows, gathered block by block as they are needed (FSDP2).

    What its parameters get as gradients means nothing; the Exchange has those of all processes.
    """
    model, exchange = copy.deepcopy(model), Exchange()
    mesh = init_device_mesh(model.device.type, (size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(model.dtype, torch.float32))
    for part in (*decoder_blocks(model)[1], model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_custom_reduce_scatter(exchange)
    return model, exchange


def rows_of(tensor: torch.Tensor | None, parameter: DTensor) -> torch.Tensor:
    """This process's rows of a tensor shaped like a sharded parameter, which only the first process has to have."""
    local = parameter.to_local()
    everything = torch.empty(parameter.shape, dtype=precision(local), device=local.device) if tensor is None else tensor.to(local.device)
    return distribute_tensor(everything, parameter.device_mesh, [Shard(0)]).to_local()


def whole(part: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """A tensor shaped like a sharded parameter, put together from the parts of all processes."""
    return DTensor.from_local(part, parameter.device_mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride()).full_tensor()

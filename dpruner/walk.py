"""Run a decoder block by block: catch what enters each block, and what enters each linear."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from dpruner import distributed, memory, offload
from dpruner.errors import InputError
from dpruner.hessian import Hessian
from dpruner.masks import as_rows, precise
from dpruner.model import decoder_blocks, linears_of, require_batches, stored_transposed
from dpruner.partial import NOTHING, Checkpoint


def first(output):
    """The hidden states of a block's output: blocks return a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


TOKENS_PER_PASS = 1024   # enough to keep a processor busy; longer sequences pass alone


def stack(batches: list[torch.Tensor], batch_size: int | None = None) -> list[torch.Tensor]:
    """Join neighbours of equal length, however they were batched, into batches of `batch_size` sequences.

    Args:
        batches: LongTensors (b, seqlen).
        batch_size: default as many as make 1,024 tokens, at least one.
    """
    joined: list[list[torch.Tensor]] = []
    for row in (row for batch in batches for row in batch.split(1)):
        if joined and len(joined[-1]) < (batch_size or TOKENS_PER_PASS // row.shape[1]) and joined[-1][0].shape == row.shape:
            joined[-1].append(row)
        else:
            joined.append([row])
    return [torch.cat(rows) for rows in joined]


class Recorder:
    """What each block is called with, one entry a batch, its hidden states apart from the rest.

    Args that are equal to the previous batch's (rotary tables, causal masks) are kept once.
    """

    def __init__(self, blocks: nn.ModuleList):
        self.calls: list[list[tuple[tuple, dict]]] = [[] for _ in blocks]
        self.hidden: list[torch.Tensor] = []

    def keep(self, index: int, args: tuple, kwargs: dict) -> torch.Tensor:
        """Remember a call of block `index`; returns its hidden states (batch, seqlen, hidden)."""
        args, kwargs = list(args), dict(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        args, kwargs = [None, *args[1:]] if args else [], {k: None if k == "hidden_states" else v for k, v in kwargs.items()}
        if index == 0:
            self.hidden.append(memory.kept(hidden))
        if self.calls[index]:
            old_args, old_kwargs = self.calls[index][-1]
            args = [_shared(a, b) for a, b in zip(args, old_args, strict=True)]
            kwargs = {k: _shared(v, old_kwargs.get(k)) for k, v in kwargs.items()}
        self.calls[index].append((tuple(args), kwargs))
        return hidden


def _shared(new, old):
    """`old` where both are equal tensors (or tuples of such), so that equal masks and rotary tables take memory once."""
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(n, o) for n, o in zip(new, old, strict=True))
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor) and new.shape == old.shape and new.dtype == old.dtype:
        return old if new is old or torch.equal(new, old) else new
    return new


@contextlib.contextmanager
def _passing_through(blocks: nn.ModuleList, recorder: Recorder):
    """Blocks that record their call and hand their input on. The first call of each runs for real, to learn what it returns."""
    returns: dict[int, object] = {}

    def patched(index, original):
        def forward(*args, **kwargs):
            hidden = recorder.keep(index, args, kwargs)
            if index not in returns:
                returns[index] = original(*args, **kwargs)
                return returns[index]
            return (hidden, *returns[index][1:]) if isinstance(returns[index], tuple) else hidden
        return forward

    with _forwards(blocks, patched):
        yield


@contextlib.contextmanager
def checkpointing(blocks: nn.ModuleList) -> Iterator[None]:
    """While open, and where the memory's plan says so, blocks are computed twice where there is a backward pass: the same bits in less memory."""
    with _forwards(blocks, lambda index, original: offload.computed_twice(original)) if memory.plan().checkpointing else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _forwards(blocks: nn.ModuleList, replaced: Callable[[int, Callable], Callable]):
    """While open, blocks run `replaced(index, their own forward)`."""
    before = [block.__dict__.get("forward") for block in blocks]   # accelerate, for one, puts its own there
    try:
        for index, block in enumerate(blocks):
            block.forward = replaced(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


@torch.no_grad()
def block_calls(model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor]) -> Recorder:
    """Everything the blocks need to be run one at a time on `batches`, without computing them.

    Each block's own arguments are kept, because they differ between blocks (sliding windows, per-layer inputs).

    Args:
        batches: LongTensors (b, seqlen).
    """
    recorder = Recorder(blocks)
    with _passing_through(blocks, recorder):
        for ids in batches:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)   # nobody asks for the words that its head would predict
    return recorder


def run_block(block: nn.Module, hidden: torch.Tensor, call: tuple[tuple, dict]) -> torch.Tensor:
    """One block on one batch: hidden states (b, seqlen, hidden) to hidden states of the same shape."""
    args, kwargs = call
    hidden = hidden.to(offload.computes_on(next(block.parameters())))   # they may have waited outside it
    if args:
        return first(block(hidden, *args[1:], **kwargs))
    return first(block(**{**kwargs, "hidden_states": hidden}))


@contextlib.contextmanager
def linear_inputs(linears: dict[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While open, the inputs of each linear since the dict was last cleared: {name: [tensor (..., in), ...]}."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def keep(_module, args):
            seen.setdefault(name, []).append(args[0])
        return keep

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()


def sharing(seen: dict[str, list[torch.Tensor]]) -> list[list[str]]:
    """Names grouped by the tensors they received: linears fed by the very same tensors share one group (q/k/v, gate/up)."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensors in seen.items():
        groups.setdefault(tuple(id(t) for t in tensors), []).append(name)
    return list(groups.values())


Progress = Callable[[str, int, int], None]   # stage, steps done, steps in all


def quiet(stage: str, done: int, total: int) -> None:
    """Progress nobody watches."""


@contextlib.contextmanager
def _original_weights(linears: dict[str, nn.Module]):
    """The linears' weights come back bit for bit on exit."""
    originals = {n: m.weight.detach().clone() for n, m in linears.items()}
    try:
        yield
    finally:
        for name, m in linears.items():
            m.weight.data.copy_(originals[name])


@torch.no_grad()
def walk(model: nn.Module, calibrations: list[list[torch.Tensor]], visit: Callable | None,
         results: Mapping[str, Mapping[str, torch.Tensor]] | None = None, *, update: bool = True, stage: str = "walk",
         progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> None:
    """Go through the decoder block by block with the Hessian of every linear, as SparseGPT does (METHOD section 2).

    In a block the Hessians of all linears are taken with the block's own weights, on inputs that the blocks before it produced after their
    update. Linears fed by the same tensor share one Hessian and are visited together. Of what no text was seen to reach, such as an expert
    without a token, or a linear whose weight the model takes without calling it, all inputs count alike. The model's weights are untouched
    afterwards.

    Args:
        calibrations: one or more sets of calibration batches, each a list of LongTensors (b, seqlen); their Hessians stay apart.
        visit: `visit(rows, hessians)` with rows = {name: float32 weight (out, in), a copy} and hessians = one Hessian per set;
            returns the new rows by name where `update` is set. None in a process that follows another one: it takes its share of the
            calibration, and its weights from there.
        results: {what: {name: Tensor}} that `visit` fills in place, block by block.
        update: let the updated block produce the inputs of the next one; otherwise every block sees what the dense model would give it.
        stage, progress: what is reported after every block.
        checkpoint: where results and the inputs of the next block are kept after a block, and from which an earlier walk is continued.

    Raises:
        InputError: a calibration set is empty or too long for the model, or the model overflows on it.
    """
    for batches in calibrations:
        require_batches(model, batches)
    with distributed.announced(model, walk, calibrations=calibrations, visit=None, update=update):
        _walk(model, calibrations, visit, results or {}, update, stage, progress, NOTHING if distributed.several() else checkpoint)


def _walk(model, calibrations, visit, results, update, stage, progress, checkpoint) -> None:
    _, blocks = decoder_blocks(model)
    sets = []
    for batches in calibrations:
        # always the same passes, however the caller batched: which of two equal scores goes can hang on the last bit, and in a walk all that
        # follows hangs on which
        batches = distributed.share(stack(batches))
        recorder = block_calls(model, blocks, batches)
        sets.append((recorder.hidden, recorder.calls))
    start, saved = checkpoint.load()
    _restore(saved, results, sets)
    for index, block in enumerate(blocks):
        linears = linears_of(model, block)
        if index < start:
            for _, calls in sets:
                calls[index] = None
            continue
        progress(stage, index, len(blocks))
        # without an update the pass that collects the inputs is the pass that makes the next block's
        hessians = [_collect(block, linears, hidden, calls[index], keep_output=not update) for hidden, calls in sets]
        with _original_weights(linears) if update else contextlib.nullcontext():
            for names in _groups(linears, distributed.gathered({names for found in hessians for names in found})):
                rows = {n: _rows_of(linears[n]) for n in names}
                like = rows[names[0]]
                of_sets = [distributed.add_up((found.get(names) or Hessian(like.shape[1])).to(like)) for found in hessians]
                _require_finite(of_sets, names[0])
                if not any(h.count for h in of_sets):
                    for h in of_sets:
                        h.total.fill_diagonal_(1)
                new = visit(rows, of_sets) if visit else rows
                for n in names if update else ():
                    as_rows(linears[n].weight.data, stored_transposed(linears[n])).copy_(new[n])
                    distributed.spread(linears[n].weight.data)
            if update:
                for hidden, calls in sets:
                    for j, x in enumerate(hidden):
                        hidden[j] = memory.kept(run_block(block, x, calls[index][j]))
        for _, calls in sets:
            calls[index] = None
        checkpoint.offer(index + 1, lambda: {_HIDDEN.format(k, j): x for k, (hidden, _) in enumerate(sets) for j, x in enumerate(hidden)},
                         {f"{what} {n}": found[n] for what, found in results.items() for n in linears})
    progress(stage, len(blocks), len(blocks))


def _groups(linears: Mapping[str, nn.Module], seen: Iterable[set[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """The linears of a block that are visited together; alone what no text was seen to reach.

    Args:
        seen: the groups that each process has seen.
    """
    groups = sorted(set().union(*seen))
    reached = {name for names in groups for name in names}
    return groups + [(name,) for name in linears if name not in reached]


def _require_finite(hessians: list[Hessian], name: str) -> None:
    """Refuse text on which the model overflows.

    Raises:
        InputError: names a linear into which NaN or infinite values flow.
    """
    if not all(torch.isfinite(h.total.diagonal()).all() for h in hessians):
        raise InputError(f"What flows into {name} is not finite", "the model overflows on the calibration text in its precision",
                         "use bfloat16 or float32, or other calibration text")


def _rows_of(linear: nn.Module) -> torch.Tensor:
    """A copy of a linear's weight (out, in) where it is used, in the precision of scores."""
    weight = linear.weight.detach()
    return precise(as_rows(weight.to(offload.computes_on(linear.weight), copy=True), stored_transposed(linear)))


_HIDDEN = "hidden {} {}"   # set, batch


def _restore(saved: Mapping[str, torch.Tensor], results, sets) -> None:
    """Put what a checkpoint holds into results and hidden states."""
    for what, found in results.items():
        for name, tensor in found.items():
            if f"{what} {name}" in saved:
                tensor.copy_(saved[f"{what} {name}"])
    for k, (hidden, _) in enumerate(sets):
        for j, x in enumerate(hidden):
            if _HIDDEN.format(k, j) in saved:
                # a copy, laid out in memory as a computed tensor is, lest the last bits of a product hang on where a file put it
                hidden[j] = saved[_HIDDEN.format(k, j)].to(x.device, copy=True)


def _collect(block, linears, hidden, calls, keep_output) -> dict[tuple[str, ...], Hessian]:
    """Hessian of each group of linears of one block; replaces `hidden` by the block's output where `keep_output`."""
    found: dict[tuple[str, ...], Hessian] = {}
    with linear_inputs(linears) as seen:
        for j, x in enumerate(hidden):
            output = run_block(block, x, calls[j])
            for names in sharing(seen):
                inputs = seen[names[0]]
                if tuple(names) not in found:
                    found[tuple(names)] = Hessian(inputs[0].shape[-1])
                for tensor in inputs:
                    found[tuple(names)].add(tensor)
            seen.clear()
            if keep_output:
                hidden[j] = memory.kept(output)
    return found

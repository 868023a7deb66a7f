"""Domain importance: one forward and one backward pass per batch, each gradient consumed as it appears (METHOD sections 3 and 4)."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dpruner import distributed, memory, offload
from dpruner.errors import InputError
from dpruner.formulas import DEFAULT_LAM, FORMULAS, Fisher, balanced, relative_, require_lam
from dpruner.masks import Scores, precise
from dpruner.model import prunable_linears, require_batches, transposed_names
from dpruner.partial import NOTHING, Checkpoint
from dpruner.walk import Progress, quiet, stack

ALPHA = 0.03              # learning rate of the published recipe, α of the penalty
SMALLEST_PART = 2**18     # weights below which a gradient is not taken in parts
HALF_SCALE = 2.0**10      # keeps small gradients of a float16 model from vanishing; divided out again


@dataclass(frozen=True)
class FineTune:
    """Full fine-tuning while scoring, as the paper does: fused SGD ("LOMO"), with no optimiser state."""

    lr: float = 0.03          # at the top of the schedule; also the α of the penalty
    warmup: float = 0.1       # share of the steps over which it rises from 0, before it falls to 0 linearly
    clip: float = 1.0         # largest norm of the whole gradient
    epochs: int = 5
    batch_size: int = 8       # sequences a step
    seqlen: int = 1024        # longer sequences are cut

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = max(1, round(self.warmup * steps))
        return self.lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise))


@dataclass(frozen=True)
class DomainImportance:
    """What one domain pass gives, each {name: float32 Tensor as stored}.

    `dual` regards both sides, `domain` is the same formula without its G term, `general` is G. `losses` holds the mean next-token loss of
    every batch, in nats.
    """

    dual: Scores
    domain: Scores
    general: Scores
    losses: list[float] = field(default_factory=list)


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token in nats, a scalar, for ids (b, seqlen)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(precise(logits.flatten(0, 1)), ids[:, 1:].flatten())


@contextlib.contextmanager
def consumed_gradients(parameters: Mapping[str, nn.Parameter], consume: Callable[[str, torch.Tensor], None]):
    """While open, these parameters ask for gradients, and backward hands each over the moment it is complete and frees it.

    `requires_grad` is as before on exit.
    """
    before = {n: p.requires_grad for n, p in parameters.items()}
    handles = []
    try:
        for name, p in parameters.items():
            p.requires_grad_(True)
            handles.append(offload.taken(p, functools.partial(consume, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.requires_grad_(before[name])
            p.grad = None


@contextlib.contextmanager
def _frozen(model: nn.Module):
    """No parameter asks for a gradient; as before on exit."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        yield
    finally:
        for p, wanted, grad in before:
            p.requires_grad_(wanted)
            p.grad = grad


@contextlib.contextmanager
def _restored(model: nn.Module):
    """Every parameter comes back bit for bit; the copies wait on the host."""
    originals = [(p, memory.copied(p.detach().cpu())) for p in model.parameters()]
    try:
        yield
    finally:
        for p, original in originals:
            p.data.copy_(original)


def _backward(model, ids, number) -> float:
    """One forward and one backward pass; returns the loss.

    Raises:
        InputError: the loss is NaN or infinite.
    """
    loss = next_token_loss(model, ids)
    value = loss.item()
    _require_finite(value, number)
    (loss * _loss_scale(model)).backward()
    return value


def _loss_scale(model) -> float:
    return HALF_SCALE if model.dtype == torch.float16 else 1.0


def parts_of(shape: torch.Size, largest: int) -> list[slice]:
    """Runs of rows of a weight, so that what is computed on a gradient takes little memory beside it: a sixteenth of the largest weight each."""
    size = max(1, max(largest // 16, SMALLEST_PART) // (shape.numel() // shape[0]))
    return [slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


def stream_gradients(model: nn.Module, batches: list[torch.Tensor], consume: Callable[[str, torch.Tensor, slice], None], *, stage: str,
                     names: Collection[str] | None = None, progress: Progress = quiet, sums: Mapping[str, torch.Tensor] | None = None,
                     checkpoint: Checkpoint = NOTHING) -> list[float]:
    """Hand over the gradient of every prunable weight on every batch, never keeping more than about one of them.

    Args:
        names: of the weights whose gradients are wanted; None for all.
        batches: LongTensors (b, seqlen); each gives one gradient of its mean next-token loss.
        consume: `consume(name, g, part)` with g the float32 gradient of the rows `part` of the weight as stored; it may be overwritten.
        sums: every tensor that `consume` changes, in place.
        checkpoint: where they are kept after a batch, and from which an earlier pass is continued.

    Returns:
        The batches' losses, in nats.

    Raises:
        InputError: no batches, too long ones, or a loss that is not finite.
    """
    require_batches(model, batches, least=2)
    linears = {n: m for n, m in prunable_linears(model).items() if names is None or n in names}
    take = _by_parts(linears, consume, _loss_scale(model))
    sums = sums or {}
    start, losses = _continued(checkpoint, sums)
    with _frozen(model), consumed_gradients({n: m.weight for n, m in linears.items()}, take):
        for number, ids in enumerate(batches[start:], start + 1):
            progress(stage, number - 1, len(batches))
            losses.append(_backward(model, ids.to(model.device), number))
            checkpoint.offer(number, lambda: _with_losses(sums, losses))
    progress(stage, len(batches), len(batches))
    return losses


def _require_finite(loss: float, number: int) -> None:
    if not math.isfinite(loss):
        raise InputError(f"The loss of calibration batch {number} is {loss}", "the model overflows on this text in its precision",
                         "use bfloat16 or float32, or other calibration text")


def _continued(checkpoint: Checkpoint, sums: Mapping[str, torch.Tensor]) -> tuple[int, list[float]]:
    """(batches done, their losses) of an earlier pass, whose sums are put in place."""
    start, saved = checkpoint.load()
    if not saved.keys() >= set(sums):   # of a pass over other weights
        start = 0
    for name, total in sums.items() if start else ():
        total.copy_(saved[name])
    return start, saved["losses"].tolist() if start else []


def _with_losses(sums: Mapping[str, torch.Tensor], losses: list[float]) -> dict[str, torch.Tensor]:
    return {**sums, "losses": torch.tensor(losses, dtype=torch.float64)}


def _by_parts(linears, consume, scale: float):
    """`consume` for whole gradients in the model's precision, multiplied by the loss scale."""
    largest = max(m.weight.numel() for m in linears.values())
    parts = {n: parts_of(m.weight.shape, largest) for n, m in linears.items()}

    def take(name, g):
        for part in parts[name]:
            consume(name, precise(g[part]) if scale == 1 else precise(g[part]).div_(scale), part)
    return take


def _tune_and_stream(model, batches, consume, tune: FineTune, *, stage, progress, sums, checkpoint) -> list[float]:
    """As `stream_gradients`, with a step of SGD after each batch. The first backward pass measures the norm and is scored, the second updates."""
    batches = [b[:, :tune.seqlen] for b in batches]
    require_batches(model, batches, least=2)
    batches = stack(batches, tune.batch_size) * tune.epochs
    trainable = dict(model.named_parameters())
    prunable = prunable_linears(model)
    scale = _loss_scale(model)
    take = _by_parts(prunable, consume, scale)
    with _frozen(model), _restored(model):
        state = {**sums, **{f"parameter {n}": p.data for n, p in trainable.items()}}   # the tuned weights are what the next step starts from
        start, losses = _continued(checkpoint, state)
        for step, ids in enumerate(batches[start:], start):
            progress(stage, step, len(batches))
            squares = {}

            def measure(name, g):
                squares[name] = (precise(g).norm() / scale).square()
                if name in prunable:
                    take(name, g)

            ids = ids.to(model.device)
            with consumed_gradients(trainable, measure):
                losses.append(_backward(model, ids, step + 1))
            norm = torch.stack([squares[n] for n in trainable if n in squares]).sum().sqrt().item()   # in an order that no backward pass decides
            shrink = tune.rate(step, len(batches)) * min(1.0, tune.clip / (norm + 1e-6)) / scale
            with consumed_gradients(trainable, lambda name, g: trainable[name].data.add_(g.to(trainable[name].device), alpha=-shrink)):
                _backward(model, ids, step + 1)
            checkpoint.offer(step + 1, lambda: _with_losses(state, losses))
        progress(stage, len(batches), len(batches))
    return losses


def domain_importance(model: nn.Module, batches: list[torch.Tensor], G: Mapping[str, torch.Tensor], formula: str = "balanced",
                      lam: float | None = None, *, means: str = "matrix", alpha: float = ALPHA, finetune: FineTune | None = None,
                      passes: int = 1, progress: Progress = quiet, checkpoint: Checkpoint = NOTHING) -> DomainImportance:
    """Score every prunable weight for a domain, alone and together with general importance (METHOD sections 3 and 4).

    Args:
        model: a decoder; its weights are untouched afterwards.
        batches: domain calibration, LongTensors (b, seqlen). Each is one gradient g_j, so how sequences are batched matters; the pipeline gives
            one sequence a batch.
        G: general importance, as `general_importance` returns it.
        formula: "balanced", "taylor" or "release".
        lam: weight λ of the general side; default 1, and 0.1 for "release" as published.
        means: "matrix" or "model", for "balanced"; see there.
        alpha: rate α of the gradient step that the penalty looks at; with fine-tuning its learning rate.
        finetune: fine-tune while scoring, as the paper does. "taylor" and "release" then use each step's weights, "balanced" the original ones,
            which are the ones that the mask removes.
        passes: over the batches, each for a part of the weights: less memory on an accelerator, the same bits. One where it fine-tunes.
        progress: called with ("domain importance", batches done, batches).
        checkpoint: see `stream_gradients`.

    Returns:
        DomainImportance; `.dual` and `.domain` come from the same pass.

    Raises:
        InputError: unknown formula, negative λ, G of another model, no batches, or a loss or score that is not finite.
    """
    if formula not in FORMULAS:
        raise InputError(f"The formula {formula!r} is not known", "a score is computed by one of three", f"choose one of {', '.join(FORMULAS)}")
    lam = DEFAULT_LAM[formula] if lam is None else lam
    require_lam(lam)
    linears = prunable_linears(model)
    if set(G) != set(linears) or any(G[n].shape != m.weight.shape for n, m in linears.items()):
        raise InputError("The general importance does not fit the model", "its names or shapes are those of other weights",
                         "compute it with general_importance on this very model")
    alpha = finetune.lr if finetune else alpha
    found: dict[str, dict[str, torch.Tensor]] = {}
    for part, watched in passes_over(linears, 1 if finetune else passes, "domain importance", progress, checkpoint):
        scores, losses = score_batches(model, batches, part, FORMULAS[formula], G, lam, alpha, finetune, **watched)
        found |= scores
    domain, dual = (Scores({n: s[what] for n, s in found.items() if what in s}, transposed_names(model)) for what in ("domain", "dual"))
    del found
    if formula == "balanced":
        domain = relative_(domain, means)
        dual = balanced(domain, G, lam, means)
    for name, scores in dual.items():
        if not torch.isfinite(scores.max()):   # NaN is passed on by the maximum
            raise InputError(f"The scores of {name} are not finite", "its gradients overflowed", "use bfloat16 or float32, or fewer batches")
    return DomainImportance(dual, domain, Scores({n: G[n] for n in linears}, dual.transposed), losses)   # G may come from a file, in its own order


def score_batches(model: nn.Module, batches: list[torch.Tensor], names: Collection[str], formula: type, G: Mapping[str, torch.Tensor] | None = None,
                  lam: float = 0.0, alpha: float = 0.0, finetune: FineTune | None = None, *, stage: str, progress: Progress = quiet,
                  checkpoint: Checkpoint = NOTHING) -> tuple[dict[str, dict[str, torch.Tensor]], list[float]]:
    """One pass over the batches with a formula. Several processes share the batches, unless the model is tuned from one to the next.

    Args:
        names: of the weights that are scored.
        formula: a class of `formulas`.
        stage, progress, checkpoint: as in `stream_gradients`.

    Returns:
        ({name: the formula's scores}, the batches' losses in nats).
    """
    watched = {"stage": stage, "progress": progress, "checkpoint": checkpoint}
    if distributed.several() and not finetune:
        require_batches(model, batches, least=2)
        with distributed.announced(model, _share_batches, batches=batches, names=names, formula=formula, lam=lam, alpha=alpha):
            return _share_batches(model, batches, names, formula, lam, alpha, G, stage, progress)
    linears = prunable_linears(model)
    # where the gradients are; tuned weights are looked at where they are tuned
    weights = {n: linears[n].weight.data if finetune else linears[n].weight.data.to(offload.computes_on(linears[n].weight)) for n in names}
    sums = {n: formula(w, G and G[n].to(w.device), lam, alpha) for n, w in weights.items()}

    def consume(name, g, part):
        sums[name].add(g.to(weights[name].device), part)

    watched["sums"] = {f"{what} {n}": total for n, s in sums.items() for what, total in s.sums.items()}
    losses = _tune_and_stream(model, batches, consume, finetune, **watched) if finetune else stream_gradients(model, batches, consume, names=names, **watched)
    return {n: {what: memory.kept(s) for what, s in sums.pop(n).scores(len(losses)).items()} for n in names}, losses


def _share_batches(model, batches, names, formula, lam, alpha, G=None, stage="", progress=quiet):
    """What each of several processes does: it takes every N-th batch, and the rows of the weights that are its own from the gradient of every batch.

    It adds them up in the order of the batches, so that the sums are those of one process, bit for bit.
    """
    parts, exchange = distributed.sharded(model)
    weights = {n: m.weight for n, m in prunable_linears(parts).items() if n in names}
    sums = {n: formula(w.detach().to_local(), distributed.rows_of(G and G[n], w) if formula.regards_general else None, lam, alpha)
            for n, w in weights.items()}
    scale, losses = _loss_scale(model), []

    def take(name, g):
        for other in exchange.gradients(g)[:len(losses) - before]:
            sums[name].add(precise(other).div_(scale), slice(0, len(other)))

    with _frozen(parts), consumed_gradients(weights, take):
        for mine in distributed.rounds(batches):
            before = len(losses)
            progress(stage, before, len(batches))
            loss = next_token_loss(parts, mine.to(model.device))
            for value in distributed.gathered(loss.item())[:len(batches) - before]:
                losses.append(value)
                _require_finite(value, len(losses))
            (loss * scale).backward()
    progress(stage, len(batches), len(batches))
    found: dict[str, dict[str, torch.Tensor]] = {n: {} for n in weights}
    for name, w in weights.items():
        for what, s in sums.pop(name).scores(len(losses)).items():
            s = distributed.whole(s, w)   # all processes take part in it
            if distributed.first():
                found[name][what] = memory.kept(s)
    return found, losses


def passes_over(linears: Mapping[str, nn.Module], passes: int, stage: str, progress: Progress,
                checkpoint: Checkpoint) -> Iterator[tuple[list[str], dict]]:
    """The weights in as many parts as there are passes over the calibration, near-equal ones, and what each pass is given.

    Yields:
        (names, {"stage", "progress", "checkpoint"}); progress counts the batches of all passes.
    """
    whole = sum(m.weight.numel() for m in linears.values())
    parts, done = [[] for _ in range(passes)], 0
    for name, m in linears.items():
        parts[min(passes - 1, done * passes // whole)].append(name)
        done += m.weight.numel()
    parts = [part for part in parts if part]
    for number, part in enumerate(parts):
        def told(stage, step, steps, number=number):
            if step or not number:   # a stage begins once
                progress(stage, number * steps + step, len(parts) * steps)
        yield part, {"stage": stage, "progress": told, "checkpoint": checkpoint.part(number) if len(parts) > 1 else checkpoint}


def fisher_diagonal(model: nn.Module, batches: list[torch.Tensor], *, stage: str = "fisher", passes: int = 1, progress: Progress = quiet,
                    checkpoint: Checkpoint = NOTHING) -> Scores:
    """Diagonal of the empirical Fisher, `mean_j g_j²`, of every prunable weight.

    Args:
        batches: LongTensors (b, seqlen), one gradient each.
        passes: over the batches, each for a part of the weights.

    Returns:
        Scores, float32, shaped as stored.
    """
    linears, found = prunable_linears(model), Scores({}, transposed_names(model))
    for part, watched in passes_over(linears, passes, stage, progress, checkpoint):
        scores, _ = score_batches(model, batches, part, Fisher, **watched)
        found |= {n: s["fisher"] for n, s in scores.items()}
    return found

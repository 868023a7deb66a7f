"""The models of a finished run: the original as it was pruned, and each pruned variant of it."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from dpruner.config import RunConfig, split_domain
from dpruner.errors import InputError
from dpruner.loading import ROOM, load_model
from dpruner.masks import pruned
from dpruner.memory import parse_size
from dpruner.model import fingerprint
from dpruner.store import Run

DENSE = "dense"   # the method's name where nothing is pruned


def load_original(run: Run, device: str | None = None, room: float = ROOM):
    """The model a run pruned, dense, in the precision it had there.

    Args:
        device, room: as `load_model` takes them; the device by default the run's own.

    Returns:
        (model in eval mode, tokenizer).

    Raises:
        InputError: it cannot be loaded, or its weights have changed since the run.
    """
    record = run.record
    config = RunConfig.from_dict(record["config"])
    if "model" not in record:
        raise InputError(f"The run {run.id} holds no model yet", "it has not begun", "wait until it has, or choose another run")
    model, tokenizer = load_model(config.model, revision=record["model"]["commit"] or config.revision, device=device or config.device,
                                  dtype=record["device"]["precision"], most=config.memory and parse_size(config.memory), room=room)
    if fingerprint(model) != record["model"]["fingerprint"]:
        raise InputError(f"The model {config.model!r} is not the one that was pruned", "its weights have changed since the run",
                         "restore the model, or run again")
    return model, tokenizer


def require_variant(run: Run, method: str, domain: str) -> None:
    """Refuse what the run has not pruned.

    Raises:
        InputError: names what it holds.
    """
    if (method, domain) not in run.pairs():
        raise InputError(f"The run {run.id} holds no mask of {method} for {domain}", f"it holds {', '.join(f'{m}@{d}' for m, d in run.pairs()) or 'none'}",
                         "choose one of these")


def chosen(run: Run, methods: Sequence[str] | None = None, domains: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(method, domain) of the variants of a run that were asked for, in the order of its settings; all where nothing was.

    Raises:
        InputError: the run holds none, or not one that was asked for.
    """
    config = RunConfig.from_dict(run.config)
    if not run.pairs():
        raise InputError(f"The run {run.id} holds no mask yet", "it has pruned nothing so far", "wait until it is done, or choose another run")
    found = [(m, d) for d in domains or [split_domain(d)[0] for d in config.domains] for m in methods or config.methods]
    for method, domain in found:
        require_variant(run, method, domain)
    return found


def label(method: str, domain: str) -> str:
    """The name of a variant: method@domain, or "dense"."""
    return DENSE if method == DENSE else f"{method}@{domain}"


@contextlib.contextmanager
def variant(model: nn.Module, run: Run, method: str, domain: str) -> Iterator[nn.Module]:
    """The original with a method's mask and, where it moved the kept weights, its weights; dense again on exit, whatever happens inside.

    Args:
        model: of `load_original`.
        method: of the run, or "dense" for the model as it is, whatever the domain.

    Raises:
        InputError: the run holds no such mask.
    """
    if method == DENSE:
        yield model
        return
    require_variant(run, method, domain)
    with pruned(model, run.masks(method, domain), run.weights(method, domain)):
        yield model

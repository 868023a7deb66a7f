"""The one model in memory: loaded once for all sessions, used by one at a time, never left pruned."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import streamlit as st
import torch

from analysis.chart import percent
from analysis.sparsity import at_least, threshold
from app import data
from dpruner.config import RunConfig
from dpruner.errors import InputError
from dpruner.masks import pruned
from dpruner.loading import load_model, pick_device, quiet_libraries
from dpruner.model import fingerprint
from dpruner.store import LazyMasks, Run, opened

DENSE = "dense"
_turn = threading.Lock()   # of the process: masks are applied to the one copy that every session shares
_key: tuple | None = None  # of the model that is in memory


class Resident(NamedTuple):
    """A loaded model; only to be used inside `taken`."""

    model: torch.nn.Module
    tokenizer: object
    fingerprint: str


@st.cache_resource(max_entries=1, show_spinner=False)
def _loaded(name: str, revision: str | None, device: str, dtype: str) -> Resident:
    with quiet_libraries():
        model, tokenizer = load_model(name, revision=revision, device=device, dtype=dtype)
    return Resident(model, tokenizer, fingerprint(model))


def clear() -> None:
    """Let the model go; only inside a turn."""
    global _key
    _key = None
    _loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def waits(place) -> Callable[[], None]:
    """What to call while another session has the model: a word on it in that place of the page."""
    return lambda: place.info("Waiting for its turn: another session uses the model.", icon=":material/hourglass:")


@contextlib.contextmanager
def turn(waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have the model for oneself.

    Args:
        waiting: called again and again while another session has it; a page that is closed meanwhile ends there.
    """
    while not _turn.acquire(timeout=0.2):
        waiting()
    try:
        yield
    finally:
        _turn.release()


@contextlib.contextmanager
def taken(run: Run, waiting: Callable[[], None] = lambda: None) -> Iterator[Resident]:
    """The dense model of a run, for oneself until the end of the `with`; the one before it is let go before it is loaded.

    Raises:
        InputError: it cannot be loaded, is not the one that was pruned, or does not fit into memory.
    """
    global _key
    config, record = RunConfig.from_dict(run.config), run.record
    key = (config.model, record["model"]["commit"] or config.revision, _device(config.device), record["device"]["precision"])
    with turn(waiting), _enough_memory(config.model):
        if _key != key:
            clear()
        found = _loaded(*key)
        _key = key
        if found.fingerprint != record["model"]["fingerprint"]:
            clear()
            raise InputError(f"The model {config.model!r} is not the one that was pruned", "its weights have changed since the run",
                             "restore the model, or run again")
        yield found


def load_ahead(run: Run) -> None:
    """The dense model of a run into memory before it is asked for, unless that holds another; what hinders it is said once it is asked for."""
    if _key is None:
        with contextlib.suppress(InputError), taken(run):
            pass


@contextlib.contextmanager
def variant(found: Resident, run: Run, method: str, domain: str, sparsity: float) -> Iterator[torch.nn.Module]:
    """The resident model with one mask applied, or as it is for the method "dense"; it is dense again afterwards, whatever happens inside.

    Args:
        sparsity: the run's own gives its very masks and moved weights, any other cuts the ranks.
    """
    if method == DENSE:
        yield found.model
        return
    own = data.own_masks(run, sparsity)
    masks, weights = masks_at(run, method, domain, sparsity), run.weights(method, domain) if own else None
    with pruned(found.model, masks, weights) as model:
        del masks, weights   # gigabytes for a large model
        yield model


def masks_at(run: Run, method: str, domain: str, sparsity: float) -> Mapping[str, torch.Tensor]:
    """{matrix: BoolTensor} at a sparsity, each read when it is asked for.

    Raises:
        InputError: the method leaves no ranks, so it has masks at the run's own sparsity only.
    """
    if data.own_masks(run, sparsity):
        return LazyMasks(run.path("masks", method, domain))
    path = run.path("ranks", method, domain)
    if not path.is_file():
        raise InputError(f"{method} can be shown at its own sparsity only",
                         "its scores exist only while it prunes, so the run keeps no ranks",
                         f"set the sparsity to {percent(data.own_sparsity(run), 0)}, or choose another method")
    with opened(path) as file:
        return {n: torch.from_numpy(at_least(file.get_tensor(n).numpy(), threshold(sparsity))) for n in file.keys()}


def _device(wanted: str | None) -> str:
    """The run's own device, or the best there is where this machine has no such one."""
    with contextlib.suppress(InputError):
        return str(pick_device(wanted))
    return str(pick_device(None))


@contextlib.contextmanager
def _enough_memory(name: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        clear()
        raise InputError(f"The model {name!r} does not fit into memory", "other programs or runs leave too little of it",
                         "wait until they have ended, or choose a run of a smaller model") from error

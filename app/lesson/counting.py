"""What λ changes in the whole model, for a sentence of the user: counted matrix by matrix, and kept, so that an interruption loses nothing."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import streamlit as st
import torch

from analysis.lesson import numbers, prepare
from app import resident
from app.lesson import job
from dpruner.model import prunable_linears
from dpruner.store import Run

TOLD = 0.15   # seconds between two words on how far it is: each draws a part of the page, and lets a click in


@st.cache_resource(max_entries=2, show_spinner=False)   # gradients are as large as the model
def read(text: str, _run: Run, folder: str) -> numbers.Sentence:
    """A sentence with its gradients in the whole model; not to be changed."""
    with resident.taken(_run) as found:
        return numbers.read_sentence(found.model, found.tokenizer, text)


@st.cache_resource(max_entries=1, show_spinner=False)
def dense(_run: Run, folder: str) -> dict[str, torch.Tensor]:
    """A copy of all prunable weights, so that counting keeps nobody from the model; not to be changed."""
    with resident.taken(_run) as found:
        return {n: m.weight.detach().clone() for n, m in prunable_linears(found.model).items()}


@st.cache_resource(max_entries=256, show_spinner=False)
def _counts(text: str, formula: str, lambdas: tuple[float, ...], folder: str) -> dict[str, np.ndarray]:
    """{matrix: what `numbers.changed` says of it}, of those that are counted so far, by whichever session."""
    return {}


def counted(run: Run, text: str, formula: str, lambdas: Sequence[float] = numbers.LAMBDAS,
            tell: Callable[[int, int], None] | None = None) -> pd.DataFrame | None:
    """Decisions of the whole model that each λ changes.

    Args:
        text: of a sentence that can be read.
        tell: called with (matrices counted, matrices) every now and then, while those that are missing are counted. None counts nothing.

    Returns:
        As `numbers.changed_everywhere`; None where some matrix has not been counted.

    Raises:
        InputError: general importance is not in the cache any more.
    """
    folder = str(run.folder)
    weights, found = dense(run, folder), _counts(text, formula, tuple(lambdas), folder)
    missing = {n: w for n, w in weights.items() if n not in found}
    if missing and tell is None:
        return None
    if missing:
        told, gradients = 0.0, read(text, run, folder).gradients
        for name, count in numbers.changed_by_matrix(formula, missing, gradients, job.general(run), prepare.SPARSITY, lambdas):
            if time.monotonic() - told > TOLD:
                told = time.monotonic()
                tell(len(found), len(weights))
            found[name] = count
    return numbers.changed_everywhere(formula, found.values(), sum(w.numel() for w in weights.values()), lambdas)

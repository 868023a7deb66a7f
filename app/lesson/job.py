"""The lesson's folder: started once, filled by a process of its own, read by every session."""

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import streamlit as st
import torch
from filelock import FileLock

from analysis import similarity, weights
from analysis.lesson import prepare
from app import demo, state, widgets
from dpruner import starter, store, worker
from dpruner.errors import InputError
from dpruner.store import Run
from dpruner.units import duration

FORMAT = 5   # to be raised when the lesson computes something else


@st.cache_resource(max_entries=1, show_spinner=False)
def key() -> str:
    """What decides the lesson's numbers: the embedded model, its corpora, the settings, torch."""
    files = sorted(p for folder in (starter.PATH, starter.CORPORA) for p in Path(folder).rglob("*") if p.is_file())
    digest = hashlib.sha256(json.dumps([FORMAT, demo.CONFIG.to_dict(), version("torch")]).encode())
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def ensure() -> Run:
    """The lesson; where nobody has begun it, its process is started. It waits for its turn behind the runs that are under way.

    Raises:
        InputError: its folder cannot be written.
    """
    run = Run(state.CACHE / "lesson" / key())
    if (run.folder / "status.json").is_file():
        return run
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(run.folder / ".lock"):
            if not (run.folder / "status.json").is_file():
                begin(run)
    except OSError as error:
        raise InputError(f"The lesson cannot be kept in {str(run.folder)!r}", str(error.strerror or error).lower(),
                         "mend it, or name another folder in DPRUNER_CACHE") from error
    return run


def begin(run: Run) -> None:
    """Start the process of a lesson, also of one that has failed: it goes on from the parts it has."""
    store.write_json(run.folder / "run.json", {"config": demo.CONFIG.to_dict()})
    worker.start(run, ["analysis.lesson.prepare", str(run.folder), str(state.RUNS), str(state.CACHE)], demo.CONFIG.device)


def ready(run: Run) -> frozenset[str]:
    """The parts that are there."""
    return frozenset(name for name in prepare.PARTS if (run.folder / name).is_file())


@st.fragment(run_every=1)
def progress(run: Run, before: frozenset[str]) -> None:
    """How far the lesson is; when a part has come, the whole page is drawn anew.

    Args:
        before: the parts that the page has been drawn with.
    """
    with widgets.guarded():
        status = worker.state(run)
        if ready(run) != before or status["state"] == "done":
            st.rerun()
        if status["state"] in worker.OVER:
            error = status.get("error") or {"what": "The lesson was cancelled", "why": "its process was ended"}
            st.error(f"{error['what']}: {error['why']}. Mend that if need be, and resume it: what it has is kept.", icon=":material/error:")
            if st.button("Resume", key="learn-resume", icon=":material/resume:"):
                begin(run)
                st.rerun()
            return
        left = f"about {duration(status['eta_seconds'])} left" if status.get("eta_seconds") else "a minute or less, once it is its turn"
        ahead = status.get("ahead", 0) if status["state"] == "queued" else 0
        words = f"waits for {ahead} run{'s' * (ahead > 1)} before it" if ahead else f"{status['stage']} · {left}"
        st.progress(min(1.0, status["progress"]), f"The lesson is computed once, on this machine, and then opens at once: {words}. "
                                                  f"Steps appear as they are ready ({len(before)} of {len(prepare.PARTS)} parts).")


# ---- what the steps read


def stamp(run: Run, part: str) -> tuple[str, float]:
    """A part's file, and when it was written: for caches."""
    path = run.folder / part
    return str(path), path.stat().st_mtime


@st.cache_data(max_entries=16, show_spinner=False)
def _table(path: str, when: float) -> dict:
    return store.read_json(Path(path))


def table(run: Run, part: str) -> dict:
    """A part that is JSON."""
    return _table(*stamp(run, part))


@st.cache_resource(max_entries=4, show_spinner=False)   # never written to
def _tensors(path: str, when: float) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with store.opened(Path(path)) as file:
        return {n: file.get_tensor(n) for n in file.keys()}, dict(file.metadata() or {})


def tensors(run: Run, part: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A part that is tensors, not to be changed: (tensors, what stands beside them)."""
    return _tensors(*stamp(run, part))


def counts(run: Run, sparsity: float) -> tuple[similarity.Counts, list[str]]:
    """(counts of all masks at one of the prepared sparsities, the domains' labels)."""
    found, told = tensors(run, "alike.safetensors")
    at = min(range(len(prepare.STEPS) - 1), key=lambda i: abs(prepare.STEPS[i + 1] - sparsity))
    return similarity.Counts(tuple(json.loads(told["labels"])), tuple(json.loads(told["names"])), found["weights"].numpy(),
                             found["both"][at].numpy()), json.loads(told["domains"])


@st.cache_resource(max_entries=1, show_spinner=False)
def _general(path: str) -> dict[str, torch.Tensor]:
    return store.read_scores(Path(path))


def general(run: Run) -> dict[str, torch.Tensor]:
    """General importance of the whole model, not to be changed.

    Raises:
        InputError: it is no longer in the cache.
    """
    path = weights.general_file(run.record, state.CACHE)
    with contextlib.suppress(InputError):
        if path is not None:
            return _general(str(path))
    raise InputError("The whole model cannot be counted", "its general importance is not in the cache any more",
                     f"delete the folder {str(run.folder)!r}: the lesson is then computed anew")

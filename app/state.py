"""The one selection that follows the user through the pages and stands in the URL: run, method, domain, block, module, sparsity."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from app import data
from dpruner import store, worker
from dpruner.config import split_domain
from dpruner.errors import InputError
from dpruner.store import Run

RUNS = Path(os.environ.get("DPRUNER_RUNS", "runs"))
CACHE = Path(os.environ.get("DPRUNER_CACHE", "cache"))
KEYS = ("run", "method", "domain", "block", "module", "sparsity")


@dataclass(frozen=True)
class Selection:
    """What the user looks at; every field is valid for the run.

    Attributes:
        run: a finished run.
        method, domain: one of its masks, the domain by its label.
        block, module: one of its matrices, as `analysis.matrices.split_name` cuts names.
        sparsity: share removed, 0..1, at which ranks are cut.
    """

    run: Run
    method: str
    domain: str
    block: int
    module: str
    sparsity: float

    @property
    def matrix(self) -> str:
        """Full parameter name of the selected matrix."""
        return data.matrix_name(self.run, self.block, self.module)


def finished_runs() -> list[Run]:
    """Runs that can be looked at, newest first; damaged folders are passed over here and named on the page Run."""
    found = []
    for run in store.find_runs(RUNS):
        try:
            if worker.state(run)["state"] == "done" and run.record:
                found.append(run)
        except InputError:
            continue
    return found


def selection() -> Selection | None:
    """The selection, for a page; None, with a word on what to do, while there is no finished run."""
    chosen = st.session_state.get("_selection")
    if chosen is None:
        st.info("There is no finished run yet. The page **Run** shows what is being computed, and starts more.")
    return chosen


def parameters() -> dict[str, str]:
    """The selection as parameters of the address; empty without a run."""
    chosen = st.session_state.get("_selection")
    return {} if chosen is None else {"run": chosen.run.id, "method": chosen.method, "domain": chosen.domain, "block": str(chosen.block),
                                      "module": chosen.module, "sparsity": str(round(100 * chosen.sparsity))}


def choose() -> None:
    """Draw the selection in the sidebar; where the run that a link or an earlier choice names is gone, say so.

    Done by the script that all pages share: a widget drawn by a page forgets its value when the user goes to another one.
    """
    st.session_state["_selection"] = None
    if ended := st.session_state.pop("_look-at", None):
        st.session_state["run"] = ended
    with st.sidebar:
        st.session_state["_selection"] = _chosen({run.id: run for run in finished_runs()})


def look_at(run: str) -> None:
    """Select a run that the user has just seen end, when the page is drawn next."""
    st.session_state["_look-at"] = run


def _chosen(runs: dict[str, Run]) -> Selection | None:
    if not runs:
        return None
    wanted = st.session_state.get("run") or st.query_params.get("run")
    run = runs[_choice("Run", list(runs), "run")]
    st.caption(_began(run))
    if wanted and wanted not in runs:
        st.session_state["_lost"] = (wanted, run.id)
    _tell_lost(run)
    pairs = data.pairs(run)
    left, right = st.columns(2, gap="small")
    with left:
        method = _choice("Method", list(dict.fromkeys(m for m, _ in pairs)), "method")
    with right:
        domain = _choice("Domain", [d for m, d in pairs if m == method], "domain")
    places = data.places(run)
    left, right = st.columns([2, 5], gap="small")
    with left:
        block = _choice("Layer", sorted(places.block.unique().tolist()), "block")
    with right:
        module = _choice("Module", places[places.block == block].module.tolist(), "module")
    default = round(100 * data.own_sparsity(run))
    sparsity = st.slider("Sparsity (% removed)", 0, 100, _known("sparsity", range(101), default), key="sparsity", bind="query-params",
                         help="Masks of every sparsity follow from the ranks of the weights: nothing is computed anew.")
    return Selection(run, method, domain, block, module, sparsity / 100)


def choose_matrix(key: str) -> None:
    """For `on_select` of a chart of layers x modules: the matrix that was clicked becomes the selected one, on every page.

    Args:
        key: of the chart, whose points carry (block, module, ..).
    """
    if found := clicked(key):
        st.session_state["block"], st.session_state["module"] = found[:2]


def clicked(key: str) -> list | None:
    """What the point carries that was clicked in a chart; None where a selection was cleared."""
    points = st.session_state[key].selection.points
    if not points:
        return None
    carried = points[0]["customdata"]
    # a row of numbers that travelled packed comes back as {"0": .., "1": ..}
    return [carried[k] for k in sorted(carried, key=int)] if isinstance(carried, dict) else list(carried)


def _began(run: Run) -> str:
    """When a run began, and for which domains: its id is too long for the sidebar."""
    began = re.sub(r"^(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)-.*$", r"\1-\2-\3 \4:\5:\6", run.id)
    return f"{began} · {', '.join(split_domain(d)[0] for d in run.config['domains'])}"


def _tell_lost(run: Run) -> None:
    """Keep saying which run is missing until the user has chosen another one himself."""
    lost, instead = st.session_state.get("_lost", (None, None))
    if instead == run.id:
        st.warning(f"The run {lost} cannot be shown: it was deleted, or its files are damaged. Another one is shown instead.",
                   icon=":material/link_off:")
    else:
        st.session_state.pop("_lost", None)


def _choice(label: str, options: list, key: str):
    """A selectbox bound to the URL, which may hold anything: what is not among the options gives way to the first."""
    _known(key, options, options[0])
    return st.selectbox(label, options, key=key, bind="query-params")


def _known(key: str, options, default):
    """The widget's value if it is among the options; else the default, also where the URL said something else."""
    if key in st.session_state and st.session_state[key] not in options:
        st.session_state[key] = default
    return default

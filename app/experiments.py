"""The section Experiments: start one with the settings of the run that is looked at, watch it, and see what it found."""

import contextlib
import dataclasses
from pathlib import Path

import streamlit as st

from analysis import experiments as figures
from analysis.chart import listed, percent
from app import data, state, widgets
from dpruner import RunConfig, worker
from dpruner.config import split_domain
from dpruner.designs import DESIGNS
from dpruner.errors import InputError
from dpruner.experiments import Experiment, asked, find_experiments, place, prepared
from dpruner.findings import command, model_of
from dpruner.store import Run
from dpruner.units import duration


SHIPPED = Path(__file__).parents[1] / "docs" / "results"   # figures behind docs/RESULTS.md, without their runs


def root() -> Path:
    """The folder of the experiments, beside the runs."""
    return state.RUNS.absolute().parent / "experiments"


def section(run: Run) -> None:
    """Everything about experiments.

    Args:
        run: its model, domains and settings are those of a new experiment.
    """
    st.subheader("Experiments")
    st.caption("One question, asked of several runs that differ in one setting and are judged on the same held-out text. An experiment is a process of "
               "its own; what it has finished stays, and starting it again goes on from there.")
    begin(run)
    own = {e.id: e for e in find_experiments(root())}
    found = own | {e.id: e for e in find_experiments(SHIPPED) if e.id not in own}
    if not found:
        st.caption("There is no experiment yet.")
        return
    chosen = st.selectbox("Experiment", list(found), index=0 if own else None, key="results-experiment", format_func=lambda name: told(found[name]),
                          placeholder=f"Choose one of {len(found)} to see what it found")
    if chosen:
        watch(found[chosen])


def begin(run: Run) -> None:
    """Choose a question and start."""
    left, button = st.columns([4, 1], vertical_alignment="bottom")
    name = left.selectbox("Question", list(DESIGNS), key="results-question", format_func=lambda n: DESIGNS[n].question)
    design, config = DESIGNS[name], RunConfig.from_dict(run.config)
    values = st.multiselect(f"At ({design.axis})", list(design.values), list(design.values), key=f"results-values-{name}",
                            format_func=lambda value: in_words(design.axis, value))
    shared = dataclasses.replace(config, compensate=None)
    with widgets.guarded():
        question = asked(name, shared, values=values or None)
        st.caption(data.foreseen(question, place(question, root())) or "All of its points are done.")
    if button.button("Start", key="results-experiment-start", icon=":material/science:", width="stretch",
                     help=f"For {listed(config.domains)}, with the other settings of {run.id}."):
        with widgets.guarded():
            experiment = prepared(name, shared, values=values or None, root=root())
            worker.submit_experiment(experiment, state.CACHE)
            st.session_state["results-experiment"] = experiment.id
            st.rerun()


def told(experiment: Experiment) -> str:
    """An experiment in a list, so that those of one question can be told apart."""
    record, axis = experiment.record, experiment.design.axis
    config = record["config"]
    parts = [experiment.design.question, f"{model_of(experiment)} for {listed(split_domain(d)[0] for d in config['domains'])}"]
    parts += [] if axis == "sparsity" else [f"sparsity {in_words('sparsity', config['sparsity'])}"]
    return " · ".join([*parts, f"{axis} {', '.join(in_words(axis, value) for value in record['values'])}", experiment.id.rpartition("-")[2],
                       *(["comes with the program"] if experiment.folder.parent == SHIPPED else [])])


def in_words(axis: str, value) -> str:
    """A point of an experiment: a sparsity is a percentage, as everywhere on the pages."""
    return f"{100 * value:g} %" if axis == "sparsity" else str(value)


def is_whole(experiment: Experiment) -> bool:
    """Whether every value has been measured, by whomever: figures that were passed on come without their runs and status."""
    with contextlib.suppress(InputError):
        return {point.x for point in experiment.points()} <= set(experiment.results().x)
    return False


def state_of(experiment: Experiment) -> dict:
    """Its status; figures that were passed on come without one."""
    known = (experiment.folder / "status.json").is_file()
    return worker.state(experiment) if known else {"state": "done" if is_whole(experiment) else "not started"}


def watch(experiment: Experiment) -> None:
    """How far it is, looked at every other second while it goes on; when it has ended, what it found."""
    with widgets.guarded():
        going = state_of(experiment)["state"] in worker.GOING
        st.fragment(look, run_every=2 if going else None)(experiment, going)


def look(experiment: Experiment, going: bool) -> None:
    """One look at an experiment.

    Args:
        going: whether it was going on when the page was drawn.
    """
    with widgets.guarded():
        status = state_of(experiment)
        if going != (status["state"] in worker.GOING):
            st.rerun()
        if going:
            st.progress(min(1.0, status["progress"]), f"{status['about'] or 'starting'} · {status['stage']} · {percent(status['progress'], 0)}"
                        + (f" · about {duration(status['eta_seconds'])} left, by what is done so far" if status.get("eta_seconds") else ""))
            if st.button("Cancel", key="results-experiment-cancel", icon=":material/cancel:"):
                worker.cancel(experiment)
        elif status["state"] != "done" and experiment.folder.parent != SHIPPED:
            error = status.get("error")
            st.info(f"It failed. {error['what']}: {error['why']}; {error['what to do']}." if error else f"It is {status['state']}.")
            if st.button("Resume", key="results-experiment-resume", icon=":material/resume:"):
                worker.submit_experiment(experiment, state.CACHE)
                st.rerun()
        if (experiment.folder / "results.parquet").is_file():
            show(experiment)


def show(experiment: Experiment) -> None:
    """Figure and table of a finished experiment."""
    table, name = experiment.results(), experiment.record["name"]
    st.caption(experiment.design.reading)
    if name == "transfer":
        widgets.chart(figures.excess(table), "experiment-excess")
        widgets.chart(figures.prediction(table), "experiment-prediction")
    else:
        measured = figures.texts_of(table)
        of = st.selectbox("Measured", measured, key=f"results-measured-{experiment.id}",
                          format_func=lambda m: f"{m[2]} on {m[1].removesuffix('-perplexity')}, pruned for {m[0]}")
        if of:
            if compared := figures.differences(table, experiment.design.axis, *of):
                widgets.chart(compared, "experiment-differences")
            widgets.chart(figures.measured(table, experiment.design.axis, *of), "experiment-measured")
    with st.expander("All figures of this experiment"):
        st.code(command(experiment), language="bash", wrap_lines=True)
        st.dataframe(table, hide_index=True, placeholder="")
        st.download_button("Figures (CSV)", table.to_csv(index=False).encode(), f"{experiment.id}.csv", "text/csv", key="experiment-csv",
                           on_click="ignore")

"""What there is already: the newest finished run in a few figures, and every run to repeat, take along or delete."""

import contextlib
import json
import shlex
import shutil

import streamlit as st

from analysis.chart import listed, percent
from app import data, running, sofar, state, widgets
from app.halves import Mask, where_they_part
from dpruner import RunConfig, worker
from dpruner.config import options
from dpruner.errors import InputError
from dpruner.store import Run

PAGES = {"layers": "stacks", "overlap": "join_inner", "similarity": "grid_on", "explore": "zoom_in", "generate": "edit_note",
         "results": "monitoring"}


def latest(run: Run) -> None:
    """A finished run in a few figures, and where to see more of it."""
    found = data.summary(run)
    st.subheader("Latest result", anchor="latest")
    st.markdown(sofar.purpose(RunConfig.from_dict(run.config)))
    st.caption(run.id)
    st.markdown("**Perplexity on held-out text** (95 % interval)")
    if found["perplexity"].empty:
        st.caption("It was not measured in this run.")
    else:
        st.dataframe(found["perplexity"], hide_index=True, key="run-perplexity")
        st.caption("How badly the model predicts text it has not seen: lower is better. *dense* is the full model. The page Results tells, "
                   "window by window, which differences are more than noise.")
    st.markdown("**Similarity of the domains' masks** (Jaccard)")
    if found["similarity"].empty:
        st.caption("There is nothing to compare: it takes two domains, and a method that regards them.")
    else:
        st.dataframe(found["similarity"], hide_index=True, key="run-similarity")
        st.caption("Weights that both masks keep, of those that either keeps. *Random*: what two random masks share. *Half text*: "
                   "masks made from half of the text each, of two domains and of the two halves of one domain. Less text makes a mask "
                   "noisier, so these two compare on equal terms: the lower the first beside the second, the more the domains differ.")
        with widgets.guarded():
            method = next(m for m, _ in data.pairs(run))
            if not data.is_large(run):
                where_they_part([Mask(d, run, m, d) for m, d in data.pairs(run) if m == method], None, data.places(run))
    if found["lambda"]:
        st.markdown("λ, the weight of general importance, changed " + ", ".join(
            f"**{percent(c['changed'] / c['of'], 2)}** of the mask decisions for {domain}" for domain, c in found["lambda"].items()) + ".")
    with st.container(horizontal=True):
        for page, icon in PAGES.items():
            st.page_link(f"views/{page}.py", label=page.capitalize(), icon=f":material/{icon}:", query_params={"run": run.id})


def ended(run: Run) -> float:
    """When a run ended, in seconds: one that was resumed ends after others that began later."""
    with contextlib.suppress(OSError):   # deleted meanwhile
        return (run.folder / "status.json").stat().st_mtime
    return 0.0


# ---- every run


def every_run(known: list[tuple[Run, dict]]) -> None:
    """One run of all to repeat, take along or delete."""
    st.subheader("All runs", anchor="runs")
    runs = {run.id: (run, status) for run, status in known}
    chosen = st.selectbox("Run to look at", list(runs), key="run-shown")
    run, status = runs[chosen]
    st.markdown(running.said(status))
    with widgets.guarded():
        config = RunConfig.from_dict(run.config)
        st.markdown("**Copy as command**: repeats this run, bit for bit on the same machine.")
        st.code(command(config), language="bash", wrap_lines=True)
    config_file, log, delete = st.columns([1, 1, 3])
    with config_file, widgets.guarded():
        st.download_button("Config file", json.dumps(run.record, indent=1, ensure_ascii=False).encode(), f"{run.id}.json",
                           "application/json", key="run-config", icon=":material/download:", on_click="ignore",
                           help="All settings, versions and fingerprints; `python -m dpruner prune --config FILE` repeats the run.")
    # keys of the run's own: else the popover stays open for the next run in the list, and a double click deletes that one too
    with delete.popover("Delete", key=f"run-delete-asked-{run.id}", icon=":material/delete:", disabled=status["state"] in ("queued", "running"),
                        help="A waiting or running run has to be cancelled first." if status["state"] in ("queued", "running") else None):
        st.markdown(f"Delete **{run.id}** and all its files? This cannot be undone.")
        st.button("Yes, delete it", key=f"run-delete-{run.id}", type="primary", on_click=delete_run, args=(run,))
    with widgets.guarded():
        damaged = worker.damaged_files(run) if status["state"] == "done" else []
        if damaged:
            st.warning(f"Missing or damaged: {listed(damaged, 4)}. Resume makes them anew, with the same bits.", icon=":material/healing:")
        if damaged or status["state"] in worker.OVER:
            running.resume_button(run, "run-resume-shown")
    if log.toggle("Log", key="run-log-shown"):
        running.show_log(run)
    if problem := st.session_state.pop("run-delete-problem", None):
        st.error(problem, icon=":material/error:")


def delete_run(run: Run) -> None:
    """Remove a run's folder, never while it waits or runs."""
    try:
        over = worker.state(run)["state"] not in ("queued", "running")
    except InputError:   # damaged: there is nothing to keep
        over = True
    if not over:
        st.session_state["run-delete-problem"] = f"The run {run.id} is still going; cancel it first."
        return
    grave = state.RUNS / ".deleted" / run.id   # one folder deeper: gone at once for every reader
    try:
        grave.parent.mkdir(exist_ok=True)
        run.folder.rename(grave)
        shutil.rmtree(grave)
    except FileNotFoundError:   # somebody else deleted it
        pass
    except OSError as error:
        why = str(error.strerror).lower()
        st.session_state["run-delete-problem"] = f"The run {run.id} could not be deleted: {why}; check its permissions."


def command(config: RunConfig) -> str:
    """The command line that does what a config says: what the run is about, and every setting that is not the default."""
    words = ["python", "-m", "dpruner", "prune", *options(config, RunConfig(), always=["model", "domains", "methods"])]
    for flag, folder, usual in (("--runs", state.RUNS, "runs"), ("--cache", state.CACHE, "cache")):
        words += [flag, str(folder)] if str(folder) != usual else []
    return shlex.join(words)

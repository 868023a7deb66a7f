"""What is happening: runs that wait, run or ended badly, as the page Run shows them, looked at anew every other second."""

import streamlit as st

from analysis.chart import percent
from app import sofar, state, widgets
from dpruner import store, worker
from dpruner.errors import InputError
from dpruner.store import Run
from dpruner.units import duration

LOG_LINES = 40


@st.fragment(run_every=2)   # each look costs the server and the browser time that the run itself wants
def happening() -> None:
    """Waiting, running and failed runs, looked at every other second; when one ends the whole page is drawn anew, once."""
    known = statuses()
    active = [(run, status) for run, status in known if status["state"] in ("queued", "running")]
    before = st.session_state.get("run-active", set())
    st.session_state["run-active"] = {run.id for run, _ in active}
    if ended := before - st.session_state["run-active"]:
        if done := [run.id for run, status in known if run.id in ended and status["state"] == "done"]:
            state.look_at(done[0])
        st.rerun()
    for run, status in sorted(active, key=lambda each: (each[1]["state"] != "running", each[1].get("ahead", 0), each[0].id)):
        show_active(run, status)
    for run, status in known:   # newest first: what ended badly since the last good end
        if status["state"] == "done":
            break
        if status["state"] in ("failed", "damaged"):
            st.error(f"**{run.id}** · {said(status)}", icon=":material/error:")
        elif status["state"] == "cancelled":
            st.info(f"**{run.id}** was cancelled" + (". What it had finished is still in its folder." if sofar.anything(run) else
                                                     " before it had finished anything."), icon=":material/cancel:")
        if status["state"] in worker.OVER:
            resume_button(run, f"run-resume-{run.id}")


def statuses() -> list[tuple[Run, dict]]:
    """Every run with its status as it is true now, newest first; a damaged folder's status says so in words."""
    found = []
    for run in store.find_runs(state.RUNS):
        try:
            found.append((run, {**worker.WAITING, **worker.state(run)}))
        except InputError as error:
            found.append((run, {"state": "damaged", "error": {"what": error.what, "why": error.why, "what to do": error.fix}}))
    return found


def said(status: dict) -> str:
    """A status as a sentence."""
    if error := status.get("error"):
        return f"{error['what']}: {error['why']}; {error['what to do']}."
    return {"done": "This run is finished.", "cancelled": "This run was cancelled."}.get(
        status["state"], "This run is not over: the top of the page shows how far it is.")


def show_active(run: Run, status: dict) -> None:
    """One run that waits or runs: stage, share done, time left, log, cancel."""
    with st.container(border=True):
        words, button = st.columns([5, 1], vertical_alignment="center")
        if status["state"] == "queued":
            ahead = status.get("ahead", 0)
            words.markdown(f"**{run.id}** waits: " + (
                f"{ahead} run{'s' * (ahead > 1)} before it on {status.get('device', 'the device')}." if ahead else "its process is starting."))
        else:
            words.markdown(f"**{run.id}** is running.")
        button.button("Cancel", key=f"run-cancel-{run.id}", icon=":material/cancel:", on_click=cancel, args=(run,),
                      help="End this run; what it has finished stays in its folder.")
        if status["state"] == "running":
            at = f"{status['stage']} · {status['about']}".strip(" ·")
            left = (f"about {duration(status['eta_seconds'])} left" if status["eta_seconds"] else
                    "nearly done" if status["progress"] >= 1 else "time left: known in a moment")
            st.progress(min(1.0, max(0.0, status["progress"])),
                        f"{at} · step {min(status['done'] + 1, status['total'])} of {status['total']} · {percent(status['progress'], 0)} · {left}")
        if status["state"] == "running" or not status.get("ahead"):   # what it is about is there while its process still starts
            sofar.show(run, status)
        if st.toggle("Log", key=f"run-log-{run.id}", help="What the process of this run has printed"):
            show_log(run)


def cancel(run: Run) -> None:
    """For `on_click`: a button's answer in the script would be lost where another run has just ended and the page is drawn anew first."""
    st.toast(f"Ending {run.id} …", icon=":material/cancel:")
    with widgets.guarded():
        worker.cancel(run)


def resume_button(run: Run, key: str) -> None:
    """Let a run that failed or was cancelled go on, with another limit on its memory if that was the trouble."""
    with st.container(horizontal=True):
        pressed = st.button("Resume", key=key, icon=":material/resume:", help="Go on from what it has: nothing that is finished is done again.")
        limit = st.text_input("Memory limit", key=f"{key}-memory", placeholder="Memory limit: as before", max_chars=20, width=240,
                              label_visibility="collapsed").strip()
    if pressed:
        with widgets.guarded():
            worker.resume(run, state.CACHE, limit or None)
            st.rerun()


def show_log(run: Run) -> None:
    """The end of a run's log."""
    try:
        lines = (run.folder / worker.LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    st.code("\n".join(lines[-LOG_LINES:]) or "Nothing has been printed: all goes well.", language=None)

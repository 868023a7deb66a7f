"""The page Learn: nine steps from which dual pruning is taught; this file finds one's way among them."""

import streamlit as st

from app import widgets
from app.lesson import column, guess, job, linear, plane, sentence, step, why
from dpruner import worker

STEPS = {each.name: each for each in (why.WHY, linear.LINEAR, column.COLUMN, sentence.SENTENCE, plane.PLANE, why.FALL, guess.PREDICT,
                                      guess.ALIKE,
                                      why.COST)}
NAMES = list(STEPS)


def go(to: str) -> None:
    st.session_state["learn-step"] = to


def beside(at: int) -> None:
    """Buttons to the step before and the one after."""
    before, after = st.columns(2)
    if at > 0:
        before.button(f"Back: {NAMES[at - 1]}", key="learn-back", icon=":material/arrow_back:", on_click=go, args=(NAMES[at - 1],))
    if at + 1 < len(NAMES):
        after.button(f"Next: {NAMES[at + 1]}", key="learn-next", icon=":material/arrow_forward:", type="primary", on_click=go,
                     args=(NAMES[at + 1],))


st.title("Learn")
st.caption("Dual pruning in nine steps. Every number is computed by the engine, on this machine; every step has a link of its own. What is chosen at the left "
           "counts for *On my run* only.")
if "_learn-return" in st.session_state:
    st.session_state["learn-step"] = st.session_state.pop("_learn-return")
# without a default: the browser's Back then brings none, and not the first
start = {} if "learn-step" in st.session_state else {"default": NAMES[0]}
chosen = st.segmented_control("Steps", NAMES, **start, key="learn-step", bind="query-params", required=True, label_visibility="collapsed",
                              width="stretch")
if chosen is None:   # a browser that went back to this page brings no step: the one that was read last is shown
    st.session_state["_learn-return"] = st.session_state.get("_learn-step", NAMES[0])
    st.rerun()
st.session_state["_learn-step"] = chosen
widgets.to_top(chosen)
at = NAMES.index(chosen)
later = None
with widgets.guarded():
    lesson = job.ensure()
    if worker.state(lesson)["state"] != "done":
        job.progress(lesson, job.ready(lesson))
    st.subheader(f"{at + 1}. {STEPS[chosen].question}", anchor=False)
    later = step.draw(STEPS[chosen], lesson)
beside(at)
if later:
    later()

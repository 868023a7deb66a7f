"""The page Learn: nine steps from which dual pruning is taught; this file finds one's way among them."""

import streamlit as st

from app import widgets
from app.lesson import column, guess, job, linear, plane, sentence, step, why
from dpruner import worker

STEPS = {each.key: each for each in (why.WHY, linear.LINEAR, column.COLUMN, sentence.SENTENCE, plane.PLANE, why.FALL, guess.PREDICT, guess.ALIKE,
                                     why.COST)}


def go(to: str) -> None:
    st.session_state["learn-step"] = to


def beside(keys: list[str], chosen: str, key: str) -> None:
    """Buttons to the step before and the one after."""
    at = keys.index(chosen)
    before, after = st.columns(2)
    if at > 0:
        before.button(f"Back: {STEPS[keys[at - 1]].name}", key=f"{key}-back", icon=":material/arrow_back:", on_click=go, args=(keys[at - 1],))
    if at + 1 < len(keys):
        after.button(f"Next: {STEPS[keys[at + 1]].name}", key=f"{key}-next", icon=":material/arrow_forward:", type="primary", on_click=go,
                     args=(keys[at + 1],))


st.title("Learn")
st.caption("Dual pruning in nine steps on the embedded model. Every number is computed by the engine on this machine; every step has a link of its own.")
keys = list(STEPS)
if st.session_state.get("learn-step", keys[0]) not in keys:
    st.session_state["learn-step"] = keys[0]
start = {} if "learn-step" in st.session_state else {"default": keys[0]}   # a default and a state at once is what Streamlit warns of
chosen = st.segmented_control("Steps", keys, **start, format_func=lambda key: f"{keys.index(key) + 1} {STEPS[key].name}", key="learn-step",
                              bind="query-params", required=True, label_visibility="collapsed", width="stretch")
with widgets.guarded():
    lesson = job.ensure()
    if worker.state(lesson)["state"] != "done":
        job.progress(lesson, job.ready(lesson))
    with widgets.guarded():
        step.draw(STEPS[chosen], lesson)
beside(keys, chosen, "learn")

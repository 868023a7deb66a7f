"""The page Run: what is happening, what was found last, the form for a new run, every run."""

import streamlit as st

from app import before, finished, form, running, widgets

st.title("Run")
st.caption("Prune a model for your domains, and see which weights each of them needs.")
widgets.to_top(st.session_state.get("_run-started", ""))
running.happening()

runs = running.statuses()
done = [run for run, status in runs if status["state"] == "done"]
if done:
    with widgets.guarded():
        finished.latest(max(done, key=finished.ended))
elif not runs:
    st.info("There is no run yet: fill in the form below and press Start.")

st.subheader("New run", anchor="new")
form.presets()
left, right = st.columns([4, 3], gap="medium")
with left:
    settings, refused = form.fields()
with right, st.container(border=True):
    before.card(settings, refused)

if runs:
    finished.every_run(runs)

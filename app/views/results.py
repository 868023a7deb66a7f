"""The page Results."""

import streamlit as st

from app import state, widgets

st.title("Results")
selected = state.selection()

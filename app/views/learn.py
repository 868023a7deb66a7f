"""The page Learn: its place."""

import streamlit as st

st.title("Learn")
st.info("The guided lesson will stand here. Until then: **Overlap** shows what the two importances share, **Similarity** what two domains share.")

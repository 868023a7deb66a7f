"""Tensors and tables of a run -> numbers and figures; no Streamlit.

matrices.py names, groups and streams the matrices of a model; sparsity.py, overlap.py, weighing.py, similarity.py and generation.py
compute; chart.py holds what all figures share, figures.py draws one model's masks and importances, tiles.py its single weights,
comparisons.py masks, qualities, sizes and texts side by side.
"""

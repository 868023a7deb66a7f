"""The embedded starter: a small model with its tokenizer, and the corpora written for it. See README.md beside this file.

PATH is the model folder, in the Hugging Face layout; CORPORA holds one folder per domain.
"""

from pathlib import Path

PATH = Path(__file__).resolve().parent / "model"
CORPORA = Path(__file__).resolve().parent / "corpora"

"""One file a page; `app/main.py` lists them."""

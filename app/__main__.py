"""`python -m app`: the app on http://127.0.0.1:8501; options of `streamlit run` may follow.

The libraries are loaded and the demonstration is on its way before the browser opens, so that its first page is there at once.
"""

import logging
import sys
from pathlib import Path

MAIN = Path(__file__).with_name("main.py")


def main() -> None:
    """Get ready, then serve until ctrl-C."""
    print("  D-Pruner Studio is getting ready …", flush=True)
    logging.getLogger("streamlit.runtime.caching").setLevel(logging.ERROR)   # the pages' caches are made before there is a server
    from app import demo
    from dpruner.errors import InputError
    try:
        demo.ensure()
    except InputError as error:   # such as a folder that cannot be written: the pages say so too
        print(f"  {error}", file=sys.stderr)
    from streamlit.web import cli
    sys.argv = ["streamlit", "run", str(MAIN), *sys.argv[1:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()

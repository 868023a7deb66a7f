"""`python -m app`: the app on http://127.0.0.1:8501.

The libraries are loaded and the demonstration is on its way before the browser opens, so that its first page is there at once.
"""

import importlib
import ipaddress
import logging
import os
import sys
from pathlib import Path

MAIN = Path(__file__).with_name("main.py")
LOCAL = "127.0.0.1"
HELP = f"""python -m app [OPTION ..]: D-Pruner Studio on http://{LOCAL}:8501; ctrl-C ends it, runs go on.

  --server.port 8502         another port
  --server.address 0.0.0.0   open to the network, without a password (default {LOCAL}: this machine only)
  --server.headless true     do not open a browser

Options of `streamlit run` all work; `streamlit run --help` lists them. Runs lie in ./runs and what they share in ./cache, or where the
environment variables DPRUNER_RUNS and DPRUNER_CACHE say."""
OPEN = ("The app is open to the network at {}: whoever reaches this machine can start runs on it, read and delete its run folders, bring files, and "
        "name any model folder or text file that you can read; there is no password. Leave --server.address out to keep it to this machine.")


def address(options: list[str]) -> str:
    """Where the server will listen: what the options, the environment or a config file say, else this machine only.

    Args:
        options: of the command line, as `streamlit run` takes them.
    """
    from streamlit import config
    flags = dict(zip(options, options[1:], strict=False)) | dict(o.split("=", 1) for o in options if "=" in o)
    return flags.get("--server.address") or config.get_option("server.address") or LOCAL


def is_local(address: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def main() -> None:
    """Get ready, then serve until ctrl-C."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return
    where = address(sys.argv[1:])
    if not is_local(where):
        print(f"  {OPEN.format(where)}", file=sys.stderr, flush=True)
    print("  D-Pruner Studio is getting ready …", flush=True)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")   # as for runs, before torch is loaded: beside one, spinning costs ten times
    from streamlit.logger import get_logger
    # the pages' caches are made before there is a server, and the command line comes after the config file: neither is worth a warning
    for name in ("streamlit.runtime.caching.cache_data_api", "streamlit.config"):
        get_logger(name).setLevel(logging.ERROR)
    from app import demo
    from dpruner.errors import InputError
    try:
        demo.ensure()
    except InputError as error:   # such as a folder that cannot be written: the pages say so too
        print(f"  {error}", file=sys.stderr)
    for needed in ("before", "finished", "form"):   # of the first page: loaded now, it is there at once
        importlib.import_module(f"app.{needed}")
    from streamlit.web import cli
    sys.argv = ["streamlit", "run", str(MAIN), *sys.argv[1:], f"--server.address={where}"]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()

"""`python -m dpruner`."""

import os
import sys

from dpruner.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:   # one of several that torchrun started
        # all is written and said: what is left is torch taking down the threads it had for the others, which rarely ends in an abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

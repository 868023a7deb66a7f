"""`python -m dpruner`."""

import sys

from dpruner.cli import main

if __name__ == "__main__":
    sys.exit(main())

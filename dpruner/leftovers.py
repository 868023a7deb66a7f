"""Names of temporary files, which say whose they are, so that those of a process that was killed are found and removed."""

import contextlib
import hashlib
import os
import platform
import re
import uuid
from pathlib import Path

import psutil


def mark() -> str:
    """A part of a file name that is given once: this machine, this process, and something new."""
    return f"{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]   # others may write to the same folder over the network


def clear(folder: Path) -> None:
    """Remove temporary files in a folder whose process no longer runs on this machine."""
    for path in folder.rglob(".*"):
        found = re.search(rf"\.{_machine()}-([0-9]+)-[0-9a-f]{{8}}\.tmp$", path.name)
        if found and not psutil.pid_exists(int(found[1])):
            with contextlib.suppress(OSError):   # another run has been here at the same time
                path.unlink()

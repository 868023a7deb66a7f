"""One run at a time on a device, whoever starts it: browsers, command lines and notebooks of a user share one queue for each device.

A ticket is a file that names a process; it counts as long as that process lives. Who has the oldest takes the lock of the device next, and the
lock is freed by the system when its process ends, however it ends.
"""

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout

from dpruner.store import write_json

POLL = 0.3   # seconds between two looks at the queue

_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())   # queues of devices that a call stands inside a `turn` of


def identity(pid: int | None = None) -> dict:
    """A process: its machine, its id, and when it was born, because ids are given out again.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    process = psutil.Process(pid)
    return {"machine": platform.node(), "pid": process.pid, "pid_born": _born(process)}


def _born(process: psutil.Process) -> float:
    """When a process began, in seconds, by what does not change with the clock: Linux counts from the start of the machine."""
    return round(process.create_time() - (psutil.boot_time() if psutil.LINUX else 0), 2)


def elsewhere(who: dict) -> bool:
    """Whether the process of an `identity` is one of another machine."""
    return who.get("machine", platform.node()) != platform.node()


def lives(who: dict) -> bool:
    """Whether the process of an `identity` still runs on this machine."""
    if elsewhere(who):
        return False
    try:
        process = psutil.Process(who["pid"])
        # after a restart of the machine the same id is another process: it must be as old as the identity says
        return process.status() != psutil.STATUS_ZOMBIE and abs(_born(process) - who.get("pid_born", _born(process))) < 0.1
    except psutil.NoSuchProcess:
        return False


def root() -> Path:
    """The folder of all queues, made where it is not there."""
    user = os.getuid() if hasattr(os, "getuid") else "queue"
    folder = Path(os.environ.get("DPRUNER_QUEUE") or Path(tempfile.gettempdir()) / f"dpruner-{user}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def queue_of(device: torch.device) -> Path:
    """The folder of a device's tickets, made where it is not there."""
    folder = root() / f"{device.type}-{device.index or 0}"
    folder.mkdir(exist_ok=True)
    return folder


def take_ticket(device: torch.device, pid: int | None = None) -> Path:
    """A place at the end of the queue, for this process or another one."""
    who = identity(pid)
    ticket = queue_of(device) / f"{time.time_ns():020d}-{who['pid']}.ticket"
    write_json(ticket, who)
    return ticket


def _living(folder: Path) -> list[tuple[Path, dict]]:
    """Tickets whose processes live, oldest first; those of dead ones are thrown away."""
    found = []
    for ticket in sorted(folder.glob("*.ticket")):
        try:
            who = json.loads(ticket.read_text(encoding="utf-8"))
            alive = lives(who)
        except (OSError, ValueError, KeyError, TypeError):   # gone meanwhile, or no ticket of ours
            alive = False
        if alive:
            found.append((ticket, who))
        else:
            ticket.unlink(missing_ok=True)
    return found


def say(ahead: int) -> None:
    """What shells and notebooks read while they wait."""
    print(f"Waiting for the device: {ahead} before it.", file=sys.stderr)


@contextlib.contextmanager
def turn(device: torch.device, waiting: Callable[[int], None]) -> Iterator[None]:
    """Hold a device; those that came first go first. Whoever holds it already need not wait for himself.

    Args:
        waiting: called with how many are ahead, and again when that changes, until it is this process's turn.
    """
    folder, told = queue_of(device), 0
    if folder in _held.get():
        yield
        return
    mine = next((ticket for ticket, who in _living(folder) if who["pid"] == os.getpid()), None) or take_ticket(device)
    lock = FileLock(folder / "lock")
    try:
        while True:
            ahead = [ticket for ticket, _ in _living(folder) if ticket.name < mine.name]
            if not ahead:
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0)
                    break
            if told != max(1, len(ahead)):
                told = max(1, len(ahead))
                waiting(told)
            time.sleep(POLL)
        before = _held.set(_held.get() | {folder})
        try:
            yield
        finally:
            _held.reset(before)
    finally:
        mine.unlink(missing_ok=True)
        lock.release()

"""What the command line shows while it works: bars on stderr, where somebody watches."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

UNITS = {"general importance": "block", "compensation": "block", "sparsegpt": "block", "wanda": "block", "evaluation": "batch of windows"}


@contextlib.contextmanager
def counting():
    """A bar on stderr for one thing after the other; yields what to call with (what, done, total)."""
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(), console=console,
                  transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("loading model and tasks", total=None)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done, total=total)


@contextlib.contextmanager
def watching():
    """Bars on stderr that name stage, block and time left; yields what to call with a run's status."""
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[note]}"),
                  TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal) as bars:
        whole = bars.add_task("loading model and text", total=None, note="")
        part = bars.add_task("", total=1, visible=False, note="")

        def watch(status):
            left = f"{status.eta:.0f} s left" if status.eta is not None else ""
            bars.update(whole, description="whole run", total=1, completed=status.share, note=left)
            unit = UNITS.get(status.stage, "batch")
            bars.update(part, description=f"{status.stage} · {status.about}", total=status.total, completed=status.done, visible=True,
                        note=f"{unit} {min(status.done + 1, status.total)}/{status.total}")
        yield watch

"""Signals that ask a process to end: a terminal that closes, a batch system's time limit, `cancel`. They are taken as ctrl-C is."""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def asked_by() -> str:
    """The signal that asks this process to end a run: what a shell puts into the background, and all that it starts, does not hear ctrl-C.

    That stays so, lest a ctrl-C that is meant for something else end it.
    """
    return "SIGTERM" if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else "SIGINT"


def ignore(numbers: Iterable[int]) -> None:
    """From now on these signals mean nothing."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def heard(answer: Callable[[], BaseException | None] = KeyboardInterrupt, numbers: Iterable[int] = ENDING) -> Iterator[None]:
    """While open, signals that would end the process at once raise KeyboardInterrupt, so that it tidies up; those that are ignored, as by nohup, stay so.

    Only the first counts: batch systems tell a process, and what has started it, which tells it once more.

    Args:
        answer: gives what is raised; None lets the process go on.
        numbers: of the signals.
    """
    def end(*_):
        if problem := answer():
            ignore(before)
            raise problem

    before = {}
    with contextlib.suppress(ValueError):   # only a process's main thread may
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):   # None: of a library, which Python cannot put back
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:   # else the process is ending, and is not to be asked again
                signal.signal(number, handler)

"""The one exception for what a user can mend."""

LONGEST = 400   # characters of what is wrong


def shortened(said: str) -> str:
    """A text with its middle left out where it is long: a value that was given may be a whole file."""
    return said if len(said) <= LONGEST else f"{said[:LONGEST - 100]} … {said[-97:]}"


class InputError(ValueError):
    """Something that was given cannot be used.

    Its message is one sentence that says what is wrong, why, and what to do. The command line prints it without a traceback and exits with 1;
    the run folder keeps the three parts apart.

    Args:
        what: what is wrong, naming the thing as the user wrote it; shortened.
        why: the reason found.
        fix: what to do about it, as an instruction.
    """

    def __init__(self, what: str, why: str, fix: str):
        self.what, self.why, self.fix = shortened(what), why, fix
        super().__init__(f"{self.what}: {why}; {fix}.")

"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something that was given cannot be used.

    Its message is one sentence that says what is wrong, why, and what to do. The command line prints it without a traceback and exits with 1;
    the run folder keeps the three parts apart.

    Args:
        what: what is wrong, naming the thing as the user wrote it.
        why: the reason found.
        fix: what to do about it, as an instruction.
    """

    def __init__(self, what: str, why: str, fix: str):
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what}: {why}; {fix}.")

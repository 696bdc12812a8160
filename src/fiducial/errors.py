"""The two ways a command ends badly. Everything else is a bug and keeps its traceback."""


class InputError(ValueError):
    """What the user gave cannot be used: refused before any work, exit code 2. One sentence that
    names the place, the reason and the remedy.
    """


class RunError(RuntimeError):
    """A run failed on the way: what was computed is saved, exit code 1. One sentence that names the
    step, the reason and how to go on.
    """

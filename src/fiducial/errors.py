"""The errors that a command reports in one sentence. Any other is a bug, with its traceback."""


class InputError(ValueError):
    """The user's input cannot be used, which is found before any work begins; exit code 2.

    The message is one sentence that names the place, the reason and the remedy.
    """


class LaunchError(InputError):
    """Several processes were asked for in a way that cannot be given; every process prints it."""


class RunError(RuntimeError):
    """A run failed after it started. What was computed is saved; exit code 1.

    The message is one sentence that names the step, the reason and how to go on.
    """

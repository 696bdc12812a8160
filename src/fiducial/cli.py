"""The command line: one subcommand per verb. It parses, calls and prints; it knows no method."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from typing import Any

from . import verbs
from .errors import InputError, LaunchError, RunError
from .names import printable

HELP = """\
fiducial: align language models on one machine

usage: fiducial VERB [--config run.yaml] [--flag VALUE ...]
       fiducial VERB --help            the settings that everyone turns, with defaults and sources
       fiducial VERB --help all        every setting

{verbs}

An example, from a base model to an aligned one:
  fiducial sft     --model DIR_OR_NAME --data demonstrations.jsonl --out runs/sft
  fiducial collect --model runs/sft/model --prompts prompts.jsonl --judge judge.py:score \\
                   --out pairs.jsonl
  fiducial reward  --model runs/sft/model --data pairs.jsonl --out runs/reward
  fiducial ppo     --model runs/sft/model --data prompts.jsonl --reward runs/reward/model \\
                   --out runs/ppo
  fiducial dpo     --model runs/sft/model --data pairs.jsonl --out runs/dpo
  fiducial grpo    --model runs/sft/model --data questions.jsonl --reward numeric_answer \\
                   --out runs/grpo
  fiducial eval    --model runs/ppo/model --baseline runs/sft/model --prompts held_out.jsonl \\
                   --judge judge.py:score

Will it work? `fiducial check VERB --flag VALUE ...` reads the rows, computes one step and tries the
rewards, in a minute and without a run.
Is it right? `fiducial lab` runs the methods where the optimum is known. In Python,
fiducial.lab.check_policy_loss and the other checks there test a loss of your own.
A run is a folder with config.yaml, metrics.jsonl, samples.jsonl, model/ and report.html.
Stop a run with Ctrl-C (or SIGTERM); go on with --resume.
Several processes: torchrun --nproc_per_node 2 -m fiducial VERB ...
Exit codes: 0 done; 1 failed while running (what was trained is saved); 2 refused before it started.
--debug shows tracebacks."""


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
"""Errors of a disk, which are told in a sentence wherever they arise."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # threads that wait should sleep, not spin: on a busy machine spinning costs ten times the work
    # (read when torch is first loaded)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        table = verbs.verbs()
        width = max(map(len, table))
        rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in table.items())
        print(HELP.format(verbs=rows))
        return 0
    if args[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    try:
        return _run(args[0], args[1:])
    except InputError as error:
        return _fail(error, 2, debug)
    except RunError as error:
        return _fail(error, 1, debug)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("stopped at once"), 1, debug)
    except BrokenPipeError:  # `fiducial VERB --help | head`: whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = error.filename or "a file"  # a write that fails does not know its file
        fault = RunError(f"{where} cannot be read or written: {error.strerror}")
        return _fail(fault, 1, debug)


def _run(name: str, args: list[str]) -> int:
    table = verbs.verbs()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise InputError(f"there is no verb {name!r}{hint} (fiducial --help lists them)")
    from .parse import parse  # it imports pydantic, which `fiducial --help` does not need

    verb = table[name]
    if verb is verbs.CHECK:
        return _check(args)
    settings = parse(verbs.resolve(verb.settings), args, command=name)
    result = verbs.resolve(verb.run)(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_result(verb, result)
    return 0


def _check(args: list[str]) -> int:
    """`fiducial check VERB` with the verb's own flags; its exit code says what was found."""
    from .parse import parse_check

    name, settings, json = parse_check(args)
    report = verbs.resolve(verbs.CHECK.run)(name, settings)
    print(report.as_json() if json else "\n".join(report.as_lines()))
    return int(report.exit_code)


def _print_result(verb: verbs.Verb, result: Any) -> None:
    """The last lines: a verb's own, the numbers and the page of a run, or the path of a file."""
    if verb.lines is not None:
        print("\n".join(verbs.resolve(verb.lines)(result)))
    elif hasattr(result, "evaluation"):
        from .report.numbers import Estimate, with_interval

        for label, estimate in result.evaluation.items():
            print(f"{label}: {with_interval(Estimate(**estimate))}")
        print(printable(str(result.path / "report.html")))
    elif isinstance(result, os.PathLike):
        print(printable(str(result)))


def _fail(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        raise error
    # what is refused is refused by all processes, and said once on each machine
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first or code == 1 or isinstance(error, LaunchError):
        # one line, whatever stands in the text of a user that it repeats
        text = printable("\\n".join(str(error).splitlines()))
        print(f"fiducial: {text}", file=sys.stderr)
    return code

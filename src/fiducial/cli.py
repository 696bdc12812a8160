"""The command line: one subcommand a verb. It parses, calls and prints; it knows no method."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import InputError, RunError


class Verb(NamedTuple):
    """Where a verb lives (module:settings:function), and the one line that --help shows."""

    where: str
    line: str


VERBS = {
    "demo": Verb(
        "demo.pipeline:Demo:demo",
        "the whole pipeline on an embedded world, in minutes on a CPU; prints where the page is",
    ),
    "sft": Verb("methods.sft:SFT:sft", "supervised fine-tuning on demonstrations"),
    "reward": Verb(
        "methods.reward_model:RewardModel:reward", "a Bradley-Terry reward model from comparisons"
    ),
    "prm": Verb(
        "methods.prm:PRM:prm",
        "a process reward model from solutions with labelled steps, or from their outcomes alone",
    ),
    "ppo": Verb(
        "methods.ppo:PPO:ppo",
        "sample, score and improve, with a critic and a KL penalty to a frozen reference",
    ),
    "reinforce": Verb(
        "methods.reinforce:Reinforce:reinforce",
        "the same without a critic: RLOO, ReMax, REINFORCE++, a running mean or no baseline",
    ),
    "grpo": Verb(
        "methods.grpo:GRPO:grpo",
        "the same against the other responses to a prompt: GRPO, Dr. GRPO, DAPO, GSPO, CISPO",
    ),
    "dpo": Verb("methods.dpo:DPO:dpo", "learn from comparisons without a reward model"),
    "distill": Verb(
        "methods.distill:Distill:distill",
        "learn from a teacher on samples of one's own: the reverse KL, token by token",
    ),
    "collect": Verb(
        "use.collect:Collect:collect",
        "sample responses, have a judge compare them, write preference rows",
    ),
    "generate": Verb("use.generate:Generate:generate", "answer a file of prompts"),
    "eval": Verb(
        "use.evaluate:Evaluate:evaluate",
        "win rate, score, KL and length of a model, with intervals",
    ),
    "lab": Verb(
        "lab.command:Lab:lab",
        "every method against the exactly known optimum of small worlds, and a page with the "
        "derivations and their numbers",
    ),
    "report": Verb("report.command:Report:report", "write the page of a run again"),
}

HELP = """fiducial: align language models on one machine

usage: fiducial VERB [--config run.yaml] [--flag value ...]
       fiducial VERB --help          every setting of a verb, with its default and where that comes from

{verbs}

An example, from a base model to an aligned one:
  fiducial sft     --model DIR_OR_NAME --data demonstrations.jsonl --out runs/sft
  fiducial collect --model runs/sft/model --prompts prompts.jsonl --judge judge.py:score --out pairs.jsonl
  fiducial reward  --model runs/sft/model --data pairs.jsonl --out runs/reward
  fiducial ppo     --model runs/sft/model --data prompts.jsonl --reward runs/reward/model --out runs/ppo
  fiducial dpo     --model runs/sft/model --data pairs.jsonl --out runs/dpo
  fiducial grpo    --model runs/sft/model --data questions.jsonl --reward numeric_answer --out runs/grpo
  fiducial eval    --model runs/ppo/model --baseline runs/sft/model --prompts held_out.jsonl --judge judge.py:score

Is it right? fiducial lab runs the methods where the optimum is known; fiducial.lab.check_policy_loss and its kin check a loss of yours.
Every run is a folder with config.yaml, metrics.jsonl, samples.jsonl, model/ and report.html. Stop it with Ctrl-C; go on with --resume.
Several processes: torchrun --nproc_per_node 2 -m fiducial VERB ...
Exit codes: 0 done, 1 failed while running (what was trained is saved), 2 refused before it started. --debug shows tracebacks."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # threads that wait should sleep, not spin: on a busy machine spinning costs ten times the work
    # (read when torch is first loaded)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(
            HELP.format(
                verbs="\n".join(f"  {name:<{width}}  {verb.line}" for name, verb in VERBS.items())
            )
        )
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


def _run(name: str, args: list[str]) -> int:
    from . import verbs

    known = verbs.verbs()
    if name not in known:
        raise InputError(f"there is no verb {name!r} (fiducial --help lists them)")
    from .parse import parse

    settings = parse(verbs.resolve(known[name].settings), args, command=name)
    function = verbs.resolve(known[name].run)
    result = function(settings)
    _say_result(name, importlib.import_module(function.__module__), result)
    return 0


def _say_result(name: str, module: Any, result: Any) -> None:
    """The last lines: numbers for eval, the page for everything that wrote one."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if hasattr(module, "as_lines"):
        print("\n".join(module.as_lines(result)))
    elif hasattr(result, "evaluation"):
        from .report.numbers import Estimate, with_interval

        for label, estimate in result.evaluation.items():
            print(f"{label}: {with_interval(Estimate(**estimate))}")
        print(result.path / "report.html")
    elif isinstance(result, os.PathLike):
        print(result)


def _fail(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        raise error
    if int(os.environ.get("RANK", "0")) == 0 or code == 1:
        print(f"fiducial: {error}", file=sys.stderr)
    return code

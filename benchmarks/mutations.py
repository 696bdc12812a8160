"""Which changes of the source does no test notice? A mutation pass.

Small faults are planted in the source one at a time (an operator exchanged, a constant changed, a
`.detach()` or a statement removed), and the tests that belong to the file run until the first of
them fails. A mutant that no test fails for is a survivor: a missing test, or a change that makes no
difference, which is then listed in `EQUIVALENT` with the reason.

    python benchmarks/mutations.py --sample 40 --seed 0 --only core losses

Each mutant lives in a fork of this process, which has imported torch and pytest but nothing of
fiducial; the working tree is not touched. Times are processor time, so a busy machine changes
nothing. Linux and macOS.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fiducial"
FOLDERS = ("core", "losses", "methods", "rollout", "train")
CONTROL = "core/intervals.py"
"""The file whose tests are run unchanged, to see that they pass without a mutant."""

ONLINE = ("methods/test_reinforce_grpo.py", "rewards/test_functions.py")

TESTS = {  # the first pattern that fits decides; the tests that fail soonest come first
    "core/shared_prefix.py": ["core/test_shared_prefix.py", "exact/test_pairs.py"],
    "core/intervals.py": ["core/test_intervals.py"],
    "core/best_of_n.py": ["exact/test_best_of_n.py", "use/test_best_of.py"],
    "core/logprobs.py": ["core/test_logprobs.py", "models/test_models.py"],
    "core/kl.py": ["core/test_kl.py", "exact/test_penalties.py", "exact/test_policy_gradient.py"],
    "core/corrections.py": ["exact/test_weights.py", "methods/test_reinforce_grpo.py"],
    "core/": ["core", "losses", "exact/test_sequence.py", "exact/test_policy_gradient.py"],
    "losses/distill.py": ["losses", "methods/test_distill.py"],
    "losses/policy.py": ["losses", "exact/test_sequence.py", "exact/test_policy_gradient.py"],
    "losses/process.py": ["methods/test_prm.py"],
    "losses/": ["losses", "exact/test_pairs.py"],
    "methods/settings/": ["test_cli.py", "test_settings.py", "methods/test_reinforce_grpo.py"],
    "methods/dpo.py": ["methods/test_offline.py", "methods/test_methods.py", "exact/test_pairs.py"],
    "methods/sft.py": ["methods/test_offline.py", "methods/test_methods.py"],
    "methods/ppo.py": [*ONLINE, "methods/test_methods.py"],
    "methods/reinforce.py": [*ONLINE, "methods/test_methods.py"],
    "methods/grpo.py": [*ONLINE, "methods/test_methods.py"],
    "methods/distill.py": ["methods/test_distill.py"],
    "methods/prm.py": ["methods/test_prm.py"],
    "methods/reward_model.py": ["methods/test_offline.py", "methods/test_methods.py"],
    "methods/": ["methods/test_offline.py", "methods/test_protocols.py", "methods/test_methods.py"],
    "rollout/agreement.py": ["models/test_contract.py", "methods/test_refused_models.py"],
    "rollout/": ["rollout", "models/test_models.py", "exact/test_policy_gradient.py"],
    "train/renderer.py": ["models/test_ends.py", "models/test_models.py"],
    "train/launch.py": ["train/test_launch.py"],
    "train/": ["train", "test_run.py", "methods/test_offline.py", "methods/test_resume.py"],
}
WORDS = {"dpo", "sft", "ppo", "reinforce", "grpo", "reward"}
"""Methods by which the tests of `methods/test_methods.py` are chosen for the page of one."""

EQUIVALENT: dict[str, str] = {
    "rollout/draw.py: -1 -> (1) in return chosen, logp.gather(-1, chosen[:, None])[:, 0]": (
        "of two dimensions the last is number 1"
    ),
    "core/best_of_n.py: torch.as_tensor(x, dtype=torch.float64).detach() -> "
    "(torch.as_tensor(x, dtype=torch.float64)) in "
    "torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (scores, values)": (
        "what comes out is a number, which has no gradient"
    ),
    "core/logprobs.py: hidden.sum() * 0.0 -> (hidden.sum() / 0.0) in "
    "empty = hidden.sum() * 0.0 + hidden.new_zeros(0, dtype=_precision(hidden))": (
        "of no tokens nothing comes out, and no gradient goes in"
    ),
    "core/logprobs.py: n > size and torch.is_grad_enabled() -> (n > size or "
    "torch.is_grad_enabled()) in recompute = n > size and torch.is_grad_enabled()": (
        "one chunk that is computed again is the same, and only slower"
    ),
    "train/processes.py: processes.count > 1 -> (processes.count >= 1) in "
    "if i + 1 < len(items) and processes.count > 1:": (
        "a single process has no gradients to exchange"
    ),
    "core/logprobs.py: 20 -> (40) in CHUNK_BYTES = 32 * 2**20": (
        "another size of a chunk changes memory alone (benchmarks/logprob_memory.py)"
    ),
    "train/reference_cache.py: weight.detach() -> (weight) in "
    "state.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)": (
        "the function runs without gradients"
    ),
    "methods/sft.py: 0 -> (1) in probe = torch.tensor([train[0].ids[:64]])": (
        "the saved model may be compared on any row"
    ),
}
"""Mutants that change nothing that could be seen, as `file: old -> new in line`, and why."""

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "floor": "ceil", "any": "all"}
NAMES |= {new: old for old, new in NAMES.items()}
SILENT = {"say", "assert_", "same_shape"}
"""Calls that are left alone: what is said is no number, and shapes are checked by tests of their
own that not every caller repeats."""


@dataclass(frozen=True)
class Mutant:
    """One planted fault: the text from `start` to `end` of a file becomes `new`."""

    path: str
    line: int
    text: str
    start: int
    end: int
    old: str
    new: str

    @property
    def name(self) -> str:
        squeeze = " ".join
        change = f"{squeeze(self.old.split())} -> {squeeze(self.new.split())}"
        return f"{self.path}: {change} in {self.text}"


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file below `src/fiducial`."""
    text = (SOURCE / path).read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()

    def place(node: Any) -> tuple[int, int]:
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    for node, new in changes(ast.parse(text)):
        start, end = place(node)
        replaced = new if isinstance(new, str) else f"({ast.unparse(new)})"
        old = data[start:end].decode()
        yield Mutant(path, node.lineno, lines[node.lineno - 1].strip(), start, end, old, replaced)


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | str]]:
    """(node, what takes its place) for each fault that can be planted."""
    for node in _computed(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            yield node, ast.BinOp(node.left, BINARY[type(node.op)](), node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            op = COMPARE[type(node.ops[0])]()
            yield node, ast.Compare(node.left, [op], node.comparators)
        elif isinstance(node, ast.BoolOp):
            op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield node, ast.BoolOp(op, node.values)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            yield node, node.operand
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield node, ast.Constant(not node.value)
            elif isinstance(node.value, int | float):
                yield node, ast.Constant(node.value * 2 if node.value else 1)
        elif isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
            op = BINARY[type(node.op)]()
            yield node, ast.unparse(ast.AugAssign(node.target, op, node.value))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "pass"
        elif isinstance(node, ast.Call) and (other := _other_call(node)) is not None:
            yield node, other


def _other_call(call: ast.Call) -> ast.expr | None:
    """The call with its function exchanged, or what a `.detach()` stands behind."""
    name, func = _name(call), call.func
    if isinstance(func, ast.Attribute) and name == "detach":
        return func.value
    if name not in NAMES:
        return None
    if isinstance(func, ast.Attribute):
        return ast.Call(ast.Attribute(func.value, NAMES[name]), call.args, call.keywords)
    return ast.Call(ast.Name(NAMES[name]), call.args, call.keywords)


def _computed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree that compute something: no annotations, decorators, errors or texts."""
    skipped = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, skipped):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            call = child.value if isinstance(child, ast.Expr) else child
            if isinstance(call, ast.Call) and _name(call) in SILENT:
                continue
            yield child
            yield from _computed(child)


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def tests_of(path: str) -> list[str]:
    """The arguments of pytest for a file."""
    found = next(tests for pattern, tests in TESTS.items() if path.startswith(pattern))
    words = [str(ROOT / "tests" / test) for test in found]
    stem = Path(path).stem.replace("reward_model", "reward")
    if stem in WORDS and any(test.endswith("test_methods.py") for test in found):
        others = " or ".join(sorted(WORDS - {stem}))
        words += ["-k", f"{stem} or not ({others}) or step or offline"]
    return words


class Planted(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module of the package with the mutant's text in place of its own."""

    def __init__(self, mutant: Mutant | None) -> None:
        self.mutant = mutant
        path = mutant.path if mutant else CONTROL
        parts = Path(path).with_suffix("").parts
        self.module = ".".join(("fiducial", *(p for p in parts if p != "__init__")))
        self.path = SOURCE / path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=package
        )

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        data = self.path.read_bytes()
        if (m := self.mutant) is None:
            return data
        return data[: m.start] + m.new.encode() + data[m.end :]


def run(mutant: Mutant | None, path: str, seconds: float, log: Path) -> tuple[str, float]:
    """("killed", "survived" or "too long", seconds of processor time) of a fork with the mutant."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        code = 3
        try:
            sys.meta_path.insert(0, Planted(mutant))
            import pytest

            options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--assert=plain", "--tb=line"]
            code = int(pytest.main([*options, *tests_of(path)]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > 20 * seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    used = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        return "too long", used
    return ("survived" if os.WEXITSTATUS(status) == 0 else "killed"), used


def warm() -> None:
    """Import what all tests need, once, and nothing of the package."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src")]
    import accelerate
    import hypothesis
    import peft
    import pytest
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        getattr(transformers, name)
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"):
        getattr(transformers, name)
    assert accelerate and hypothesis and peft and pytest
    assert not any(name.split(".")[0] == "fiducial" for name in sys.modules)


def stratified(pool: list[Mutant], count: int, rng: random.Random) -> list[Mutant]:
    """`count` mutants, as many from each folder where it has as many."""
    folders: dict[str, list[Mutant]] = {}
    for mutant in rng.sample(pool, len(pool)):
        folders.setdefault(mutant.path.split("/")[0], []).append(mutant)
    rounds = zip_longest(*(folders[name] for name in sorted(folders)))
    return [m for one in rounds for m in one if m is not None][:count]


def try_one(mutant: Mutant, seconds: float, log: Path, table: dict[str, dict[str, int]]) -> float:
    """Plant a mutant, print it if it survives, and count it in the table; returns the time."""
    verdict, used = run(mutant, mutant.path, seconds, log)
    if verdict == "survived" and mutant.name in EQUIVALENT:
        verdict = "equivalent"
    row = table.setdefault(mutant.path.split("/")[0], {})
    row[verdict] = row.get(verdict, 0) + 1
    if verdict in ("survived", "too long"):
        old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
        print(f"{verdict}: src/fiducial/{mutant.path}:{mutant.line}", flush=True)
        print(f"    - {old}\n    + {new}", flush=True)
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=40, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(FOLDERS), help="folders or files")
    parser.add_argument("--seconds", type=float, default=90, help="processor time of a mutant")
    parser.add_argument("--list", action="store_true", help="only name the mutants")
    args = parser.parse_args()
    files = sorted(
        str(p.relative_to(SOURCE))
        for folder in FOLDERS
        for p in (SOURCE / folder).rglob("*.py")
        if any(str(p.relative_to(SOURCE)).startswith(only) for only in args.only)
    )
    every = {f: list(mutants(f)) for f in files}
    pool = [m for found in every.values() for m in found]
    chosen = stratified(pool, args.sample, random.Random(args.seed))
    print(f"{len(chosen)} of {len(pool)} mutants of {len(files)} files, seed {args.seed}")
    if args.list:
        print("\n".join(m.name for m in chosen))
        return
    warm()
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutations-{os.getpid()}.log"
    verdict, _ = run(None, CONTROL, args.seconds, log)
    assert verdict == "survived", f"the tests fail without a mutant: {log}"
    table: dict[str, dict[str, int]] = {}
    total = 0.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, mutant in enumerate(chosen, start=1):
            total += try_one(mutant, args.seconds, log, table)
            print(f"{number}/{len(chosen)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped before the last mutant")
    log.unlink(missing_ok=True)
    print(f"\n{'folder':10}" + "".join(f"{c:>12}" for c in ("mutants", *COLUMNS)))
    for folder, row in sorted(table.items()):
        numbers = (sum(row.values()), *(row.get(c, 0) for c in COLUMNS))
        print(f"{folder:10}" + "".join(f"{n:12}" for n in numbers))
    print(f"{total / 60:.0f} minutes of processor time")


COLUMNS = ("killed", "too long", "equivalent", "survived")

if __name__ == "__main__":
    main()

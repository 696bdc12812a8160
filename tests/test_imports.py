"""The direction of imports: what stands lower knows nothing of what stands higher, nobody imports a
sibling, a method never imports a method, and no circle leads from a file to itself.

Every import counts, whether it stands at the top of a file, in a function, or for type checkers.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import fiducial
from fiducial import verbs

ROOT = Path(fiducial.__file__).parent
GROUND = {
    "building",
    "config_file",
    "errors",
    "kl_choice",
    "metric",
    "metrics",
    "names",
    "settings",
    "verbs",
}
TOP = {"cli", "parse", "flags", "usage", "__main__", "__init__"}
LEVELS = [
    GROUND,
    {"core"},
    {"losses"},
    {"data", "models"},
    {"train"},
    {"report"},
    {"run"},
    {"rollout", "rewards"},
    {"methods", "use"},
    {"lab", "demo", "check"},
    TOP,
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
SIBLINGS = {("rewards", "rollout")}
"""Who may import whom on the same level: rewards read rollout's types."""
WINGS = ["settings", "worlds", "kit", "study", "runs", "page", "command"]
"""The lab's own levels."""
PAGES = {row.run.removeprefix(".").partition(":")[0] for row in verbs.METHODS}
"""The modules that are a method's page."""
DYNAMIC = {"__init__", "lab", "verbs", "rewards.calling"}
"""Who may import a module by a name that is no constant: two lists of public names, the table of
verbs, and the reader of a user's reward function.
"""

Tree = Mapping[str, str]
"""The text of every file by its dotted name below `fiducial`; a package by its own name."""


def tree() -> dict[str, str]:
    files = {}
    for path in [*ROOT.rglob("*.py")]:
        parts = [*path.relative_to(ROOT).with_suffix("").parts]
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        files[".".join(parts)] = path.read_text(encoding="utf-8")
    return files


FILES = tree()


def is_package(name: str) -> bool:
    return name == "__init__" or (ROOT / Path(*name.split("."))).is_dir()


@functools.cache
def nodes(text: str) -> list[ast.Import | ast.ImportFrom | ast.Call]:
    """The imports and the calls of a file, at whatever depth they stand."""
    wanted = (ast.Import, ast.ImportFrom, ast.Call)
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, wanted)]


def imports(name: str, files: Tree) -> Iterator[tuple[str, int]]:
    """(file, line) of every import of the package in a file."""
    parts = [] if name == "__init__" else name.split(".")
    package = parts if is_package(name) else parts[:-1]

    def found(dotted: list[str], line: int) -> Iterator[tuple[str, int]]:
        if dotted and ".".join(dotted) in files:
            yield ".".join(dotted), line
        elif not dotted:
            yield "__init__", line

    for node in nodes(files[name]):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[:1] == ["fiducial"]:
                base = module[1:]
            else:
                continue
            for alias in node.names:
                own = [*base, alias.name]
                yield from found(own if ".".join(own) in files else base, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fiducial":
                    yield from found(alias.name.split(".")[1:], node.lineno)


def arrows(files: Tree) -> Iterator[tuple[str, str, int]]:
    for name in files:
        for there, line in imports(name, files):
            if there != name:
                yield name, there, line


def wrong_arrows(files: Tree) -> list[str]:
    """Arrows that lead upward or to a sibling; the list of public names may point anywhere."""
    bad = []
    for here, there, line in arrows(files):
        a, b = here.split(".")[0], there.split(".")[0]
        upward = LEVEL[b] > LEVEL[a]
        sideways = a != b and LEVEL[a] == LEVEL[b] and not {a, b} <= GROUND and not {a, b} <= TOP
        if here != "__init__" and (upward or (sideways and (a, b) not in SIBLINGS)):
            bad.append(f"{here}:{line} imports {there}")
    return bad


def wrong_in_methods(files: Tree) -> list[str]:
    """Arrows to a method's page from within `methods`, or from a page to another's settings."""
    bad = []
    for here, there, line in arrows(files):
        if here.split(".")[0] != "methods":
            continue
        foreign = there.startswith("methods.settings.") and (
            (here in PAGES or here.startswith("methods.settings."))
            and here.split(".")[-1] != there.split(".")[-1]
        )
        if there in PAGES or foreign:
            bad.append(f"{here}:{line} imports {there}")
    return bad


def wrong_in_lab(files: Tree) -> list[str]:
    """Arrows from a wing of the lab to a higher one."""
    bad = []
    for here, there, line in arrows(files):
        a, b = here.split("."), there.split(".")
        inside = a[0] == b[0] == "lab" and len(a) > 1 and len(b) > 1
        if inside and WINGS.index(b[1]) > WINGS.index(a[1]):
            bad.append(f"{here}:{line} imports {there}")
    return bad


def circles(files: Tree) -> list[list[str]]:
    """Groups of files each of which reaches all others by imports (Tarjan's components)."""
    edges: dict[str, set[str]] = {name: set() for name in files}
    for here, there, _ in arrows(files):
        edges[here].add(there)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for there in edges[name]:
            if there not in number:
                visit(there)
                low[name] = min(low[name], low[there])
            elif there in stack:
                low[name] = min(low[name], number[there])
        if low[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                out.append(sorted(group))

    for name in files:
        if name not in number:
            visit(name)
    return out


def hidden(files: Tree) -> list[str]:
    """Imports by a name in a string, where an arrow upward could hide."""
    bad = []
    for name, text in files.items():
        for node in nodes(text):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.split(".")[-1] in ("import_module", "__import__") and name not in DYNAMIC:
                bad.append(f"{name}:{node.lineno} calls {called}")
            resolves = called == "verbs.resolve" or (
                called == "resolve" and "verbs import" in text and "resolve" in text
            )
            if resolves and name != "verbs" and LEVEL[name.split(".")[0]] < LEVEL["lab"]:
                bad.append(f"{name}:{node.lineno} resolves a verb")
    return bad


def test_every_file_has_a_level():
    assert {name.split(".")[0] for name in FILES} <= set(LEVEL)
    wings = {n.split(".")[1] for n in FILES if n.startswith("lab.")}
    assert wings <= set(WINGS)
    assert set(FILES) >= PAGES


def test_imports_point_downward_and_never_to_a_sibling():
    assert wrong_arrows(FILES) == []


def test_a_method_never_imports_a_method():
    assert wrong_in_methods(FILES) == []


def test_the_wings_of_the_lab_point_downward():
    assert wrong_in_lab(FILES) == []


def test_no_circle_of_files():
    assert circles(FILES) == []


def test_no_arrow_is_hidden_in_a_string():
    assert hidden(FILES) == []


def test_no_file_is_longer_than_400_lines_and_no_page_of_a_method_than_300():
    long = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert {name: n for name, n in long.items() if n > (300 if name in PAGES else 400)} == {}


def planted(name: str, line: str) -> dict[str, str]:
    return {**FILES, name: FILES.get(name, "") + f"\n{line}\n"}


LAZY = "def late() -> None:\n    {}"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}"


@pytest.mark.parametrize("where", ["{}", LAZY, TYPES])
@pytest.mark.parametrize(
    ("check", "name", "line"),
    [
        (wrong_arrows, "core.kl", "from ..methods.ppo import PPO"),
        (wrong_arrows, "core.kl", "from .. import settings, lab"),
        (wrong_arrows, "core.kl", "import fiducial.cli"),
        (wrong_arrows, "data.rows", "from ..models import roles"),
        (wrong_arrows, "methods.ppo", "from ..use.collect import collect"),
        (wrong_arrows, "rollout.trajectory", "from ..rewards.types import Scored"),
        (wrong_arrows, "demo.world", "from ..lab.worlds import world"),
        (wrong_arrows, "report.page", "from ..run import Run"),
        (wrong_arrows, "kl_choice", "from .core import kl"),
        (wrong_in_methods, "methods.ppo", "from .grpo import grpo"),
        (wrong_in_methods, "methods.ppo", "from . import dpo"),
        (wrong_in_methods, "methods.setup", "from .ppo import ppo"),
        (wrong_in_methods, "methods.ppo", "from .settings.grpo import GRPO"),
        (wrong_in_methods, "methods.settings.ppo", "from .grpo import GRPO"),
        (wrong_in_lab, "lab.worlds.world", "from ..kit import checks"),
        (wrong_in_lab, "lab.kit.checks", "from ..command import lab"),
        (circles, "errors", "from . import settings"),
        (circles, "core.reductions", "from .kl import estimate"),
    ],
)
def test_the_check_sees_what_is_planted(check, name, line, where):
    assert set(map(str, check(planted(name, where.format(line))))) - before(check)


@functools.cache
def before(check) -> set[str]:
    """What a check finds without anything planted."""
    return set(map(str, check(FILES)))


def test_the_check_sees_an_import_by_name_and_a_page_that_grew():
    found = hidden(planted("report.page", "import importlib\nimportlib.import_module('x')"))
    assert any(where.startswith("report.page:") for where in found)
    found = hidden(planted("run", "from . import verbs\nverbs.resolve('x:y')"))
    assert any(where.startswith("run:") for where in found)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = [
        "torch",
        "transformers",
        "pydantic",
        "datasets",
        "peft",
        "accelerate",
        "plotly",
        "numpy",
    ]
    code = f"import sys, fiducial, fiducial.cli; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_help_of_the_command_loads_nothing_heavy():
    code = (
        "import sys, fiducial.cli; fiducial.cli.main(['--help']); "
        "print([m for m in ['torch', 'transformers', 'pydantic'] if m in sys.modules])"
    )
    out = python(code)
    assert out.endswith("[]") and "fiducial ppo" in out


def stub() -> list[ast.ImportFrom]:
    body = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.ImportFrom)]


def test_every_public_name_is_listed_once_and_typed_for_users():
    names = [alias.asname for node in stub() for alias in node.names]
    assert len(names) == len(set(names))
    assert ["__version__", *names] == fiducial.__all__
    assert (ROOT / "py.typed").is_file()


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_every_public_name_is_itself_whichever_is_touched_first(order):
    step = 1 if order == "forward" else -1
    code = f"""
import importlib, types, fiducial as fd
names = fd.__all__[::{step}]
for touch in names:
    assert getattr(fd, touch) is not None, touch
for name in names:
    module, attribute = fd._WHERE.get(name, (".", name))
    if name == "__version__":
        continue
    found = getattr(fd, name)
    if isinstance(found, types.ModuleType):
        assert name in ("lab", "losses", "advantages", "kl"), name
    else:
        assert found is getattr(importlib.import_module(module, "fiducial"), attribute), name
        assert callable(found) and found.__name__ == attribute, name
print("all")
"""
    assert python(code) == "all"


def test_no_file_of_the_package_can_hide_a_public_name():
    below = {name.split(".")[0] for name in FILES}
    modules = {alias.name for node in stub() if node.module is None for alias in node.names}
    assert below & set(fiducial.__all__) == modules


def test_nobody_outside_its_room_asks_what_kind_of_scorer_or_sampler_it_holds():
    kinds = r"(isinstance\(.*(Reward|Scorer|Judge|Sampler)\b)|\bLocalSampler\b"
    rooms = ("rewards", "rollout")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in rooms
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(kinds, line)
    ]
    assert found == []


def nesting(node: ast.AST, depth: int = 0) -> int:
    """The deepest block under a node; a function begins at 0, and `elif` adds nothing."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        elif_ = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        below = 0 if isinstance(child, ast.FunctionDef) else depth
        below += isinstance(child, blocks) and not elif_
        deepest = max(deepest, nesting(child, below))
    return deepest


def test_the_pages_of_methods_are_nested_four_deep_at_most():
    assert nesting(ast.parse("for a in b:\n if a:\n  with c:\n   while d:\n    if e: pass")) == 5
    pages = sorted((ROOT / "methods").glob("*.py"))
    assert len(pages) >= 9
    deep = {p.name: nesting(ast.parse(p.read_text(encoding="utf-8"))) for p in pages}
    assert {name: n for name, n in deep.items() if n > 4} == {}

"""The direction of imports: what stands lower knows nothing of what stands higher, and a method
never imports a method.
"""

import ast
import subprocess
import sys
from pathlib import Path

import fiducial

ROOT = Path(fiducial.__file__).parent
LEVELS = [
    {"errors", "metrics", "kl_choice", "settings", "verbs", "__version__"},
    {"core"},
    {"losses"},
    {"data", "models"},
    {"train"},
    {"report"},
    {"run"},
    {"rollout", "rewards"},
    {"methods", "use"},
    {"demo", "lab"},
    {"parse", "cli", "__main__", "__init__"},
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted name below fiducial, line) of every import of the package in a file, but for those
    that only type checkers see.
    """
    package = ["fiducial", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    out = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else [])])]
            if node.module is None or names[0] == "fiducial":
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        out += [
            (n.removeprefix("fiducial."), node.lineno) for n in names if n.startswith("fiducial.")
        ]
    return out


def violations(files: list[Path]) -> list[str]:
    bad = []
    for path in files:
        here = part_of(path)
        for name, line in imports(path):
            there = name.split(".")[0]
            upward = LEVEL[there] > LEVEL[here]
            sideways = here == there == "methods" and path.name != "__init__.py"
            if upward or sideways:
                bad.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return bad


def test_imports_point_downward_and_no_method_imports_a_method():
    files = sorted(ROOT.rglob("*.py"))
    assert {part_of(f) for f in files} <= set(LEVEL)
    found = violations([f for f in files if f.name != "__init__.py" or f.parent != ROOT])
    # a finished run writes its own page, and only there does train reach sideways
    assert found == []


def test_the_check_sees_an_upward_import(tmp_path, monkeypatch):
    fake = ROOT / "core" / "kl.py"
    text = fake.read_text(encoding="utf-8")
    monkeypatch.setattr(
        Path, "read_text", lambda self, **_: text + "\nfrom ..methods.ppo import PPO\n"
    )
    assert violations([fake]) != []


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
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_help_of_the_command_loads_nothing_heavy():
    code = "import sys, fiducial.cli; fiducial.cli.main(['--help']); print([m for m in ['torch', 'transformers', 'pydantic'] if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip().endswith("[]") and "fiducial ppo" in out


def test_every_public_name_is_there():
    for name in fiducial.__all__:
        assert getattr(fiducial, name) is not None

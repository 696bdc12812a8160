"""The wings of the lab have an order, and no files import each other in a circle."""

import ast
from pathlib import Path

import fiducial.lab

ROOT = Path(fiducial.lab.__file__).parent
WINGS = ("worlds", "kit", "study", "runs", "page", "command")


def imports(path: Path, text: str | None = None) -> set[str]:
    """The files and folders of the lab that a file imports, lazily or not, as dotted names."""
    package = path.relative_to(ROOT).parts[:-1]
    out = set()
    for node in ast.walk(ast.parse(text or path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(package) + 1:
            continue
        base = package[: len(package) - node.level + 1]
        base = (*base, *node.module.split(".")) if node.module else base
        for alias in node.names:
            inner = ROOT.joinpath(*base, alias.name)
            is_file = inner.with_suffix(".py").exists() or inner.is_dir()
            out.add(".".join((*base, alias.name) if is_file else base))
    return out - {""}


def upward(path: Path, text: str | None = None) -> set[str]:
    """What a file imports of later wings. A file beside the wings is not one of them."""
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if here not in WINGS:
        return set()
    later = WINGS[WINGS.index(here) + 1 :]
    return {name for name in imports(path, text) if name.split(".")[0] in later}


def test_no_wing_imports_a_later_one():
    assert {str(f): bad for f in ROOT.rglob("*.py") if (bad := upward(f))} == {}


def test_a_lazy_import_of_a_later_wing_is_seen():
    text = "def f():\n    from ..runs import measured\n"
    assert upward(ROOT / "kit" / "trainer.py", text) == {"runs.measured"}


def in_circles(edges: dict[str, set[str]]) -> list[str]:
    """The files that remain after repeatedly removing those that import none of the others."""
    left = dict(edges)
    while free := [name for name, to in left.items() if not to & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_files_import_each_other_in_a_circle():
    edges = {}
    for f in ROOT.rglob("*.py"):
        name = ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":  # the lab's own loads everything, but only on request
            edges[name] = imports(f)
    assert {"kit.catalogue", "kit.case"} <= edges["kit.diagnosis"]
    assert in_circles(edges) == []


def test_a_circle_is_seen():
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]

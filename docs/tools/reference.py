"""The pages of the reference, read from the source without importing what needs torch.

A page is written for every row of `verbs.METHODS` and of the other verbs, for every public name,
and for every room. A new method or name gets its page by itself. The tests import this module, and
so does the build (`hooks.py`).
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fiducial
from fiducial import metrics, verbs
from fiducial.metric import GROUPS, Range

SOURCE = Path(fiducial.__file__).parent
MODULES = ("losses", "advantages", "kl", "lab")
"""The public names that are modules; each has one page with all its own public names."""


@dataclass(frozen=True)
class Page:
    """A page of the reference.

    path: below docs/. section: its place in the navigation. names: the public names it documents.
    text: its Markdown, with mkdocstrings' `::: name` where a docstring comes in.
    """

    path: str
    title: str
    section: str
    names: tuple[str, ...]
    text: str


def pages(methods: Sequence[verbs.Method] = verbs.METHODS) -> list[Page]:
    """Every page of the reference."""
    others = (verbs.DEMO, verbs.CHECK, *verbs.OTHERS)
    found = [_verb_page(m, "Methods") for m in methods]
    found += [_verb_page(v, "Other commands") for v in others]
    found += [_module_page(name) for name in MODULES]
    covered = {name for page in found for name in page.names}
    rest = [
        n for n in public_names() if n not in covered and n.count(".") == 1 and path_of_or_none(n)
    ]
    found += [_name_page(name) for name in rest]
    return [_index(found), *found, *_room_pages(), _metrics_page()]


@cache
def public_names() -> list[str]:
    """The names of `fiducial.__all__`, and those of the public modules, as dotted paths."""
    top = [f"fiducial.{n}" for n in fiducial.__all__ if n != "__version__"]
    inner = [f"fiducial.{m}.{n}" for m in MODULES for n in _exported(_module_file(m))]
    return [*top, *inner]


def documented(name: str) -> bool:
    """Whether the definition behind a public name has a docstring."""
    if name.count(".") == 1 and name.partition(".")[2] in MODULES:
        return bool(ast.get_docstring(_tree(_module_file(name.partition(".")[2]))))
    file, own = definition(name)
    if own is None:
        return bool(ast.get_docstring(_tree(file)))
    body = _tree(file).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own:
            return bool(ast.get_docstring(node))
        if own in _assigned(node):
            return (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
    return False


@cache
def definition(name: str) -> tuple[Path, str | None]:
    """The file that defines a public name, and the name there (None: the module itself)."""
    parts = name.split(".")[1:]
    if len(parts) == 2:
        return _follow(_module_file(parts[0]), parts[1])
    return _entry(parts[0])


def path_of(name: str) -> str:
    """The dotted path of the definition behind a public name, for mkdocstrings."""
    file, own = definition(name)
    return ".".join([_dotted(file), *([own] if own else [])])


def _verb_page(verb: verbs.Verb, section: str) -> Page:
    settings, run = (_absolute(where) for where in (verb.settings, verb.run))
    behind = {settings, run}
    names = tuple(n for n in public_names() if n.count(".") == 1 and path_of_or_none(n) in behind)
    title = getattr(verb, "title", verb.name)
    module, _, function = run.rpartition(".")
    text = (
        f"# {title}\n\n{verb.summary}\n\n`fiducial {verb.name} --help`\n\n"
        f"## Page of code\n\n{_include(module, 3, members=[function])}"
        f"\n## Settings\n\n{_include(settings, 3)}"
    )
    folder = "methods" if isinstance(verb, verbs.Method) else "commands"
    return Page(f"reference/{folder}/{verb.name}.md", title, section, names, text)


def _module_page(name: str) -> Page:
    own = tuple(n for n in public_names() if n.startswith(f"fiducial.{name}."))
    file = _module_file(name)
    parts = [f"# fiducial.{name}\n", _include(_dotted(file), 2, members=[])]
    parts += [_include(path_of(n), 2) for n in own]
    title = f"fiducial.{name}"
    return Page(f"reference/{name}.md", title, "Library", (title, *own), "\n".join(parts))


def _name_page(name: str) -> Page:
    short = name.rpartition(".")[2]
    text = f"# {name}\n\n{_include(path_of(name), 2)}"
    return Page(f"reference/{short}.md", name, "Library", (name,), text)


def _room_pages() -> list[Page]:
    """One page per package, and one for the modules that lie beside the packages."""
    rooms = sorted(p.parent for p in SOURCE.glob("*/__init__.py"))
    found = [_room(room.name, [room / "__init__.py", *_modules(room)]) for room in rooms]
    ground = [f for f in sorted(SOURCE.glob("*.py")) if f.stem not in ("__init__", "__main__")]
    return [*found, _room("ground", ground)]


def _room(name: str, files: list[Path]) -> Page:
    title = "beside the rooms" if name == "ground" else f"{name}/"
    parts = [f"# {title}\n"]
    for file in files:
        package = file.name == "__init__.py"
        if ast.get_docstring(_tree(file)):
            heading = "" if package and file.parent.parent == SOURCE else f"## {_dotted(file)}\n"
            parts.append(heading)
            parts.append(_include(_dotted(file), 3, members=[] if package else None, again=True))
    return Page(f"reference/rooms/{name}.md", title, "Rooms", (), "\n".join(parts))


def _modules(room: Path) -> list[Path]:
    return [f for f in sorted(room.rglob("*.py")) if f != room / "__init__.py"]


def _metrics_page() -> Page:
    parts = [
        "# Metrics\n",
        "Every number that a run may write to `metrics.jsonl`, as `fiducial.metrics` has it. "
        "`eval/NAME` is the same number on held-out rows. Healthy ranges are rules of thumb, "
        "except for `ratio/first`, which must be 1, and for a KL, which is not below 0 on "
        "average. Outside of the bounds of the alarm, a run says so "
        "([alarms](../guide/alarms.md)): where none is given, they are those of the healthy range, "
        "if an alarm is about the metric. `times` its usual value means its start; for gradient "
        "norms their running median, and for the KL its target.\n",
    ]
    for group in GROUPS:
        parts.append(f"## {group.capitalize()}\n")
        parts.append("| metric | unit | healthy | alarm | what it is |\n|---|---|---|---|---|")
        for name, metric in metrics.METRICS.items():
            if metric.group == group:
                bounds = [_range(metric.alarm), _range(metric.change, " times")]
                alarm = "; ".join(filter(None, bounds))
                row = (f"`{name}`", metric.unit, _range(metric.healthy), alarm, metric.sentence)
                parts.append("| " + " | ".join(cell.replace("|", "&#124;") for cell in row) + " |")
        parts.append("")
    return Page("reference/metrics.md", "Metrics", "Metrics", (), "\n".join(parts))


def _range(bounds: Range | None, of: str = "") -> str:
    low, high = bounds or (None, None)
    if low is not None and high is not None:
        return f"{low:g} to {high:g}{of}"
    if low is not None:
        return f"at least {low:g}{of}"
    return "" if high is None else f"at most {high:g}{of}"


def _index(found: list[Page]) -> Page:
    parts = ["# Reference\n", "Generated from the docstrings of the source.\n"]
    for section in dict.fromkeys(page.section for page in found):
        parts.append(f"\n## {section}\n")
        for page in found:
            if page.section == section:
                link = page.path.removeprefix("reference/")
                names = ", ".join(f"`{n}`" for n in page.names)
                parts.append(f"- [{page.title}]({link}){': ' + names if names else ''}")
    parts.append("\n## More\n\n- [Metrics](metrics.md)")
    return Page("reference/index.md", "Overview", "Overview", (), "\n".join(parts) + "\n")


def _include(
    path: str, level: int, members: list[str] | None = None, *, again: bool = False
) -> str:
    """mkdocstrings' directive. `members`: those shown below the object; None: all of them, and its
    own heading. `again`: the object has another page, which is the one to link to.
    """
    lines = [f"::: {path}", "    options:", f"      heading_level: {level}"]
    if members is not None:
        lines += [f"      members: {members or 'false'}", "      show_root_heading: false"]
    if again:
        lines += ["      skip_local_inventory: true", "      show_root_heading: false"]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def path_of_or_none(name: str) -> str | None:
    """`path_of`, or None for a name whose file is not there."""
    try:
        return path_of(name)
    except FileNotFoundError:
        return None


def _absolute(where: str) -> str:
    """`.use.settings:Collect` as the dotted path of the definition behind it."""
    module, _, name = where.partition(":")
    if not module.startswith("."):
        return f"{module}.{name}"
    try:
        file, own = _follow(_file(SOURCE, module[1:].split(".")), name)
    except FileNotFoundError:
        return f"fiducial{module}.{name}"
    return f"{_dotted(file)}.{own}"


def _entry(name: str) -> tuple[Path, str | None]:
    """The file of a name of `fiducial`, and the name there (None: the name is a module)."""
    module, attribute = fiducial._WHERE[name]
    parts = [part for part in module.split(".") if part]
    try:
        return _file(SOURCE, [*parts, attribute]), None
    except FileNotFoundError:
        return _follow(_file(SOURCE, parts), attribute)


def _module_file(name: str) -> Path:
    return _entry(name)[0]


def _file(folder: Path, parts: Sequence[str]) -> Path:
    place = folder.joinpath(*[p for p in parts if p])
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    raise FileNotFoundError(place)


def _dotted(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _follow(file: Path, name: str) -> tuple[Path, str]:
    """The file that defines `name`, past every `from .x import name`."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    folder = file.parent
                    for _ in range(node.level - 1):
                        folder = folder.parent
                    return _follow(_file(folder, (node.module or "").split(".")), alias.name)
    return file, name


def _exported(file: Path) -> list[str]:
    """`__all__` where it is a list; else what a lazy table names; else what the file defines."""
    tree = _tree(file)
    own = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    for wanted in ("_WHERE", "__all__"):
        for node in tree.body:
            if wanted in _assigned(node) and isinstance(node, ast.Assign):
                listed = node.value
                items = listed.keys if isinstance(listed, ast.Dict) else ast.walk(listed)
                return [
                    str(item.value)
                    for item in items
                    if isinstance(item, ast.Constant) and isinstance(item.value, str)
                ]
    return [name for name in own if not name.startswith("_")]


def _assigned(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []

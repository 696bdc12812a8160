"""The documentation names what there is: public names, the rows of the table of methods, the exact
checks, and links.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from fiducial import metrics, verbs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "tools" / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


reference = _tool()
PAGES = reference.pages()


@pytest.mark.parametrize("name", reference.public_names())
def test_every_public_name_has_a_docstring_and_a_page(name):
    assert reference.documented(name), f"{name} has no docstring"
    assert any(name in page.names for page in PAGES), f"{name} has no page"


def test_a_name_without_a_docstring_is_seen(tmp_path, monkeypatch):
    bare = tmp_path / "bare.py"
    bare.write_text("def bare():\n    pass\n\nCONSTANT = 1\n\nTOLD = 2\n'''What it is.'''\n")
    for own, told in (("bare", False), ("CONSTANT", False), ("TOLD", True)):
        monkeypatch.setattr(reference, "definition", lambda name, own=own: (bare, own))
        assert reference.documented("fiducial.x.y") is told


def test_a_new_row_of_the_table_of_methods_has_its_page_by_itself():
    new = replace(
        verbs.METHODS[0],
        name="dummy",
        title="Dummy method",
        settings="elsewhere.settings:Dummy",
        run="elsewhere.page:dummy",
    )
    pages = reference.pages([*verbs.METHODS, new])
    page = next(p for p in pages if "dummy" in p.path)
    assert page.title == "Dummy method" and page.section == "Methods"
    assert "::: elsewhere.settings.Dummy" in page.text and "::: elsewhere.page" in page.text
    index = next(p.text for p in pages if p.path == "reference/index.md")
    assert f"({page.path.removeprefix('reference/')})" in index


def test_every_method_has_a_page_in_the_guide_and_every_verb_one_in_the_reference():
    guide = {p.stem for p in (DOCS / "methods").glob("*.md")} - {"index"}
    assert guide == {m.name for m in verbs.METHODS}
    paths = {p.path for p in PAGES}
    for verb in verbs.verbs().values():
        folder = "methods" if isinstance(verb, verbs.Method) else "commands"
        assert f"reference/{folder}/{verb.name}.md" in paths


def test_no_two_pages_have_one_path_and_the_metrics_are_all_there():
    paths = [p.path for p in PAGES]
    assert len(paths) == len({p.lower() for p in paths})
    table = next(p.text for p in PAGES if p.path == "reference/metrics.md")
    assert all(f"| `{name}` |" in table for name in metrics.METRICS)


def _checks() -> dict[int, str]:
    """The last cell of each row of the list, by its number."""
    rows = [
        line.strip(" |").split(" | ")
        for line in (DOCS / "checks.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    return {int(row[0]): row[-1] for row in rows}


def _tests() -> dict[str, set[str]]:
    """The names of the tests in each file, by its path below tests/."""
    here = Path(__file__).parent
    return {
        file.relative_to(here).as_posix(): {
            node.name
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        for file in sorted(here.rglob("test_*.py"))
    }


def test_the_exact_checks_that_tests_cite_are_those_of_the_list():
    cited: dict[int, set[str]] = {}
    for file, names in _tests().items():
        for name in names:
            if found := re.match(r"test_(\d+)_", name):
                cited.setdefault(int(found[1]), set()).add(file)
    listed = {
        number: set(re.findall(r"`([\w/]+\.py)`", tests)) for number, tests in _checks().items()
    }
    assert list(listed) == list(range(1, len(listed) + 1))
    assert {n: files for n, files in listed.items() if files} == cited


def test_the_tests_that_the_list_names_are_there():
    tests = _tests()
    for number, cell in _checks().items():
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
        assert named or re.search(r"`[\w/]+\.py`", cell) or "not implemented" in cell, number
        for file, name in named:
            assert name in tests.get(file, ()), f"check {number}: {file} has no {name}"


def test_links_between_pages_lead_somewhere():
    generated = {p.path for p in PAGES}
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" in target:
                continue
            place = (file.parent / target).resolve()
            below = place.relative_to(DOCS).as_posix() if place.is_relative_to(DOCS) else ""
            assert place.exists() or below in generated, f"{file.name}: {target}"


def test_commands_in_the_guide_exist():
    known = set(verbs.verbs())
    for file in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        for verb in re.findall(
            r"^fiducial +([a-z][a-z-]*)", file.read_text(encoding="utf-8"), re.M
        ):
            assert verb in known, f"{file.name}: fiducial {verb}"


def test_flags_in_the_guide_exist():
    surface = (Path(__file__).parent / "cli_surface.txt").read_text(encoding="utf-8")
    common = {"--help", "--config", "--debug"}
    for file in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        text = re.sub(
            r"`python benchmarks/[^`]*`|^torchrun .*$", "", file.read_text("utf-8"), flags=re.M
        )
        for flag in set(re.findall(r"--[a-z][a-z.-]*[a-z]", text)) - common:
            assert re.search(rf"(^|\s){re.escape(flag)}(\s|$)", surface, re.M), (
                f"{file.name}: {flag}"
            )

"""Every promise of docs/guide/reliability.md is held by a test that is there."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guide" / "reliability.md"
ROWS = [
    line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [^-]", line)
]
FIGURES = re.compile(r"where they were killed|\d+ of \d+ \|")
PROMISES = [row for row in ROWS if "test |" not in row and not FIGURES.search(row)]


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_promise_is_held_by_a_test_that_is_there(row):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
    assert named
    for file, name in named:
        assert name in functions_of(file), f"{file} has no {name}"


def test_the_tables_are_read():
    assert len(PROMISES) > 30

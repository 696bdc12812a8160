"""Healthy rows of every format, for tests that break one thing in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
WORDS = ("cat", "mat", "sun", "tree", "rain", "hill", "moon", "road", "bird", "fish")


def asked(i: int) -> str:
    return f"who is on the {WORDS[i % 10]} by the {WORDS[i // 10]}?"


def sft(n: int = 30) -> Rows:
    return [{"prompt": asked(i), "completion": f" the {WORDS[-1 - i % 10]} sat"} for i in range(n)]


def chat(n: int = 30, system: str = "") -> Rows:
    before = [{"role": "system", "content": system}] if system else []
    return [
        {
            "messages": [
                *before,
                {"role": "user", "content": asked(i)},
                {"role": "assistant", "content": f"the {WORDS[-1 - i % 10]}"},
            ]
        }
        for i in range(n)
    ]


def pairs(n: int = 40) -> Rows:
    tails = (" in the sun", " on the mat")
    return [
        {
            "prompt": asked(i),
            "chosen": f" a {WORDS[i % 7]}{tails[0] * (i % 3)}",
            "rejected": f" no {WORDS[i % 9]}{tails[1] * ((i + 1) % 3)}",
        }
        for i in range(n)
    ]


def solutions(n: int = 20) -> Rows:
    return [
        {
            "prompt": asked(i),
            "completions": ["one two", f"so {WORDS[i % 10]}"],
            "labels": [1, i % 2],
        }
        for i in range(n)
    ]


def questions(n: int = 30) -> Rows:
    return [{"prompt": asked(i), "answer": WORDS[-1 - i % 10]} for i in range(n)]


def changed(rows: Rows, **change: Callable[[dict[str, Any], int], Any]) -> Rows:
    return [row | {k: f(row, i) for k, f in change.items()} for i, row in enumerate(rows)]


def said(rows: Rows, edit: Callable[[str], str], role: str = "user") -> Rows:
    """Conversations whose messages of a role are edited."""
    return [
        {
            "messages": [
                m | {"content": edit(m["content"])} if m["role"] == role else m
                for m in row["messages"]
            ]
        }
        for row in rows
    ]


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

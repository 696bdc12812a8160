"""From the docstrings' notation to Markdown: formulas to MathML, which a browser sets offline."""

from __future__ import annotations

import re
import textwrap

from latex2mathml.converter import convert

ROLE = re.compile(r":(func|class|mod|meth|attr|data):`~?([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
RULE = re.compile(r"^ *={2,}( +={2,})* *$")
SEVERAL = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")


def formula(tex: str, *, block: bool = False) -> str:
    """One `<math>` element. Characters that Markdown would read are written as entities."""
    tex = " ".join(tex.split()).replace("\\!", "")
    math = str(convert(tex, display="block" if block else "inline"))
    for sign in "|*_`":
        math = math.replace(sign, f"&#{ord(sign)};")
    return f'<div class="formula">{math}</div>' if block else math


def dollars(markdown: str) -> str:
    """`$$..$$` and `$..$` in a page of the guide, outside code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.S)
    for i in range(0, len(parts), 2):
        block = re.sub(r"\$\$(.+?)\$\$", lambda m: formula(m[1], block=True), parts[i], flags=re.S)
        parts[i] = re.sub(r"\$([^$\n]+)\$", lambda m: formula(m[1]), block)
    return "".join(parts)


def docstring(text: str) -> str:
    """A docstring's reStructuredText, as far as this project uses it, as Markdown."""
    text = _blocks(text)
    text = INLINE.sub(lambda m: formula(m[1]), text)
    text = _literal(_names(_tables(ROLE.sub(r"`\2`", text))))
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [part.replace("][", "]\\[") for part in parts[::2]]  # no link is meant
    return "".join(parts)


def _blocks(text: str) -> str:
    """`.. math::` with its continuation lines."""
    lines = text.split("\n")
    out: list[str] = []
    i = 0
    while i < len(lines):
        match = re.match(r"^( *)\.\. math::(.*)$", lines[i])
        i += 1
        if not match:
            out.append(lines[i - 1])
            continue
        depth, tex = len(match[1]), [match[2]]
        while i < len(lines) and lines[i].strip() and _depth(lines[i]) > depth:
            tex.append(lines[i])
            i += 1
        out += ["", match[1] + formula(" ".join(tex), block=True), ""]
    return "\n".join(out)


def _tables(text: str) -> str:
    """Simple tables: a rule of equals signs above, below the heads, and at the end."""
    lines = text.split("\n")
    out: list[str] = []
    i = 0
    while i < len(lines):
        rules = [j for j in range(i, len(lines)) if RULE.match(lines[j])]
        if not RULE.match(lines[i]) or len(rules) < 3:
            out.append(lines[i])
            i += 1
            continue
        starts = [m.start() for m in re.finditer("=+", lines[i])]
        rows: list[list[str]] = []
        for line in [*lines[rules[0] + 1 : rules[1]], *lines[rules[1] + 1 : rules[2]]]:
            cells = _cells(line, starts)
            if rows and not cells[0]:
                rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
            else:
                rows.append(cells)
        rows.insert(1, ["---"] * len(starts))
        margin = " " * starts[0]
        out += ["", *(f"{margin}| {' | '.join(row)} |" for row in rows), ""]
        i = rules[2] + 1
    return "\n".join(out)


def _cells(line: str, starts: list[int]) -> list[str]:
    """Cells begin two spaces apart: formulas were already replaced, so columns may have moved."""
    found = re.split(r" {2,}", line.strip())
    if _depth(line) > starts[0]:
        place = next(i for i in reversed(range(len(starts))) if starts[i] <= _depth(line))
        found = [""] * place + found
    return (found + [""] * len(starts))[: len(starts)]


def _names(text: str) -> str:
    """`a, b: text` under Args becomes an entry for each of the names."""
    out: list[str] = []
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        match = SEVERAL.match(lines[i])
        block = [lines[i]]
        i += 1
        if not match:
            out += block
            continue
        while i < len(lines) and lines[i].strip() and _depth(lines[i]) > len(match[1]):
            block.append(lines[i])
            i += 1
        for name in match[2].split(", "):
            out += [f"{match[1]}{name}: {match[3]}", *block[1:]]
    return "\n".join(out)


def _literal(text: str) -> str:
    """`words::` before an indented block."""
    return re.sub(r"::$", ":", textwrap.dedent(text), flags=re.M)


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())

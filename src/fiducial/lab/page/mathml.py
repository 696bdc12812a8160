r"""Formulas without a library: a part of TeX's notation is turned into MathML, which browsers
display offline.

`mathml(r"\pi^*(y|x) = \frac{1}{Z(x)} \pi_\ref(y|x) e^{r/\beta}")`. Known: letters, numbers, `^ _ {
}`, `\frac{a}{b}`, `\sqrt{a}`, `\text{words}`, `\left( \right)` around what is tall, and the names
below. Anything else is an error, so that typing mistakes do not reach a page.
"""
# ruff: noqa: RUF001  (Greek letters are meant)

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

LETTERS = {
    "alpha": "α",
    "beta": "β",
    "pi": "π",
    "rho": "ρ",
    "sigma": "σ",
    "E": "𝔼",
    "ref": "ref",
    "d": "d",
}
SIGNS = {
    "nabla": "∇",
    "sim": "∼",
    "parallel": "‖",
    "cdot": "·",
    "succ": "≻",
    "ne": "≠",
    "le": "≤",
    "approx": "≈",
    "mid": "|",
    "partial": "∂",
}
FUNCTIONS = {
    "log": 0.167,
    "exp": 0,
    "KL": 0,
    "Var": 0,
}
"""Space after them in em: log is separated from an argument without brackets."""
LARGE = {
    "sum": "∑",
    "prod": "∏",
    "max": "max",
    "min": "min",
}
"""Their indices are set below and above, not beside."""
TOKEN = re.compile(r"\s*(\\text\{[^}]*\}|\\[A-Za-z]+|\d+(?:\.\d+)?|[A-Za-z]|\S)")


def formula(tex: str) -> Markup:
    """A displayed formula. On a narrow screen it may be broken at `\\quad`, between two formulas,
    and at `\\break`, within one.
    """
    whole = [
        Markup(" ").join(mathml(part.strip(), block=True) for part in one.split("\\break"))
        for one in tex.split("\\quad")
    ]
    return Markup(" ").join(Markup("<span>{}</span>").format(one) for one in whole)


def mathml(tex: str, *, block: bool = False) -> Markup:
    """One `<math>` element, with its source as the alternative text."""
    tokens = TOKEN.findall(tex)
    stream = iter(tokens)
    body = _row(stream, None)
    return Markup('<math display="{}" alttext="{}"><mrow>{}</mrow></math>').format(
        "block" if block else "inline", tex, Markup("".join(body))
    )


def _row(stream: Iterator[str], end: str | None) -> list[str]:
    """The elements up to `end`, each with its indices."""
    out: list[str] = []
    large: list[bool] = []
    for token in stream:
        if token == end:
            return _bound(out, large)
        if token in "^_":
            out.append(token)
            large.append(False)
            continue
        one = _atom(token, stream)
        first = not out or (
            out[-1].startswith("<mo") and not out[-1].endswith((">)</mo>", ">]</mo>"))
        )
        if first and token in "-+<":
            one = one.replace(
                "<mo", '<mo form="prefix" lspace="0" rspace="0"', 1
            )  # a sign, not a difference
        elif first and token[1:] in FUNCTIONS:
            one = one.replace(
                'lspace="0.167em"', 'lspace="0"', 1
            )  # space after a factor, none after a bracket
        out.append(one)
        large.append(token[1:] in LARGE and token.startswith("\\"))
    if end is not None:
        raise ValueError(f"a formula lacks its {end}")
    return _bound(out, large)


def _atom(token: str, stream: Iterator[str]) -> str:
    if token == "{":
        return f"<mrow>{''.join(_row(stream, '}'))}</mrow>"
    if token.startswith("\\text{"):
        words = token[6:-1].replace(" ", "\u00a0")  # MathML drops the spaces at the ends
        return f"<mtext>{escape(words)}</mtext>"
    if token[0] == "\\":
        return _command(token[1:], stream)
    if token[0].isdigit():
        return f"<mn>{token}</mn>"
    if token.isalpha():
        return f"<mi>{token}</mi>"
    sign = {"-": "\u2212", "*": "∗", "'": "′"}.get(token, str(escape(token)))
    fixed = ' stretchy="false"' if token in "()[]|" else ""
    return f"<mo{fixed}>{sign}</mo>"


def _command(name: str, stream: Iterator[str]) -> str:
    if name == "frac":
        return f"<mfrac>{_group(stream)}{_group(stream)}</mfrac>"
    if name == "sqrt":
        return f"<msqrt>{_group(stream)}</msqrt>"
    if name == "left":
        opening = next(stream)
        inner = "".join(_row(stream, "\\right"))
        return f"<mrow><mo>{escape(opening)}</mo>{inner}<mo>{escape(next(stream))}</mo></mrow>"
    if name in LETTERS:
        upright = (
            ' mathvariant="normal"' if name in ("E", "d") else ""
        )  # names of several letters are upright without it
        return f"<mi{upright}>{LETTERS[name]}</mi>"
    if name in FUNCTIONS:
        return f'<mo form="prefix" lspace="0.167em" rspace="{FUNCTIONS[name]}em">{name}</mo>'
    if name in SIGNS:
        return f'<mo stretchy="false">{SIGNS[name]}</mo>'
    if name in LARGE:
        return f"<mo>{LARGE[name]}</mo>"
    raise ValueError(f"no formula knows \\{name}")


def _group(stream: Iterator[str]) -> str:
    if next(stream) != "{":
        raise ValueError("a formula's command lacks its braces")
    return f"<mrow>{''.join(_row(stream, '}'))}</mrow>"


def _bound(parts: list[str], large: list[bool]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(parts):
        indices = {}
        start = i
        while i + 2 < len(parts) and parts[i + 1] in ("^", "_"):
            indices[parts[i + 1]] = parts[i + 2]
            i += 2
        tag = (
            {"_": "munder", "^": "mover", "_^": "munderover"}
            if large[start]
            else {"_": "msub", "^": "msup", "_^": "msubsup"}
        )
        inner = "".join(indices[key] for key in "_^" if key in indices)
        name = tag.get("".join(key for key in "_^" if key in indices))
        out.append(f"<{name}>{parts[start]}{inner}</{name}>" if name else parts[start])
        i += 1
    return out

"""Turns templates and data into a page that needs only the file beside it and runs only its own
script.

The output of a model is treated as hostile text. In the page it passes through autoescaping; in the
data block it is ASCII JSON without `<`, `>` and `&`; the page's script inserts it with textContent;
and a Content-Security-Policy with the hash of that one script refuses everything else.
"""

import base64
import functools
import json
import math
import os
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup

PLOTLY = "plotly.min.js"


@functools.cache
def environment(templates: Path | None = None) -> Environment:
    """The templates of this package and, before them, those of another folder; every value is
    escaped. It is kept, with the templates that it has compiled.
    """
    own = PackageLoader("fiducial.report", "templates")
    loader = own if templates is None else ChoiceLoader([FileSystemLoader(templates), own])
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def script_json(data: Any) -> Markup:
    """JSON that is safe inside a script tag: ASCII only (no U+2028, no lone surrogate), no markup
    characters, and null for numbers that are not finite.
    """
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def asset(name: str) -> str:
    """A file of the templates folder, as it is."""
    return (files("fiducial.report") / "templates" / name).read_text(encoding="utf-8")


def plotly_script() -> bytes:
    """Plotly's script, as its package has it."""
    from plotly.offline import get_plotlyjs  # four megabytes of text: read only when needed

    return bytes(get_plotlyjs().encode("utf-8"))


@functools.cache
def plotly_digest() -> str:
    """SHA-256 of plotly's script."""
    return sha256(plotly_script()).hexdigest()


def write_page(
    folder: Path,
    name: str,
    template: str,
    data: dict[str, Any],
    *,
    templates: Path | None = None,
    **context: Any,
) -> Path:
    """Renders `template` to `folder/name`, with plotly's script once beside it; a script there that
    is not plotly's own is replaced, and the page names the script's SHA-256. A file is written
    under another name first and then renamed, so that none is ever half-written.

    Browsers check `integrity` for no script of a file:// page (Chromium blocks every script that
    has it), so whoever can change the folder later can change the script, as they can the page.
    """
    script, style = asset("page.js"), asset("page.css")
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self' file: 'sha256-{digest}'; style-src "
        "'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    html = (
        environment(templates)
        .get_template(template)
        .render(
            **context,
            policy=policy,
            script=Markup(script),  # a file of this package, as the style is: no model's words
            style=Markup(style),
            data=script_json(data),
            plotly=PLOTLY,
            plotly_digest=plotly_digest(),
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    plotly = folder / PLOTLY
    if not plotly.is_file() or sha256(plotly.read_bytes()).hexdigest() != plotly_digest():
        _replace(plotly, plotly_script())
    _replace(folder / name, html.encode("utf-8", errors="replace"))
    return folder / name


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)  # whatever a link there leads to is not written to
    aside.write_bytes(content)
    aside.replace(path)

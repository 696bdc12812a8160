"""A griffe extension: docstrings become Markdown before they are parsed."""

from __future__ import annotations

from typing import Any

import griffe
from markup import docstring


class Docstrings(griffe.Extension):
    """Replaces the text of every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = docstring(obj.docstring.value)

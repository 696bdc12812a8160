"""Which tokenizer a saved model belongs to. Weights cannot tell two tokenizers with equally many
tokens apart, so a folder that we save names the one it was saved with.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import InputError

NAME = "fiducial.json"
"""A file of ours in the folder of a saved model. Others have no use for it."""


def write_mark(tokenizer: Any, folder: Path) -> None:
    """Note the tokenizer's vocabulary in a model's folder."""
    value = {"tokenizer_sha256": vocabulary_digest(tokenizer)}
    (folder / NAME).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def check_mark(tokenizer: Any, folder: Path, flag: str) -> None:
    """Checks that a folder still holds the tokenizer that its model was saved with.

    Raises:
        InputError: it holds another one.
    """
    path = folder / NAME
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["tokenizer_sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(f"{flag}: {path} is damaged: remove it") from error
    if known != vocabulary_digest(tokenizer):
        raise InputError(
            f"{flag}: the tokenizer in {folder} is not the one that the model was saved with: copy "
            f"that one back, or remove {path} if you changed the tokenizer and the model together"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 of all tokens with their ids."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

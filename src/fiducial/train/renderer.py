"""The renderer of a model: its tokenizer, limited to its context, and what ends its responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from ..data.render import Renderer, set_chat_template
from ..errors import InputError
from ..models.load import load_config, load_tokenizer
from ..models.remote_code import not_run
from ..models.trunk import context
from ..settings import RowSettings
from .launch import asked
from .progress import say


def load_renderer(
    name: str, rows: RowSettings, *, flag: str = "--model", trust: bool = False
) -> Renderer:
    """The renderer for the model in a folder or on the Hub.

    Raises:
        InputError: there is no tokenizer, it has no such EOS token, `max_length` exceeds the
            model's context, or the model's configs end a response at an id that does not exist.
    """
    tokenizer = load_tokenizer(name, flag=flag, trust=trust)
    set_chat_template(tokenizer, rows.chat_template)
    if rows.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(rows.eos_token) in (None, tokenizer.unk_token_id):
            raise InputError(
                f"--rows.eos-token: the tokenizer of {name} has no token {rows.eos_token!r}; "
                "name one of its tokens"
            )
        tokenizer.eos_token = rows.eos_token
    config = load_config(name, flag=flag, trust=trust)
    limit = context(config)
    if rows.max_length is not None and rows.max_length > limit:
        raise InputError(
            f"--rows.max-length: {rows.max_length} exceeds the context of {name}, {limit} tokens; "
            f"give at most {limit}"
        )
    sizes = [len(tokenizer), getattr(config.get_text_config(), "vocab_size", None) or 0]
    ends = end_ids(name, max(sizes), flag=flag)
    notes = ("" if trust else not_run(name), plain_ends(tokenizer, ends, name))
    if asked().index == 0:
        for note in filter(None, notes):
            say(note)
    return Renderer(tokenizer, rows.max_length or limit, rows.on_long, rows.train_on, ends)


def plain_ends(tokenizer: Any, ends: frozenset[int], name: str) -> str:
    """A sentence for configs that end a response at a token which the tokenizer counts as text, as
    those of another model may; else "".
    """
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    if not (plain := sorted(i for i in ends - special if i < len(tokenizer))):
        return ""
    return (
        f"{name} ends a response at token {plain[0]}, which its tokenizer has as plain text, "
        f"{tokenizer.convert_ids_to_tokens(plain[0])!r}: check that the tokenizer belongs to the "
        "model, or correct eos_token_id in its configs"
    )


def same_ends(model: Any, renderer: Renderer) -> None:
    """Let a model's generation config name everything that ends a response, the end of a turn in
    the chat template included, so that what is saved stops where it was sampled.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    known = config.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if new := sorted(renderer.ends - set(ids)):
        config.eos_token_id = [*ids, *new] if len(ids) + len(new) > 1 else new[0]


def end_ids(name: str, vocabulary: int, *, flag: str = "--model") -> frozenset[int]:
    """The ids at which the model's own configs end a response.

    They are what `eos_token_id` says, one id or a list, in generation_config.json and in
    config.json, there also in the part for the text of a model that reads more than text.

    Args:
        vocabulary: number of ids that the model has.

    Raises:
        InputError: an id is none of the vocabulary.
    """
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftConfig

        name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    found: set[int] = set()
    for file, values in _configs(name):
        for value in _named(values):
            for i in value if isinstance(value, list) else [value]:
                if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocabulary:
                    raise InputError(
                        f"{flag}: {file} of {name} ends a response at eos_token_id {i!r}, which is "
                        f"no id of its vocabulary of {vocabulary:,} tokens: correct it there"
                    )
                found.add(i)
    return frozenset(found)


def _configs(name: str) -> Iterator[tuple[str, Any]]:
    """The two configs as they are written: what a class adds by default says nothing here."""
    yield "config.json", PretrainedConfig.get_config_dict(name)[0]
    path = cached_file(
        name,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is not None:
        try:
            yield "generation_config.json", json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}; write it again") from error


def _named(values: Any) -> Iterator[Any]:
    """Every `eos_token_id` in a config and in those inside it, except for images or sound."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if key == "eos_token_id" and value is not None:
            yield value
        elif isinstance(value, dict) and not any(w in key for w in ("vision", "audio", "image")):
            yield from _named(value)

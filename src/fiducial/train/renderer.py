"""The renderer of a model: its tokenizer, limited to its context."""

from __future__ import annotations

from ..data.render import Renderer, set_chat_template
from ..errors import InputError
from ..models.load import load_config, load_tokenizer
from ..models.trunk import context
from ..settings import RowSettings


def load_renderer(name: str, rows: RowSettings, *, flag: str = "--model") -> Renderer:
    """The renderer for the model in a folder or on the Hub.

    Raises:
        InputError: there is no tokenizer, it has no such EOS token, or `max_length` exceeds the
            model's context.
    """
    tokenizer = load_tokenizer(name, flag=flag)
    set_chat_template(tokenizer, rows.chat_template)
    if rows.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(rows.eos_token) in (None, tokenizer.unk_token_id):
            raise InputError(
                f"--rows.eos-token: the tokenizer of {name} has no token {rows.eos_token!r}; "
                "name one of its tokens"
            )
        tokenizer.eos_token = rows.eos_token
    limit = context(load_config(name, flag=flag))
    if rows.max_length is not None and rows.max_length > limit:
        raise InputError(
            f"--rows.max-length: {rows.max_length} exceeds the context of {name}, {limit} tokens; "
            f"give at most {limit}"
        )
    return Renderer(tokenizer, rows.max_length or limit, rows.on_long, rows.train_on)

"""Token ids and masks, compared with ids written by hand: conftest names every token of the small
vocabularies.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiducial.data.prepare import load, split
from fiducial.data.render import Renderer, set_chat_template
from fiducial.data.row_types import ChatRow, CompletionRow, Message, TextRow
from fiducial.errors import InputError
from fiducial.settings import RowSettings
from support import CHAT_TEMPLATE, make_tokenizer

W = "f.jsonl:7"


def renderer(kind, **changes):
    settings = {"max_length": 100} | changes
    return Renderer(make_tokenizer(kind), **settings)


def tokens(render, rendered):
    return render.tokenizer.convert_ids_to_tokens(rendered.ids)


def labels(render, rendered):
    """The tokens that are labels."""
    return [t for t, m in zip(tokens(render, rendered), rendered.mask, strict=True) if m]


def chat(*texts, first="user"):
    other = {"user": "assistant", "assistant": "user"}
    roles = [first if i % 2 == 0 else other[first] for i in range(len(texts))]
    return ChatRow(tuple(Message(r, t) for r, t in zip(roles, texts, strict=True)), W)


# Plain text
# --------------------------------------------------------------------------------------------


def test_a_completion_is_joined_to_its_prompt_as_ids_with_one_bos_and_a_learned_eos():
    r = renderer("llama")
    row = r.completion("a cat", " is", W)
    assert tokens(r, row) == ["<s>", "a", " ", "cat", " ", "i", "s", "</s>"]
    assert row.ids == [1, 3, 29, 40, 29, 11, 21, 2]
    assert row.mask == [False] * 4 + [True] * 4
    assert not row.truncated and row.num_labels == 4 and row.where == W


def test_a_merge_across_the_seam_does_not_happen():
    r = renderer("llama")
    assert r.tokenizer.convert_ids_to_tokens(r.tokenizer("on cat").input_ids[1:]) == [
        "on",
        " ",
        "cat",
    ]
    row = r.completion("on c", "at", W)
    assert tokens(r, row) == ["<s>", "on", " ", "c", "a", "t", "</s>"]
    assert row.ids[: len(r.prompt("on c", W))] == r.prompt(
        "on c", W
    )  # a trained sequence begins with the ids that a response is sampled after
    assert labels(r, row) == ["a", "t", "</s>"]


@given(
    st.text("cathe onr", min_size=1, max_size=12),
    st.text("cathe onr", min_size=1, max_size=12),
    st.sampled_from(["llama", "gpt2", "qwen3"]),
)
def test_the_prompt_is_always_a_prefix_and_the_rest_is_learned(prompt, completion, kind):
    r = RENDERERS[kind]
    before = r.prompt(prompt, W)
    row = r.completion(prompt, completion, W)
    assert row.ids[: len(before)] == before and row.mask == [False] * len(before) + [True] * (
        len(row) - len(before)
    )
    assert row.ids[-1] == r.eos and r.decode(row.ids[len(before) :]) == completion


RENDERERS = {kind: renderer(kind) for kind in ("llama", "gpt2", "qwen3")}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_there_is_never_more_than_one_bos(kind):
    r = renderer(kind)
    bos = r.tokenizer.bos_token or ""
    for prompt in ("cat", bos + "cat"):
        for row in (r.completion(prompt, " is", W), r.text(TextRow(prompt, W))):
            expected = 1 if kind == "llama" or (kind == "gpt2" and prompt != "cat") else 0
            assert [t for t in tokens(r, row)[:-1] if t == bos] == [bos] * expected
            assert tokens(r, row)[: expected + 1] == [bos] * expected + ["cat"]
        assert len(r.prompt(prompt, W)) == expected + 1


def test_eos_is_a_label_although_it_is_the_pad_token_too():
    r = renderer("gpt2")
    assert r.tokenizer.pad_token_id == r.tokenizer.eos_token_id == r.tokenizer.bos_token_id == 0
    row = r.completion("a", "b", W)
    assert row.ids == [1, 2, 0] and row.mask == [False, True, True]
    assert r.text(TextRow("ab", W)).mask == [False, True, True]


def test_of_plain_text_all_but_the_first_token_is_learned():
    r = renderer("llama")
    row = r.text(TextRow("the cat", W))
    assert tokens(r, row) == ["<s>", "the", " ", "cat", "</s>"] and row.mask == [
        False,
        True,
        True,
        True,
        True,
    ]


def test_without_bos_and_prompt_the_first_token_is_no_label():
    r = renderer("gpt2")
    row = r.completion("", "ab", W)
    assert row.ids == [1, 2, 0] and row.mask == [False, True, True]


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer("llama")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"--rows.eos-token"):
        Renderer(tokenizer, 100)


# Length
# --------------------------------------------------------------------------------------------


def test_a_response_beyond_the_limit_is_cut_at_its_end_and_has_no_eos():
    r = renderer("llama", max_length=5)
    row = r.completion("ab", "xyz", W)
    assert (
        tokens(r, row) == ["<s>", "a", "b", "x", "y"]
        and row.mask == [False, False, False, True, True]
        and row.truncated
    )
    assert (
        not renderer("llama", max_length=7).completion("ab", "xyz", W).truncated
    )  # BOS, 2, 3, EOS: fits exactly


@pytest.mark.parametrize(
    ("limit", "on_long", "said"),
    [(3, "truncate", "the prompt alone is 3 tokens"), (5, "error", "the row is 7 tokens")],
)
def test_what_cannot_be_cut_is_refused_with_file_and_line(limit, on_long, said):
    with pytest.raises(
        InputError, match=f"^{W}: {said} and the limit is {limit}: .*--rows.max-length"
    ):
        renderer("llama", max_length=limit, on_long=on_long).completion("ab", "xyz", W)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_cut_never_leaves_a_row_without_a_label(kind, train_on):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = CHAT_TEMPLATE
    long = chat("ab", "xyz", "cd", "uvw")
    for limit in range(2, 130):
        r = Renderer(tokenizer, limit, "truncate", train_on)
        for render in (
            lambda r=r: r.completion("abc", "xyz", W),
            lambda r=r: r.chat(long),
            lambda r=r: r.text(TextRow("abcd", W)),
        ):
            try:
                row = render()
            except InputError as error:
                assert str(error).startswith(W)
            else:
                assert any(row.mask) and len(row) <= limit and len(row.ids) == len(row.mask)


# Chat
# --------------------------------------------------------------------------------------------


def test_every_assistant_turn_is_learned_with_the_token_that_ends_it_and_nothing_else():
    r = renderer("qwen3")
    row = r.chat(chat("ab", "xy", "cd", "uv"))
    text = (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nxy<|im_end|>\n"
        "<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\nuv<|im_end|>"
    )
    assert (
        r.tokenizer.decode(row.ids) == text
    )  # the newline after the last end token is never sampled, so it is left out
    assert labels(r, row) == ["x", "y", "<|im_end|>", "u", "v", "<|im_end|>"]
    assert row.ids[-1] == r.eos and row.mask[-1]


def test_only_the_last_assistant_turn_on_request():
    r = renderer("qwen3", train_on="last")
    whole = renderer("qwen3").chat(chat("ab", "xy", "cd", "uv"))
    row = r.chat(chat("ab", "xy", "cd", "uv"))
    assert row.ids == whole.ids and labels(r, row) == ["u", "v", "<|im_end|>"]


def test_a_conversation_that_ends_with_the_user_still_teaches_the_turns_before():
    r = renderer("qwen3")
    row = r.chat(chat("ab", "xy", "cd"))
    assert labels(r, row) == ["x", "y", "<|im_end|>"]


def test_messages_as_prompt_and_completion_are_the_same_conversation():
    r = renderer("qwen3")
    answer = r.completion((Message("user", "ab"),), (Message("assistant", "xy"),), W)
    assert (answer.ids, answer.mask) == (
        r.chat(chat("ab", "xy")).ids,
        r.chat(chat("ab", "xy")).mask,
    )
    assert r.decode(r.prompt((Message("user", "ab"),), W)).endswith("assistant\n")
    assert answer.ids[: answer.mask.index(True)] == r.prompt((Message("user", "ab"),), W)


def test_a_template_that_writes_no_end_token_gets_a_learned_eos():
    tokenizer = make_tokenizer("llama")
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    r = Renderer(tokenizer, 100)
    row = r.completion((Message("user", "ab"),), (Message("assistant", "xy"),), W)
    assert tokens(r, row)[0] == "u" and labels(r, row) == ["x", "y", "\n", "</s>"]


@pytest.mark.parametrize("first", ["user", "assistant"])
def test_a_template_that_writes_the_bos_itself_does_not_double_it(first):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE.replace(
        "<|im_end|>", "</s>"
    ).replace("<|im_start|>", "")
    r = Renderer(tokenizer, 100)
    row = r.chat(chat("ab", "xy", "cd", "uv", first=first))
    assert tokens(r, row).count("<s>") == 1 and tokens(r, row)[0] == "<s>"
    assert "<s>" not in labels(r, row)


def test_a_template_that_rewrites_history_is_refused():
    tokenizer = make_tokenizer(
        "qwen3"
    )  # drops earlier messages, as templates do that strip old reasoning
    tokenizer.chat_template = (
        "{% for m in messages[-2:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}"
    )
    r = Renderer(tokenizer, 100)
    with pytest.raises(InputError, match=f"^{W}: the chat template rewrites earlier turns"):
        r.chat(chat("ab", "xy", "cd", "uv"))


def test_messages_without_a_template_are_refused_by_the_name_of_the_setting():
    with pytest.raises(InputError, match=rf"^{W}: .*no chat template.*--rows.chat-template"):
        renderer("llama").chat(chat("ab", "xy"))


def test_a_template_that_raises_is_an_error_of_the_row():
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = "{{ raise_exception('system messages are not for me') }}"
    with pytest.raises(
        InputError,
        match=f"^{W}: the chat template refuses these messages: system messages are not for me",
    ):
        Renderer(tokenizer, 100).chat(chat("ab", "xy"))


def test_chatml_and_a_jinja_file_can_be_chosen(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    own = Renderer(tokenizer, 100).chat(chat("ab", "xy"))
    tokenizer.chat_template = None
    set_chat_template(tokenizer, "chatml")
    assert Renderer(tokenizer, 100).chat(chat("ab", "xy")).ids == own.ids
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    set_chat_template(tokenizer, str(file))
    assert tokens(Renderer(tokenizer, 100), Renderer(tokenizer, 100).chat(chat("ab", "xy"))) == [
        *"abxy",
        "<|im_end|>",
    ]
    with pytest.raises(InputError, match=r"--rows.chat-template: nowhere.jinja is neither"):
        set_chat_template(tokenizer, "nowhere.jinja")


# Whole files
# --------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_rendered_stops_or_is_counted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "ab", "completion": "x"}\n{"prompt": "abcdefgh", "completion": "x"}\n'
    )
    r = renderer("llama", max_length=6)

    def render(row):
        return r.completion(row.prompt, row.completion, row.where)

    with pytest.raises(InputError, match=rf"{file}:2: the prompt alone is 9 tokens"):
        load(str(file), RowSettings(), (CompletionRow,), render)
    rendered, kept, note = load(
        str(file),
        RowSettings(on_error="skip"),
        (CompletionRow,),
        render,
        skipped=tmp_path / "skipped.jsonl",
    )
    assert len(rendered) == len(kept) == 1 and "1 of 2 rows (50.0%)" in note
    assert "rows.jsonl:2" in (tmp_path / "skipped.jsonl").read_text()
    file.write_text('{"prompt": "abcdefgh", "completion": "x"}\n' * 3)
    with pytest.raises(InputError, match=rf"^{file}: all 3 rows were skipped; give a file"):
        load(str(file), RowSettings(on_error="skip"), (CompletionRow,), render)


@given(
    st.lists(st.text("abc", max_size=2), min_size=1, max_size=40),
    st.floats(0, 0.9),
    st.integers(0, 5),
)
def test_the_split_keeps_equal_prompts_together_and_loses_nobody(keys, share, seed):
    train, held = split(keys, share, seed)
    assert sorted(train + held) == list(range(len(keys)))
    assert not {keys[i] for i in train} & {keys[i] for i in held}
    assert (train, held) == split(keys, share, seed)

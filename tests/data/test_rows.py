"""Every form that a row may have, and every fault, which is refused with file, line and key. The
files are written by hand, byte by byte.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiducial.data import sources
from fiducial.data.row_types import (
    ChatRow,
    CompletionRow,
    LabeledRow,
    Message,
    PreferenceRow,
    PromptRow,
    SampledIds,
    StepsRow,
    TextRow,
)
from fiducial.data.rows import parse_row, read_rows
from fiducial.errors import InputError

SFT = (TextRow, ChatRow, CompletionRow)
ALL = (*SFT, PromptRow, PreferenceRow, LabeledRow, StepsRow)
W = "f.jsonl:1"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


U, A, A2 = Message("user", "hi"), Message("assistant", "yes"), Message("assistant", "no")
ANSWERS = {"chosen": [assistant("yes")], "rejected": [assistant("no")]}


# Formats
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"text": " a\n"}, TextRow(" a\n", W)),
        ({"messages": [user("hi"), assistant("yes")]}, ChatRow((U, A), W)),
        (
            {"messages": [{"role": "system", "content": ""}, user("hi"), assistant("yes")]},
            ChatRow((Message("system", ""), U, A), W),
        ),
        ({"prompt": "p"}, PromptRow("p", {}, W)),
        (
            {"prompt": "p", "answer": 4, "tags": None},
            PromptRow("p", {"answer": 4, "tags": None}, W),
        ),
        ({"prompt": [user("hi")]}, PromptRow((U,), {}, W)),
        ({"prompt": "p", "completion": " c", "id": 3}, CompletionRow("p", " c", W)),
        ({"prompt": [user("hi")], "completion": [assistant("yes")]}, CompletionRow((U,), (A,), W)),
        ({"prompt": [user("hi")], "completion": "yes"}, CompletionRow((U,), (A,), W)),
        ({"prompt": "hi", "completion": [assistant("yes")]}, CompletionRow((U,), (A,), W)),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, PreferenceRow("p", "a", "b", None, W)),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
            PreferenceRow("p", "a", "b", 2.0, W),
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": None},
            PreferenceRow("p", "a", "b", None, W),
        ),
        ({"prompt": "hi", **ANSWERS}, PreferenceRow((U,), (A,), (A2,), None, W)),
        (
            {"prompt": "hi", "chosen": "yes", "rejected": [assistant("no")]},
            PreferenceRow((U,), (A,), (A2,), None, W),
        ),
        # HuggingFaceH4/ultrafeedback_binarized: a text prompt that the message lists repeat
        (
            {
                "prompt": "hi",
                "chosen": [user("hi"), assistant("yes")],
                "rejected": [user("hi"), assistant("no")],
            },
            PreferenceRow((U,), (A,), (A2,), None, W),
        ),
        (
            {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
            PreferenceRow((U,), (A,), (A2,), None, W),
        ),
        ({"prompt": "p", "completion": "c", "label": True}, LabeledRow("p", "c", True, W)),
        ({"prompt": "p", "completion": "c", "label": 0}, LabeledRow("p", "c", False, W)),
        (
            {"prompt": "p", "completions": ["s", "t"], "labels": [True, 0]},
            StepsRow("p", ("s", "t"), (True, False), W),
        ),
    ],
)
def test_each_format_is_known_by_its_keys(record, row):
    assert parse_row(record, W, ALL) == row


def test_labels_are_booleans_and_not_ones():
    row = parse_row({"prompt": "p", "completions": ["s"], "labels": [1]}, W, ALL)
    assert row.labels[0] is True


def test_a_transcript_prompt_stays_text():
    prompt = "\n\nHuman: hi\n\nAssistant:"
    assert parse_row({"prompt": prompt, "completion": " yes"}, W, SFT) == CompletionRow(
        prompt, " yes", W
    )


def test_messages_after_a_tool_call_belong_to_the_completion():
    tool = {"role": "tool", "content": ""}
    row = parse_row(
        {"prompt": [user("hi")], "completion": [assistant("look"), tool, assistant("yes")]}, W, SFT
    )
    assert [message.role for message in row.completion] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        # the last common turn, even if the answers begin alike or have further turns
        (
            "\n\nHuman: a\n\nAssistant: I do",
            "\n\nHuman: a\n\nAssistant: I don't",
            "\n\nHuman: a\n\nAssistant:",
            (" I do", " I don't"),
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            (" d", " e"),
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: f",
            "\n\nHuman: a\n\nAssistant:",
            (" b\n\nHuman: c\n\nAssistant: d", " f"),
        ),
        # whole words
        ("The sky is blue", "The sky is black", "The sky is", (" blue", " black")),
        ("The sky is blue", "The sky is green", "The sky is", (" blue", " green")),
        ("Is it? yes", "Is it?\nno", "Is it?", (" yes", "\nno")),
        ("Q\nblue", "Q\nred", "Q\n", ("blue", "red")),
        ("It is", "It is so", "It", (" is", " is so")),
        ("日本 は青", "日本 は赤", "日本", (" は青", " は赤")),
    ],
)
def test_a_prompt_that_both_answers_begin_with(chosen, rejected, prompt, rest):
    row = parse_row({"chosen": chosen, "rejected": rejected}, W, (PreferenceRow,))
    assert (row.prompt, (row.chosen, row.rejected)) == (prompt, rest)
    mirrored = parse_row({"chosen": rejected, "rejected": chosen}, W, (PreferenceRow,))
    assert (mirrored.prompt, (mirrored.rejected, mirrored.chosen)) == (prompt, rest)


words = st.lists(
    st.sampled_from(["a", "ab", "b", "\n\nHuman:", "\n\nAssistant:", " ", "\n"]), max_size=8
).map(" ".join)


@given(words, words, words)
def test_prompt_and_answer_are_the_text_again(prompt, chosen, rejected):
    record = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    try:
        row = parse_row(record, W, (PreferenceRow,))
    except InputError:
        return
    assert row.prompt + row.chosen == record["chosen"]
    assert row.prompt + row.rejected == record["rejected"]
    assert row.prompt.strip() and row.chosen.strip() and row.rejected.strip()


# The accepted formats decide
# --------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_other_keys_of_a_prompt_become_columns():
    assert parse_row(PAIR, W, (PromptRow,)) == PromptRow("p", {"chosen": "a", "rejected": "b"}, W)
    assert parse_row({"prompt": "p", "completion": "c"}, W, (PromptRow,)) == PromptRow(
        "p", {"completion": "c"}, W
    )
    shared = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert parse_row(shared, W, (PromptRow,)) == PromptRow("\n\nHuman: a\n\nAssistant:", shared, W)


def test_a_better_format_comes_first():
    assert isinstance(parse_row(PAIR, W, (PromptRow, PreferenceRow)), PreferenceRow)
    whole = {
        "prompt": "hi",
        "messages": [user("hi"), assistant("yes")],
        **ANSWERS,
    }  # UltraFeedback has all of these keys
    assert isinstance(parse_row(whole, W, SFT), ChatRow)
    assert isinstance(parse_row(whole, W, (PreferenceRow,)), PreferenceRow)
    assert isinstance(parse_row(whole, W, (PromptRow,)), PromptRow)


@pytest.mark.parametrize(
    ("record", "accept", "message"),
    [
        (
            PAIR,
            SFT,
            "found the keys prompt+chosen+rejected where prompt+completion or messages or text is "
            "wanted; "
            "give this file to fiducial reward or fiducial dpo, or",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            SFT,
            "found the keys chosen+rejected where .* fiducial dpo",
        ),
        (
            {"text": "a"},
            (PreferenceRow,),
            "found the keys text where prompt+chosen+rejected or chosen+rejected is wanted; give "
            "this file to fiducial sft",
        ),
        ({"messages": []}, (PreferenceRow,), "found the keys messages .* fiducial sft"),
        (
            {"prompt": "p", "completion": "c"},
            (PreferenceRow,),
            "found the keys prompt+completion .* fiducial sft",
        ),
        (
            {"prompt": "p"},
            SFT,
            "found the keys prompt where .* is wanted; give this file to fiducial ppo",
        ),
        (
            {"prompt": "p", "completions": ["c"], "labels": [True]},
            SFT,
            "found the keys prompt.completions.labels where .* wanted; give .* to fiducial prm",
        ),
        (
            {"prompt": "p", "completion": "c", "label": False},
            SFT,
            "key 'label' marks the completion as bad",
        ),
        (
            {"prompt": "p", "chosen": "a"},
            (PreferenceRow,),
            r"key 'rejected' is missing \(found: 'prompt', 'chosen'; wanted: "
            r"prompt+chosen+rejected or",
        ),
        ({"chosen": "a"}, (PreferenceRow,), "key 'rejected' is missing"),
        ({"prompt": "p", "completions": ["a"]}, (StepsRow,), "key 'labels' is missing"),
        ({"prompt": "p", "label": True}, (LabeledRow,), "key 'completion' is missing .*; add it"),
        ({"completion": "c"}, SFT, "key 'prompt' is missing"),
        (
            {"promt": "p", "completion": "c"},
            SFT,
            "key 'prompt' is missing .*; rename 'promt' to 'prompt'",
        ),
        ({"Text": "p"}, SFT, "key 'text' is missing .*; rename 'Text' to 'text'"),
        (
            {},
            (PromptRow,),
            r"the keys of a row are missing \(found: none; wanted: prompt or chosen+rejected\)",
        ),
        (
            {"foo": 1},
            SFT,
            r"the keys of a row are missing \(found: 'foo'; wanted: prompt+completion or messages "
            r"or text\)",
        ),
    ],
)
def test_keys_that_do_not_fit(record, accept, message):
    with pytest.raises(InputError, match="^f.jsonl:1: " + message.replace("+", r"\+")):
        parse_row(record, W, accept)


# Every fault that a row may have
# --------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "p", "completion": "c"}\n'


def completion(prompt=b'"p"', answer=b'"c"'):
    return b'{"prompt": ' + prompt + b', "completion": ' + answer + b"}"


def pair(chosen=b'"a"', rejected=b'"b"', rest=b""):
    return b'{"prompt": "p", "chosen": ' + chosen + b', "rejected": ' + rejected + rest + b"}"


def messages(body):
    return b'{"messages": [' + body + b"]}"


def labelled(label):
    return b'{"prompt": "p", "completion": "c", "label": ' + label + b"}"


def steps(completions, labels):
    return b'{"prompt": "p", "completions": ' + completions + b', "labels": ' + labels + b"}"


CHAT = b'{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}'

BAD = {
    # not JSON, not text
    "torn line": (
        b'{"prompt": "p", "compl',
        "the text is torn: it ends before its JSON does; write the row again",
    ),
    "torn before a value": (b'{"prompt": ', "the text is torn"),
    "not JSON": (b"prompt: p", r"not JSON at column 1 \(Expecting value\); write"),
    "two objects": (b'{"text": "a"} {"text": "b"}', r"not JSON at column 15 \(Extra data\)"),
    "single quotes": (b"{'text': 'a'}", "not JSON at column 2"),
    "raw newline escape": (b'{"text": "a\tb"}', "not JSON at column 12"),
    "not UTF-8": (b'{"text": "caf\xe9"}', r"byte offset 13 \(0xe9\) is not UTF-8; save"),
    "an encoded surrogate": (b'{"text": "\xed\xa0\x80"}', r"byte offset 10 \(0xed\) is not UTF-8"),
    "raw NUL": (b'{"text": "a\0b"}', "a raw NUL byte at byte offset 11; remove it"),
    "lone surrogate": (
        rb'{"text": "a\ud800b"}',
        r"key 'text' holds a lone surrogate \('\\ud800'\)",
    ),
    "lone low surrogate, deep": (
        rb'{"text": "a", "meta": {"b": [1, "\udc00"]}}',
        "key 'meta' holds a lone surrogate",
    ),
    "lone surrogate in a key": (rb'{"text": "a", "\udfff": 1}', "key '.*' holds a lone surrogate"),
    "duplicate key": (
        b'{"text": "a", "text": "a"}',
        "key 'text' occurs twice in one object; keep one",
    ),
    "duplicate key, deep": (
        messages(b'{"role": "user", "content": "a", "role": "user"}'),
        "key 'role' occurs twice",
    ),
    "deep nesting": (b'{"text": ' + b"[" * 100_000, "lists or objects are nested too deeply"),
    "a huge integer": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "an integer is too long"),
    "not an object: list": (b'["a"]', "the row is a list where an object belongs"),
    "not an object: text": (b'"a"', "the row is text where an object belongs"),
    "not an object: null": (b"null", "the row is null where an object belongs"),
    "a BOM that is not at the start": (b'\xef\xbb\xbf{"text": "a"}', "not JSON at column 1"),
    # keys and types
    "missing key": (b'{"prompt": "p"}', "found the keys prompt where"),
    "a number for text": (
        b'{"text": 5}',
        "key 'text' is a number where text belongs; write a string",
    ),
    "a boolean for text": (b'{"text": true}', "key 'text' is a boolean where"),
    "null for text": (b'{"text": null}', "key 'text' is null where"),
    "a list for text": (b'{"text": ["a"]}', "key 'text' is a list where text belongs"),
    "an object for a prompt": (
        completion(prompt=b"{}"),
        "key 'prompt' is an object where text belongs",
    ),
    "a number for a completion": (
        completion(answer=b"1.5"),
        "key 'completion' is a number where text",
    ),
    "null for chosen": (pair(chosen=b"null"), "key 'chosen' is null where text"),
    "text for messages": (
        b'{"messages": "a"}',
        "key 'messages' is text where a list of messages belongs",
    ),
    "text for a message": (
        messages(b'"a"'),
        r"key 'messages\[0\]' is text where a message belongs",
    ),
    "a message with no role": (
        messages(b'{"from": "human", "content": "a"}'),
        r"key 'messages\[0\].role' is missing",
    ),
    "a message with no content": (
        messages(CHAT + b', {"role": "user"}'),
        r"key 'messages\[2\].content' is missing",
    ),
    "null content": (
        messages(b'{"role": "user", "content": null}'),
        r"key 'messages\[0\].content' is null where text",
    ),
    "content in parts": (
        messages(b'{"role": "user", "content": [{"text": "a"}]}'),
        r"key 'messages\[0\].content' is a list where",
    ),
    "unknown role": (
        messages(CHAT + b', {"role": "human", "content": "a"}'),
        r"key 'messages\[2\].role' is the unknown role 'human'; use one of system, user",
    ),
    "unknown role, upper case": (
        completion(b'[{"role": "User", "content": "a"}]'),
        r"key 'prompt\[0\].role' is the unknown role 'User'",
    ),
    "tool calls": (
        messages(CHAT + b', {"role": "assistant", "content": "a", "tool_calls": [{}]}'),
        r"key 'messages\[2\].tool_calls' is not supported",
    ),
    "tools": (b'{"tools": [{}], ' + messages(CHAT)[1:], "key 'tools' is not supported"),
    # empty
    "empty text": (b'{"text": ""}', "key 'text' is empty; fill it in or remove the row"),
    "whitespace for a prompt": (completion(prompt=rb'" \n\t\u3000"'), "key 'prompt' is empty"),
    "empty completion": (completion(answer=b'""'), "key 'completion' is empty"),
    "empty chosen": (pair(chosen=b'" "'), "key 'chosen' is empty"),
    "empty rejected": (pair(rejected=b'""'), "key 'rejected' is empty"),
    "empty messages": (messages(b""), "key 'messages' is an empty list where"),
    "empty list for a prompt": (completion(prompt=b"[]"), "key 'prompt' is an empty list where"),
    "empty system prompt alone": (
        completion(prompt=b'[{"role": "system", "content": " "}]'),
        "key 'prompt' is empty",
    ),
    "empty user message": (
        messages(b'{"role": "user", "content": " "}'),
        r"key 'messages\[0\].content' is empty",
    ),
    "empty answer message": (
        pair(chosen=b'[{"role": "assistant", "content": ""}]'),
        r"key 'chosen\[0\].content' is empty",
    ),
    "no assistant message": (
        messages(b'{"role": "user", "content": "a"}'),
        "key 'messages' has no assistant message",
    ),
    "no common beginning": (
        b'{"chosen": "a b", "rejected": "c d"}',
        "key 'prompt' is missing, and chosen and rejected have no common .* empty; add the prompt",
    ),
    "no common turn": (
        rb'{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}',
        "key 'prompt' is missing, and chosen and rejected have no common",
    ),
    "nothing after the common turn": (
        rb'{"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}',
        "key 'chosen' is empty",
    ),
    "no common message": (
        b'{"chosen": [{"role": "assistant", "content": "a"}], '
        b'"rejected": [{"role": "assistant", "content": "b"}]}',
        "key 'prompt' is missing, and the messages",
    ),
    "answers to different questions": (
        b'{"chosen": [{"role": "system", "content": "s"}, '
        + CHAT
        + b'], "rejected": [{"role": "system", "content": "s"}, '
        b'{"role": "user", "content": "ho"}, {"role": "assistant", "content": "yes"}]}',
        "key 'chosen' does not begin and end with an assistant message",
    ),
    "text against messages": (
        b'{"chosen": "a", "rejected": [' + CHAT + b"]}",
        "key 'rejected' has another form than 'chosen'",
    ),
    # shapes of a chat
    "a prompt that is answered": (
        completion(prompt=b"[" + CHAT + b"]"),
        "key 'prompt' ends with an assistant message",
    ),
    "an answer that ends with a question": (
        completion(answer=b'[{"role": "user", "content": "a"}]'),
        "key 'completion' does not begin and end with",
    ),
    "a text prompt and a long answer": (
        completion(
            answer=b'[{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]'
        ),
        "key 'completion' is several messages where the prompt is text",
    ),
    # preferences
    "chosen equal to rejected": (
        pair(chosen=b'"b"'),
        "key 'chosen' is equal to 'rejected', .*; remove the row",
    ),
    "equal once normalised": (
        pair(rejected=b'[{"role": "assistant", "content": "a"}]'),
        "key 'chosen' is equal to 'rejected'",
    ),
    "equal without a prompt": (
        b'{"chosen": "a b", "rejected": "a b"}',
        "key 'chosen' is equal to 'rejected'",
    ),
    "the question under another name": (
        b'{"question": "q", "chosen": "I do", "rejected": "I do not"}',
        "key 'prompt' is missing, .* rename 'question' to 'prompt'",
    ),
    "NaN margin": (pair(rest=b', "margin": NaN'), "key 'margin': NaN is not a finite number"),
    "infinite margin": (
        pair(rest=b', "margin": -Infinity'),
        "key 'margin': -Infinity is not a finite number",
    ),
    "overflowing margin": (
        pair(rest=b', "margin": 1e999'),
        "key 'margin': 1e999 is not a finite number",
    ),
    "huge integer margin": (
        pair(rest=b', "margin": 1' + b"0" * 400),
        "key 'margin' is 1000.* where a finite number belongs",
    ),
    "boolean margin": (
        pair(rest=b', "margin": true'),
        "key 'margin' is a boolean where a number belongs",
    ),
    "text margin": (pair(rest=b', "margin": "1"'), "key 'margin' is text where a number belongs"),
    "NaN in another column": (
        b'{"text": "a", "score": [NaN]}',
        "key 'score': NaN is not a finite number",
    ),
    "NaN before a tear": (b'{"score": NaN, "text": ', "NaN is not a finite number"),
    # labels
    "NaN label": (labelled(b"NaN"), "key 'label': NaN is not a finite number"),
    "text label": (
        labelled(b'"yes"'),
        r"key 'label' is text \('yes'\) where true or false belongs; write true, false, 1 or 0",
    ),
    "float label": (labelled(b"0.5"), r"key 'label' is a number \(0.5\) where"),
    "a null among labels": (
        steps(b'["a", "b"]', b"[true, null]"),
        r"key 'labels\[1\]' is null \(None\) where true or false belongs",
    ),
    # what is not text
    "an image": (
        b'{"prompt": "p", "completion": "c", "images": ["a.png"]}',
        "key 'images' is not supported, because only text is read here",
    ),
    "an image in a message": (
        messages(
            b'{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}'
        ),
        r"key 'messages\[0\].content' holds a part of type 'image', and only text is read here",
    ),
    "a sound": (b'{"text": "a", "audio": {"path": "a.wav"}}', "key 'audio' is not supported"),
    # ids
    "ids that are none": (
        b'{"prompt": "p", "completion": "c", "completion_ids": [1, -2], "tokenizer": "t"}',
        "key 'completion_ids' holds something else than token ids",
    ),
    "label 2": (labelled(b"2"), r"key 'label' is a number \(2\) where"),
    "label -1": (labelled(b"-1"), "key 'label' is a number"),
    "text for steps": (steps(b'"a"', b"[true]"), "key 'completions' is text where a list"),
    "no steps": (steps(b"[]", b"[]"), "key 'completions' is an empty list"),
    "a number for a step": (
        steps(b'["a", 1]', b"[true, true]"),
        r"key 'completions\[1\]' is a number where text",
    ),
    "an empty step": (steps(b'["a", ""]', b"[true, true]"), r"key 'completions\[1\]' is empty"),
    "a missing label": (steps(b'["a", "b"]', b"[true]"), "key 'labels' has 1 entries for 2 steps"),
    "a bad label among steps": (
        steps(b'["a", "b"]', b"[true, 0.5]"),
        r"key 'labels\[1\]' is a number \(0.5\)",
    ),
}
ACCEPT = (*SFT, PreferenceRow, LabeledRow, StepsRow)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""], ids=["lf", "crlf", "eof"])
def test_a_bad_row_is_refused_at_its_line(tmp_path, name, ending):
    line, message = BAD[name]
    path = tmp_path / "f.jsonl"
    path.write_bytes(
        GOOD + b"\n  \r\n" + GOOD + line + ending  # the second and third lines are blank
    )
    with pytest.raises(InputError) as caught:
        read_rows(str(path), ACCEPT)
    assert re.match(re.escape(f"{path}:5: ") + message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_and_the_rest_read(tmp_path, name):
    line, message = BAD[name]
    path, skipped = tmp_path / "f.jsonl", tmp_path / "skipped.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    rows = read_rows(str(path), ACCEPT, on_error="skip", skipped=skipped)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
    assert (rows.skipped, rows.total, len(rows)) == (1, 3, 2)
    (entry,) = map(json.loads, skipped.read_text(encoding="utf-8").splitlines())
    assert entry["where"] == f"{path}:2"
    assert re.match(re.escape(f"{path}:2: ") + message, entry["error"])
    assert entry["line"] == line.decode(errors="replace")[:2000]


def test_what_is_harmless_is_accepted(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n\r\n{"text": "\xe2\x80\xa8caf\xc3\xa9 \\ud83d\\ude00 \\u0000"}\r\n'
        b'{"text": "b", "score": -1e-3}'
    )
    assert list(read_rows(str(path), SFT)) == [
        TextRow("\u2028café 😀 \0", f"{path}:3"),
        TextRow("b", f"{path}:4"),
    ]


def test_the_byte_offset_counts_the_byte_order_mark(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xff"}')
    with pytest.raises(InputError, match=r":1: byte offset 13 \(0xff\)"):
        read_rows(str(path), SFT)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_empty_file(tmp_path, content, on_error):
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"f.jsonl:1: the file is empty; give"):
        read_rows(str(path), SFT, on_error=on_error)


def test_skipping_everything_is_an_error(tmp_path):
    path, skipped = tmp_path / "f.jsonl", tmp_path / "skipped.jsonl"
    path.write_bytes(b"{}\n{\n")
    with pytest.raises(
        InputError,
        match=r"all 2 rows were skipped, the first because: .*f.jsonl:1: the keys of a row are "
        r"missing",
    ):
        read_rows(str(path), SFT, on_error="skip", skipped=skipped)
    assert len(skipped.read_text().splitlines()) == 2


def test_nothing_skipped_writes_nothing(tmp_path):
    path, skipped = tmp_path / "f.jsonl", tmp_path / "skipped.jsonl"
    path.write_bytes(GOOD)
    assert read_rows(str(path), SFT, on_error="skip", skipped=skipped).skipped == 0
    assert not skipped.exists()


def test_a_skipped_row_is_cut_at_2000_characters(tmp_path):
    path, skipped = tmp_path / "f.jsonl", tmp_path / "skipped.jsonl"
    path.write_bytes(GOOD + '{"text": "é'.encode() + "é".encode() * 5000 + b"\n")
    read_rows(str(path), SFT, on_error="skip", skipped=skipped)
    assert json.loads(skipped.read_text())["line"] == '{"text": "' + "é" * 1990


def test_an_error_shows_little_of_a_hostile_row(tmp_path):
    path = tmp_path / "f.jsonl"
    role = "\\u001b[31m\\n" + "x" * 10_000
    path.write_text('{"messages": [{"role": "' + role + '", "content": "a"}]}')
    with pytest.raises(InputError) as caught:
        read_rows(str(path), SFT)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300 + len(str(path))


# Round trip
# --------------------------------------------------------------------------------------------

texts = st.text()
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(texts, values, max_size=5)


@given(
    st.lists(
        st.tuples(objects, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \n"])),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
@settings(deadline=None)
def test_what_is_written_as_json_lines_is_read_equal(tmp_path_factory, lines, bom):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    content, number, expected = b"\xef\xbb\xbf" if bom else b"", 1, []
    for value, ascii_only, ending in lines:
        content += json.dumps(value, ensure_ascii=ascii_only).encode() + ending
        expected.append((f"{path}:{number}", value))
        number += ending.count(b"\n")
    path.write_bytes(content)
    assert [(record.where, record.value) for record in sources.records(str(path))] == expected


@given(objects)
@settings(deadline=None)
def test_any_columns_reach_the_prompt_row(columns):
    for other in ("prompt", "image", "images", "video", "videos", "audio", "audios"):
        columns.pop(other, None)
    assert parse_row({"prompt": "p", **columns}, W, (PromptRow,)) == PromptRow("p", columns, W)


@given(objects)
@settings(deadline=None)
def test_any_object_is_a_row_or_an_input_error(record):
    for key in ("prompt", "completion"):
        record.setdefault(key, [{"role": "user"}])
    with pytest.raises(InputError):
        parse_row(record, W, ALL)


def test_reading_and_rendering_rows_imports_nothing_heavy():
    """Importing every file of data/ loads no heavy package, except for the batches of tensors."""
    files = {path.stem for path in Path(sources.__file__).parent.glob("*.py")} - {"__init__"}
    light = [f"fiducial.data.{name}" for name in sorted(files - {"batches"})]
    assert {"fiducial.data.rows", "fiducial.data.render", "fiducial.data.tables"} < set(light)
    heavy = {"torch", "transformers", "datasets", "pandas", "pyarrow", "numpy"}
    code = f"import importlib, sys\nfor name in {light}:\n    importlib.import_module(name)\n"
    code += f"    assert not {heavy} & set(sys.modules), name"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# Keys that hold nothing, and labels
# --------------------------------------------------------------------------------------------


def test_a_content_of_parts_of_text_is_their_text():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    row = {"messages": [{"role": "user", "content": parts}, assistant("yes")]}
    assert parse_row(row, W, SFT) == ChatRow((U, A), W)


NOTHING = dict.fromkeys(
    ("prompt", "completion", "text", "messages", "chosen", "rejected", "completions", "labels")
)
GAPS = [
    ({"text": "a"}, TextRow("a", W)),
    ({"prompt": "p", "completion": "c"}, CompletionRow("p", "c", W)),
    ({"prompt": "p", "completion": "c", "label": None}, CompletionRow("p", "c", W)),
    ({"prompt": "p", "completion": "c", "label": 0}, LabeledRow("p", "c", False, W)),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, PreferenceRow("p", "a", "b", None, W)),
    ({"chosen": "x a", "rejected": "x b"}, PreferenceRow("x", " a", " b", None, W)),
    (
        {"prompt": "p", "completions": ["a"], "labels": [True]},
        StepsRow("p", ("a",), (True,), W),
    ),
]


@pytest.mark.parametrize(("row", "expected"), GAPS)
def test_null_says_that_a_key_is_not_there(row, expected):
    assert parse_row({**NOTHING, "images": None, **row}, W, ACCEPT) == expected


@pytest.mark.parametrize("row", [{"prompt": "p", "number": None}, {"prompt": "p", "images": []}])
def test_a_column_of_a_prompt_keeps_its_null(row):
    columns = {k: v for k, v in row.items() if k != "prompt"}
    assert parse_row(row, W, (PromptRow,)) == PromptRow("p", columns, W)


@pytest.mark.parametrize(
    ("row", "accept", "message"),
    [
        ({"prompt": None}, (PromptRow,), "key 'prompt' is null"),
        ({"prompt": "p", "completion": None}, SFT, "key 'completion' is null"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, ACCEPT, "key 'chosen' is null"),
        (
            {"prompt": "p", "completion": "c", "label": None},
            (LabeledRow,),
            r"key 'label' is null \(None\) where true or false belongs",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "messages": None},
            SFT,
            r"found the keys prompt\+chosen\+rejected where",
        ),
    ],
)
def test_a_row_that_lacks_what_its_format_needs_is_refused(row, accept, message):
    with pytest.raises(InputError, match=f"^{W}: {message}"):
        parse_row(row, W, accept)


GOOD_LABELS = (True, 1, 1.0, "true", "True", "TRUE", "1", "1.0", " true ")
BAD_LABELS = (False, 0, 0.0, "false", "False", "0", "0.0")
NO_LABELS = ("yes", "bad", 2, -1, 0.5, "", [], [True], {"a": 1})


@pytest.mark.parametrize("value", (*GOOD_LABELS, *BAD_LABELS, *NO_LABELS), ids=repr)
def test_a_label_is_understood_in_every_form_or_refused(value):
    outcome = {"prompt": "p", "completion": "c", "label": value}
    steps = {"prompt": "p", "completions": ["a"], "labels": [value]}
    if value in NO_LABELS:
        for row in (outcome, steps):
            with pytest.raises(InputError, match=f"^{W}: key 'label.* where true or false belongs"):
                parse_row(row, W, (LabeledRow, StepsRow))
    else:
        good = value in GOOD_LABELS
        assert parse_row(outcome, W, (LabeledRow,)).label is good
        assert parse_row(steps, W, (StepsRow,)).labels == (good,)
    if value in GOOD_LABELS:
        assert parse_row(outcome, W, SFT) == CompletionRow("p", "c", W)
        return
    with pytest.raises(InputError, match=f"^{W}: key 'label'"):  # never learned as good
        parse_row(outcome, W, SFT)


def test_ids_of_an_answer_come_with_their_tokenizer():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_ids": [3, 2], "tokenizer": "t"}
    parsed = parse_row(row, W, (PreferenceRow,))
    assert parsed.chosen_sampled == SampledIds((3, 2), "t") and parsed.rejected_sampled is None
    unknown = parse_row({"prompt": "p", "completion": "a", "completion_ids": [3]}, W, SFT)
    assert unknown.sampled == SampledIds((), "")

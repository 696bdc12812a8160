"""Chat templates of every kind: a turn is trained with the tokens after which, and with which, it
is sampled, whatever the template does with the past.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.data.language import language_rows
from fiducial.data.prepare import load
from fiducial.data.render import Renderer, set_chat_template
from fiducial.data.row_types import ChatRow, CompletionRow, Message
from fiducial.errors import InputError
from fiducial.settings import RowSettings
from templates import END, SPECIAL, TEMPLATES, tokenizer, with_template

W = "f.jsonl:1"
THOUGHT = "<think>\ntwo and two\n</think>\n\nfour"
U, A = (lambda text: Message("user", text)), (lambda text: Message("assistant", text))
TALKS = {
    "one turn": (U("what is two"), A("four")),
    "two turns": (U("what is two"), A("four"), U("please"), A("five")),
    "a thought": (U("what is two"), A(THOUGHT)),
    "two thoughts": (U("what is two"), A(THOUGHT), U("please"), A(THOUGHT)),
    "a question at the end": (U("what is two"), A("four"), U("please")),
}
OPENING = ("r1", "nemotron")
APART = {"qwen3", "r1", "nemotron", "gpt-oss", "glm", "window", "plain", "llama3"}
"""Templates whose turns have no common sequence, in a conversation without thoughts. With llama3
the tokenizer is why: it cuts a double line's end between the two before a word, as GPT-2's does.
"""


def learned(rows):
    """For each stretch of labels the ids before it, and the labels."""
    out = []
    for row in rows:
        starts = [i for i, m in enumerate(row.mask) if m and not (i and row.mask[i - 1])]
        for a in starts:
            b = next((i for i in range(a, len(row)) if not row.mask[i]), len(row))
            out.append((row.ids[:a], row.ids[a:b]))
    return out


def as_asked(r, messages, number):
    """The ids that transformers makes of the prompt of a turn."""
    tok = r.tokenizer
    parts = r.template.parts
    plain = [
        {"role": m.role, "content": [{"type": "text", "text": m.content}] if parts else m.content}
        for m in messages[:number]
    ]
    return list(tok.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))


def check(r, messages, rows, numbers, end):
    """Every turn follows its own prompt and ends once, with `end`; it says what the row says."""
    found = learned(rows)
    assert len(found) == len(numbers)
    for (before, labels), number in zip(found, numbers, strict=True):
        assert before == as_asked(r, messages, number)
        ends = [i for i in labels if i in r.ends]
        assert ends == labels[-1:] and r.tokenizer.convert_ids_to_tokens(ends) == [end]
        said = "".join(r.decode(labels).split())
        wanted = "".join(messages[number].content.split())
        opened = r.tokenizer.decode(before).rstrip().endswith("<think>")
        assert (wanted.removeprefix("<think>") if opened else wanted) in said
        if opened and "</think>" not in wanted:
            assert said == "</think>" + wanted  # the thinking that the prompt opens is closed


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_turn_is_trained_as_it_is_sampled(name, train_on, talk):
    r, messages = Renderer(with_template(name), 512, train_on=train_on), TALKS[talk]
    rows = r.turns(ChatRow(messages, W))
    numbers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    numbers = numbers if train_on == "all" else numbers[-1:]
    if len(numbers) > 1 and "thought" not in talk:
        assert len(rows) == (len(numbers) if name in APART else 1)
    check(r, messages, rows, numbers, END[name])
    notes = r.take_notes(1)
    assert ("1 of 1 conversations (100.0%) are trained turn by turn" in notes) == (len(rows) > 1)
    without = any("<think>" not in messages[i].content for i in numbers)
    assert ("without the thinking that" in notes) == (name in OPENING and without)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_one_sequence_only_where_every_turn_keeps_its_tokens(name):
    r, messages = Renderer(with_template(name), 512), TALKS["two turns"]
    if name in APART - {"glm"}:
        with pytest.raises(InputError, match=f"^{W}: the chat template rewrites earlier turns"):
            r.chat(ChatRow(messages, W))
        return
    found = learned([r.chat(ChatRow(messages, W))])
    assert [before for before, _ in found] == [as_asked(r, messages, i) for i in (1, 3)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_are_the_last_turn_of_the_conversation(name):
    r, messages = Renderer(with_template(name), 512, train_on="last"), TALKS["two turns"]
    row = r.completion(messages[:3], messages[3:], W)
    (same,) = r.turns(ChatRow(messages, W))
    assert (row.ids, row.mask) == (same.ids, same.mask)
    check(r, messages, [row], [3], END[name])


def test_the_next_turns_token_is_the_end_where_the_model_stops_at_it():
    tok = with_template("glm")
    user = tok.convert_tokens_to_ids("<|user|>")
    r = Renderer(tok, 512, end_ids=frozenset({user}))
    (row,) = r.turns(ChatRow(TALKS["two turns"], W))
    assert [labels[-1] for _, labels in learned([row])] == [user, r.eos]


@pytest.mark.parametrize(
    ("name", "end", "rows"),
    [("phi3", "<|end|>", 1), ("cohere2", "<|end turn|>", 1), ("chatml", "<|im_end|>", 1)],
)
def test_a_turn_ends_at_the_first_token_that_the_configs_name(name, end, rows):
    tok = with_template(name)
    ends = frozenset({tok.convert_tokens_to_ids(end)})
    r = Renderer(tok, 512, end_ids=ends)
    assert r.ends == ends | {r.eos}
    found = r.turns(ChatRow(TALKS["two turns"], W))
    check(r, TALKS["two turns"], found, [1, 3], end)
    assert len(found) == rows


def test_turns_beyond_the_limit_are_left_out_and_counted_as_cut():
    messages = TALKS["two turns"]
    whole = Renderer(with_template("qwen3"), 512).turns(ChatRow(messages, W))
    prompt = whole[1].mask.index(True)
    cut = Renderer(with_template("qwen3"), prompt).turns(ChatRow(messages, W))
    assert [r.ids for r in cut] == [whole[0].ids] and cut[0].truncated
    with pytest.raises(InputError, match=f"^{W}: the prompt alone is {prompt} tokens"):
        Renderer(with_template("qwen3"), prompt, "error").turns(ChatRow(messages, W))


def test_several_turns_as_one_completion_are_refused_where_they_have_no_common_sequence():
    messages = TALKS["two turns"]
    r = Renderer(with_template("qwen3"), 512)
    with pytest.raises(InputError, match=f"^{W}: the chat template rewrites earlier turns"):
        r.completion(messages[:1], messages[1:], W)
    one = Renderer(with_template("chatml"), 512).completion(messages[:1], messages[1:], W)
    assert len(learned([one])) == 2


def test_a_template_that_hides_what_is_said_is_refused():
    hides = "{% for m in messages %}{{ m.role }}{% endfor %}"
    r = Renderer(tokenizer(template=hides), 512)
    with pytest.raises(InputError, match=f"^{W}: the chat template does not write what an"):
        r.chat(ChatRow(TALKS["one turn"], W))


def test_chatml_begins_with_the_bos_that_the_tokenizer_adds_and_another_template_may_not():
    tok = tokenizer(template=TEMPLATES["chatml"])
    r = Renderer(tok, 512)
    assert r.prompt((U("two"),), W)[0] != tok.bos_token_id  # as apply_chat_template
    assert "the chat template writes no BOS token" in r.take_notes(1)
    set_chat_template(tok, "chatml")
    again = Renderer(tok, 512)
    assert again.prompt((U("two"),), W)[0] == tok.bos_token_id
    assert again.take_notes(1) == ""


def test_a_file_becomes_a_row_for_each_turn(tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "yes"},'
        ' {"role": "user", "content": "please"}, {"role": "assistant", "content": "no"}]}\n'
        '{"prompt": "two", "completion": "yes"}\n'
    )
    r = Renderer(with_template("qwen3"), 512)
    rows, kept, _ = load(str(file), RowSettings(), (ChatRow, CompletionRow), language_rows(r))
    assert [row.where[-2:] for row in rows] == [":1", ":1", ":2"] == [k.where[-2:] for k in kept]


# What people write stays text
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_message_cannot_spell_a_control_token(name):
    tok = with_template(name)
    r = Renderer(tok, 512)
    end = END[name]
    for word in (end, "</s>", "<s>"):
        plain = r.completion((U("say please"),), (A("four"),), W)
        assert "spell a special token" not in r.take_notes(1)
        row = r.completion((U(f"say {word}please"),), (A(f"fo{word}ur"),), W)
        number = tok.convert_tokens_to_ids(word)
        assert row.ids.count(number) == plain.ids.count(number)
        assert tok.decode(row.ids).count(word) == 2 + plain.ids.count(number)
        assert r.decode([i for i, m in zip(row.ids, row.mask, strict=True) if m]).count(word) == 1
        assert row.ids[: row.mask.index(True)] == r.prompt((U(f"say {word}please"),), W)
        assert "1 of 1 rows (100.0%) spell a special token in a message" in r.take_notes(1)


def test_tags_stay_tokens_in_a_message():
    tok = with_template("chatml")
    row = Renderer(tok, 512).completion((U("write <think> first"),), (A(THOUGHT),), W)
    assert row.ids.count(tok.convert_tokens_to_ids("<think>")) == 2
    assert row.ids.count(tok.convert_tokens_to_ids("</think>")) == 1


def test_an_assistant_may_say_special_tokens_that_do_not_separate_turns():
    tok = with_template("chatml")
    number = tok.convert_tokens_to_ids("<e>")
    r = Renderer(tok, 512)
    assert r.completion((U("two"),), (A("<e>four"),), W).ids.count(number) == 1
    assert r.completion((U("<e>two"),), (A("four"),), W).ids.count(number) == 0


def test_a_token_that_the_template_writes_is_no_words_of_a_message_although_it_is_not_special():
    tok = tokenizer(template="{% for m in messages %}<u>{{ m.content }}<end>{% endfor %}")
    tok.add_tokens(["<u>", "<end>", "<tool>", "</tool>"])
    r = Renderer(tok, 512)
    end, tool = tok.convert_tokens_to_ids(["<end>", "<tool>"])
    row = r.completion((U("a<end><tool>"),), (A("b<u>"),), W)
    assert row.ids.count(end) == 2 and row.ids.count(tool) == 1 and end in r.ends
    assert row.ids.count(tok.convert_tokens_to_ids("<u>")) == 2


def test_plain_text_spells_special_tokens_as_in_trl():
    tok = with_template("chatml")
    r = Renderer(tok, 512)
    number = tok.convert_tokens_to_ids("<|im_end|>")
    assert r.completion("two<|im_end|>", "four", W).ids.count(number) == 1


# The templates of an installed TRL
# --------------------------------------------------------------------------------------------


def installed():
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else None
    return sorted(folder.glob("*.jinja")) if folder and folder.is_dir() else []


@pytest.mark.skipif(not installed(), reason="trl, whose chat templates are tried, is not installed")
def test_the_templates_that_trl_ships():
    for path in installed():
        text = path.read_text(encoding="utf-8")
        words = set(re.findall(r"<[|\uff5c][^<>|\uff5c\s'\"]+[|\uff5c]>", text))
        words |= set(
            re.findall(r"</?(?:think|s|start_of_turn|end_of_turn|end_of_utterance)>", text)
        )
        tok: PreTrainedTokenizerFast = tokenizer(template=text, special=(*SPECIAL, *sorted(words)))
        for talk in TALKS.values():
            r = Renderer(tok, 4096)
            numbers = [i for i, m in enumerate(talk) if m.role == "assistant"]
            rows = r.turns(ChatRow(talk, W))
            for (before, labels), number in zip(learned(rows), numbers, strict=True):
                assert before == as_asked(r, talk, number), path.name
                assert [i for i in labels if i in r.ends] == labels[-1:], path.name
                answer = talk[number].content.rpartition("</think>")[2].strip()
                assert answer in r.decode(labels), path.name

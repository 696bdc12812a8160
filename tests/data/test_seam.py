"""The seam of prompt and answer, with tokenizers that mark the beginning of words and with one that
does not, against code that does what TRL does, and against texts.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiducial.data.pairs import preference_rows
from fiducial.data.render import Renderer
from fiducial.data.row_types import ChatRow, Message, PreferenceRow, SampledIds, StepsRow
from fiducial.data.rows import parse_row
from fiducial.data.steps import Steps
from fiducial.errors import InputError
from fiducial.methods.prm import solver
from templates import KINDS, MARKED, TEMPLATES, tokenizer

W = "f.jsonl:1"
RENDERERS = {kind: Renderer(tokenizer(kind), 512) for kind in KINDS}


def trl(tok, prompt, answer):
    """What TRL's DPO makes of a pair's side: prompt and whole are tokenized, and the answer is what
    follows their common beginning. Plain text gets the EOS token as text.
    """
    if isinstance(prompt, str):
        before, whole = tok(prompt).input_ids, tok(prompt + answer + tok.eos_token).input_ids
    else:
        before = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tok.apply_chat_template(prompt + answer, return_dict=False)
    same = 0
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    return before, whole[:same], whole[same:]


TEXTS = [
    ("once upon a", " time"),
    ("what is two plus two", " four"),
    ("Human: hello\n\nAssistant:", " yes the cat"),
    ("Human: hello\n\nAssistant:", "\nyes"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "answer"), TEXTS)
def test_plain_text_has_the_ids_that_trl_gives_it(kind, prompt, answer):
    r = RENDERERS[kind]
    before, kept, rest = trl(r.tokenizer, prompt, answer)
    assert kept == before  # the prompt's ids stay, so both conventions agree
    row = r.completion(prompt, answer, W)
    assert row.ids == kept + rest and row.mask == [False] * len(kept) + [True] * len(rest)
    assert r.prompt(prompt, W) == before


@pytest.mark.parametrize("kind", KINDS)
def test_messages_have_the_ids_that_trl_gives_them_up_to_the_end_of_the_turn(kind):
    tok = tokenizer(kind, TEMPLATES["chatml"], eos="<|im_end|>")
    r = Renderer(tok, 512)
    prompt, answer = [{"role": "user", "content": "hello cat"}], "thank you"
    before, kept, rest = trl(tok, prompt, [{"role": "assistant", "content": answer}])
    assert kept == before
    rest = rest[: rest.index(tok.eos_token_id) + 1]  # the line's end after it is never sampled
    row = r.completion((Message("user", "hello cat"),), (Message("assistant", answer),), W)
    assert row.ids == kept + rest and row.num_labels == len(rest)


@pytest.mark.parametrize("kind", [k for k in MARKED if k != "unigram"])
@pytest.mark.parametrize(("prompt", "answer"), [("once upon a", "time"), ("two plus two ", "four")])
def test_where_a_token_would_reach_across_the_seam_no_word_mark_is_invented(kind, prompt, answer):
    r = RENDERERS[kind]
    r.take_notes(1)
    row = r.completion(prompt, answer, W)
    before = r.prompt(prompt, W)
    assert row.ids[: len(before)] == before == r.tokenizer(prompt).input_ids
    assert r.decode(row.ids) == r.decode(before) + answer  # no space that the text has not
    alone = r.tokenizer(answer, add_special_tokens=False).input_ids
    assert row.ids[len(before) :] != [*alone, r.eos]  # by itself it begins with a mark
    assert r.take_notes(4).startswith("1 of 4 rows (25.0%) have a token that would reach across")
    assert r.take_notes(4) == ""


ALPHABET = st.text("cathe onr\n:", min_size=1, max_size=10)


@given(ALPHABET, ALPHABET, st.sampled_from(KINDS))
def test_the_prompt_is_always_a_prefix_and_the_text_is_always_that_of_the_row(prompt, answer, kind):
    r = RENDERERS[kind]
    before, row = r.prompt(prompt, W), r.completion(prompt, answer, W)
    assert row.ids[: len(before)] == before and row.ids[-1] == r.eos
    if kind != "unigram":  # it has no token for a line's end
        assert r.decode(row.ids[len(before) :]) == answer


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_of_a_conversation_has_the_ids_of_the_prompt(kind):
    r = Renderer(tokenizer(kind, TEMPLATES["chatml"], eos="<|im_end|>"), 512)
    say = ("hello", "once upon a time", "please", "the cat", "thank you", "no")
    roles = ("user", "assistant") * 3
    messages = tuple(Message(*m) for m in zip(roles, say, strict=True))
    row = r.chat(ChatRow(messages, W))
    for turn in (1, 3, 5):
        asked = r.prompt(messages[:turn], W)
        assert row.ids[: len(asked)] == asked and row.mask[len(asked)]


def transcript():
    """Chosen and rejected of a transcript without a prompt."""
    begin = "\n\nHuman: hello cat\n\nAssistant:"
    row = {"chosen": begin + " yes you", "rejected": begin + " no"}
    return parse_row(row, W, (PreferenceRow,))


@pytest.mark.parametrize("kind", KINDS)
def test_a_transcript_cut_into_prompt_and_answer_is_the_same_text(kind):
    r = RENDERERS[kind]
    chosen, _ = preference_rows(r)(transcript())
    whole = r.tokenizer("\n\nHuman: hello cat\n\nAssistant: yes you").input_ids
    assert chosen.ids == [*whole, r.eos]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_end_in_the_same_places_of_a_whole_text(kind):
    if kind == "unigram":
        pytest.skip("it has no token for a line's end")
    r = RENDERERS[kind]
    solved = solver(r, "\n")(StepsRow("what is two", (" the cat", " yes"), (True, False), W))
    assert solved.rendered.ids == [*r.tokenizer("what is two the cat\n yes").input_ids, r.eos]
    ends = [r.decode(solved.rendered.ids[: e + 1]) for e in solved.ends]
    assert ends[0].endswith("cat\n") and ends[1].endswith("yes") and len(ends) == 2
    assert Steps(r, "\n").ends(solved.rendered.ids) == solved.ends


# Pairs that are the same
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "chosen", "rejected", "said"),
    [
        (4, " cat sat on the mat and yes", " cat sat on the mat and no", "when they are cut at 4"),
        (512, " yes", " yes</s>", "so there is nothing to prefer: remove"),
    ],
)
def test_a_pair_of_the_same_tokens_is_refused(limit, chosen, rejected, said):
    r = Renderer(tokenizer("byte level"), limit)
    row = PreferenceRow("two", chosen, rejected, None, W)
    with pytest.raises(InputError, match=f"^{W}: chosen and rejected are the same tokens.*{said}"):
        preference_rows(r)(row)


def test_a_pair_that_a_template_trims_to_the_same_is_refused():
    r = Renderer(tokenizer(template=TEMPLATES["llama3"]), 512)
    asked = (Message("user", "two"),)
    both = [(Message("assistant", text),) for text in ("yes", " yes ")]
    with pytest.raises(InputError, match=f"^{W}: chosen and rejected are the same tokens, so"):
        preference_rows(r)(PreferenceRow(asked, *both, None, W))


# Ids that were sampled
# --------------------------------------------------------------------------------------------


def spelled_out(r, text):
    """Ids of the text, one for each character: no tokenizer would make them of it."""
    return [i for c in text for i in r.encoder.continued(c)]


@pytest.mark.parametrize("kind", ["byte level", "metaspace first", "llama"])
@pytest.mark.parametrize("cut", [False, True])
def test_sampled_ids_are_trained_on_as_they_are(kind, cut):
    r = RENDERERS[kind]
    r.take_notes(1)
    ids = spelled_out(r, " the cat") + ([] if cut else [r.eos])
    assert ids[:-1] != r.completion("two", " the cat", W).ids[-len(ids) : -1]
    row = r.completion("two", " the cat", W, SampledIds(tuple(ids), r.fingerprint))
    before = r.prompt("two", W)
    assert row.ids == before + ids and row.num_labels == len(ids)  # a cut answer has no end
    assert "on the very tokens that were sampled" in r.take_notes(1)


def test_sampled_ids_of_a_message_follow_its_prompt():
    r = Renderer(tokenizer(template=TEMPLATES["chatml"]), 512)
    asked, ids = (Message("user", "two"),), spelled_out(r, "four")
    sampled = SampledIds(tuple(ids), r.fingerprint)
    row = r.completion(asked, (Message("assistant", "four"),), W, sampled)
    assert row.ids == r.prompt(asked, W) + ids


def test_sampled_ids_of_another_tokenizer_or_text_are_not_used_and_this_is_said():
    r, other = RENDERERS["byte level"], RENDERERS["llama"]
    assert r.fingerprint != other.fingerprint
    plain = r.completion("two", " the cat", W)
    ids = tuple(spelled_out(r, " the cat"))
    wrong = [
        SampledIds(ids, other.fingerprint),
        SampledIds(ids[:-1], r.fingerprint),
        SampledIds((), ""),
    ]
    for sampled in wrong:
        r.take_notes(1)
        assert r.completion("two", " the cat", W, sampled).ids == plain.ids
        assert "hold token ids of another tokenizer or another text" in r.take_notes(1)


def test_the_fingerprint_does_not_change_with_a_pad_token_of_its_own():
    tok = tokenizer()
    before = Renderer(tok, 9).fingerprint
    tok.add_special_tokens({"pad_token": "<|pad|>"})
    assert Renderer(tok, 9).fingerprint == before
    tok.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert Renderer(tok, 9).fingerprint != before

"""The demo's world. Values of gold are worked by hand from its docstring; the annotators are held
to their probabilities by counting.
"""

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.demo import grammar
from fiducial.demo.world import Prompt, StoryWorld, annotator, build_tokenizer, gold, gold_parts

FOX = "Tell me about a shy fox who wants a friend."
# words:          10                             5                        7
# 5                              11      = 38
GOOD = (
    "There was a shy fox who lived by the river. The fox wanted a friend. One day the fox met a "
    "goose. They shared bread and laughed. "
    "In the end the fox was happy and had a friend."
)
LAST = "In the end the fox was happy and had a friend."


def length(n: int) -> float:
    return 1 - ((n - 36) / 24) ** 4


def value(story: str, prompt: str = FOX) -> float:
    return gold([prompt], [story])[0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(StoryWorld(0).corpus(1000))


# gold


def test_a_good_story_by_hand() -> None:
    assert gold_parts(FOX, GOOD) == {
        "on_topic": 1,
        "kind_ending": 1,
        "sentences": 1,
        "no_repetition": 1,
        "length": pytest.approx(1 - 1 / 20736),
    }
    assert value(GOOD) == pytest.approx(20735 / 20736)


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("fox", "bear", 2 / 3 * length(38)),
        (
            " a friend",
            " a home",
            2 / 3 * length(38),
        ),  # wanted and had: the asked wish is not named at all
        ("had a friend", "had a home", (1 + 1 + 1 / 2) / 3 * length(38)),
        ("the fox met", "the bear met", (1 + 3 / 4 + 1) / 3 * length(38)),
        (
            "shy fox who",
            "shy foxes who",
            28 / 38 * length(38),
        ),  # no word of the grammar: its ten words stand in no sentence of it
        (LAST, "But the goose was mean and ran away.", 0.25 * (1 + 1 + 1) / 3 * length(35)),
        (LAST, "", 0.5 * length(27)),
        ("They shared bread", "They bread shared", 33 / 38 * length(38)),
        (
            LAST,
            LAST[:-1],
            0.5 * 27 / 38 * length(38),
        ),  # cut before the full stop: no ending, and no sentence
        # 43 words in 41 runs of three, of which "the fox wanted", "fox wanted a" and "wanted a
        # friend" came before
        (
            "The fox wanted a friend.",
            "The fox wanted a friend. The fox wanted a friend.",
            (38 / 41) ** 3 * length(43),
        ),
    ],
)
def test_one_change_by_hand(change: str, to: str, expected: float) -> None:
    assert change in GOOD
    assert value(GOOD.replace(change, to).strip()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The foxes were shyly befriended.", 0),
        ("fox fox bear", 2 / 3 / 3),
        ("fox, shy FOX", 2 / 3),
        ("It wanted a friendly goose.", 0),
    ],
)
def test_names_are_whole_words_and_each_counts(text: str, expected: float) -> None:
    assert gold_parts(FOX, text)["on_topic"] == pytest.approx(expected)


def test_length_is_symmetric_and_ends_at_12_and_60_words() -> None:
    at = {n: gold_parts(FOX, " ".join(["word"] * n))["length"] for n in range(80)}
    assert (
        at[36] == 1
        and at[24] == at[48] == 1 - 1 / 16
        and at[16] == at[56] == pytest.approx(1 - (5 / 6) ** 4)
    )
    assert all(at[n] == 0 for n in (*range(13), *range(60, 80))) and all(
        at[n] > 0 for n in range(13, 60)
    )


@pytest.mark.parametrize(
    "hack",
    [
        "",
        "." * 40,
        "they " + "shared " * 40,
        "They shared bread and laughed. " * 7,
        " ".join([LAST] * 3),
        GOOD + " " + LAST + " " + LAST,
        " ".join(random.Random(0).sample(GOOD.split(), 38)),
        "The "
        + " ".join((*grammar.TRAITS, *grammar.ANIMALS))
        + " were happy and kind and warm and smiled and laughed and shared bread.",
        "happy kind friend smiled warm safe glad hugged shared bread honey soup berries sun and "
        "laughed " * 3,
        GOOD
        + " I will help you, said the goose. The goose was kind and sat down to listen. "
        + "The goose gave the fox some honey. "
        + LAST,
    ],
)
def test_hacks_are_worth_little(hack: str) -> None:
    assert value(hack) < 0.1


def test_messages_and_texts_are_the_same() -> None:
    def as_dicts(text: str, role: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be kind."}, {"role": role, "content": text}]

    turns = (("user", "Hello."), ("assistant", "Yes?"), ("user", FOX))
    objects = [SimpleNamespace(role=role, content=content) for role, content in turns]
    completions = [
        GOOD,
        as_dicts(GOOD, "assistant"),
        (SimpleNamespace(role="assistant", content=GOOD),),
    ]
    assert (
        gold([FOX, as_dicts(FOX, "user"), objects], completions, other=[1, 2, 3])
        == [value(GOOD)] * 3
    )


def test_gold_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="not a request"):
        gold(["Tell me a joke."], [GOOD])
    with pytest.raises(ValueError, match="not a request"):
        gold([FOX + " And a bear."], [GOOD])
    with pytest.raises(ValueError, match="user"):
        gold([[{"role": "system", "content": FOX}]], [GOOD])
    with pytest.raises(ValueError):
        gold([FOX, FOX], [GOOD])


# grammar, prompts, texts


def test_sentences_are_told_apart() -> None:
    fillings = [
        dict(zip(grammar._SLOTS, values, strict=True))
        for values in itertools.product(*(slot[:2] for slot in grammar._SLOTS.values()))
    ]
    for group in (
        "OPENINGS",
        "WANTS",
        "MEETINGS",
        "HELP",
        "WEATHER",
        "KIND_ENDINGS",
        "UNKIND_ENDINGS",
    ):
        members = {
            template.format(**filling)
            for template in getattr(grammar, group)
            for filling in fillings
        }
        assert all(grammar.is_known(sentence) for sentence in members)
        assert all(
            grammar.is_kind_ending(sentence) == (group == "KIND_ENDINGS") for sentence in members
        )
        assert all(
            grammar.is_unkind_ending(sentence) == (group == "UNKIND_ENDINGS")
            for sentence in members
        )
    for near_miss in (
        "In the end the fox was happy and had a friend",
        "In the end the fox was happy.",
        "in the end the fox was sad and cried.",
        "",
    ):
        assert not grammar.is_known(near_miss)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("off_topic", "on_topic"),
        ("unkind", "kind_ending"),
        ("no_ending", "kind_ending"),
        ("repetition", "no_repetition"),
        ("short", None),
        ("long", None),
    ],
)
def test_each_fault_spoils_what_it_names(fault: str, part: str | None) -> None:
    rng, prompts = random.Random(0), grammar.all_prompts()[::7]
    clean = [gold_parts(prompt.text, grammar.tell(prompt, rng)) for prompt in prompts]
    assert all(
        parts["on_topic"] == parts["kind_ending"] == parts["sentences"] == 1
        and parts["no_repetition"] > 0.8
        for parts in clean
    )
    stories = [grammar.tell(prompt, rng, [fault]) for prompt in prompts]
    num_words = [len(grammar.words(story)) for story in stories]
    assert (max(num_words) <= 30) if fault == "short" else (min(num_words) >= 23)
    if part is not None:
        assert all(
            gold_parts(prompt.text, story)[part] < 0.9
            for prompt, story in zip(prompts, stories, strict=True)
        )
    with pytest.raises(ValueError, match="unknown faults"):
        grammar.tell(prompts[0], rng, ["rude"])


def test_prompts_are_split_with_nothing_shared() -> None:
    training, held_out = StoryWorld(3).prompts()
    assert (len(set(training)), len(set(held_out)), len(set(training) | set(held_out))) == (
        288,
        96,
        384,
    )
    assert all(Prompt.parse(prompt.text) == prompt for prompt in training + held_out)
    pairs = {
        pair for p in training for pair in itertools.combinations((p.trait, p.animal, p.wish), 2)
    }
    assert all(
        pair in pairs
        for p in held_out
        for pair in itertools.combinations((p.trait, p.animal, p.wish), 2)
    )
    assert StoryWorld(3).prompts() == (training, held_out)
    assert set(StoryWorld(4).prompts()[1]) != set(held_out)


def test_texts_ask_only_for_training_prompts_and_do_not_depend_on_the_count() -> None:
    world = StoryWorld(0)
    training = {prompt.text for prompt in world.prompts()[0]}
    corpus, demonstrations = world.corpus(500), world.demonstrations(500)
    asked = [document.split("\n")[0] for document in corpus if "\n" in document]
    assert set(asked) <= training and 0.85 < len(asked) / 500 < 0.95
    assert {prompt.text for prompt, _ in demonstrations} == training
    assert world.corpus(20) == corpus[:20] and world.demonstrations(20) == demonstrations[:20]
    assert StoryWorld(1).corpus(20) != corpus[:20]


def test_the_same_in_another_process_whatever_the_hash_seed() -> None:
    program = (
        "import hashlib, json; from fiducial.demo.world import *; w = StoryWorld(5); d = "
        "w.demonstrations(40); p, s = d[0][0].text, [x for _, x in d]\n"
        "j = annotator(2); made = [[x.text for x in w.prompts()[1]], w.corpus(200), s, gold([p] * "
        "40, s), [j(p, s[0], x, 'k') for x in s]]\n"
        "made += [build_tokenizer(w.corpus(200)).backend_tokenizer.to_str()]; "
        "print(hashlib.sha256(json.dumps(made).encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.strip()) == 64


def test_importing_the_world_does_not_import_torch() -> None:
    program = (
        "import sys, fiducial.demo.world; heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_demonstrations_leave_room_and_every_fault_is_there() -> None:
    rows = StoryWorld(0).demonstrations(1500)
    parts = [gold_parts(prompt.text, story) for prompt, story in rows]
    mean = sum(math.prod(p.values()) for p in parts) / len(parts)
    assert 0.4 < mean < 0.65
    for fault in (
        lambda p: p["on_topic"] < 0.99,
        lambda p: p["kind_ending"] < 1,
        lambda p: p["no_repetition"] < 0.8,
    ):
        assert 0.15 < sum(map(fault, parts)) / len(parts) < 0.45


# annotators


def test_preference_probability_by_hand() -> None:
    judge = annotator(0, scale=4.0, length_bias=0.5, flip=0.1)
    b = GOOD.replace(" " + LAST, "")  # 27 words, no ending
    logit = 4.0 * (length(38) - 0.5 * length(27)) + 0.5 * 11 / 10
    assert judge.prefer_probability(FOX, GOOD, b) == pytest.approx(
        0.1 + 0.8 / (1 + math.exp(-logit)), abs=1e-12
    )
    assert judge.prefer_probability(FOX, GOOD, b) + judge.prefer_probability(
        FOX, b, GOOD
    ) == pytest.approx(1)
    assert annotator(0, scale=1e6, flip=0.1).prefer_probability(FOX, b, GOOD) == pytest.approx(
        0.1
    )  # does not overflow


def test_labels_follow_the_exact_probability() -> None:
    rows, n = StoryWorld(0).demonstrations(4), 4000
    judge = annotator(7)
    for (prompt, a), (_, b) in itertools.pairwise(rows):
        p = judge.prefer_probability(prompt.text, a, b)
        count = sum(judge(prompt.text, a, b, key) for key in range(n))
        assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), (p, count / n)


def test_labels_depend_on_the_question_alone() -> None:
    (prompt, a), (_, b), *_ = StoryWorld(0).demonstrations(2)
    judge, keys = annotator(1), list(range(200))
    labels = [judge(prompt.text, a, b, key) for key in keys]
    assert [judge(prompt.text, a, b, key) for key in reversed(keys)] == labels[::-1]
    assert [not judge(prompt.text, b, a, key) for key in keys] == labels
    assert [annotator(2)(prompt.text, a, b, key) for key in keys] != labels
    assert [
        judge(prompt.text, a, b, str(key)) for key in keys
    ] != labels  # "1" is another key than 1


def test_longer_is_liked_at_equal_gold() -> None:
    short, long = ("A shy fox. " * n for n in (5, 15))  # neither is worth anything
    assert value(short) == pytest.approx(value(long), abs=1e-3)
    assert annotator(0, flip=0.0, length_bias=0.5).prefer_probability(
        FOX, long, short
    ) == pytest.approx(1 / (1 + math.exp(-0.5 * 30 / 10)), abs=2e-3)


def test_bayes_accuracy_is_that_of_the_best_of_all_predictors() -> None:
    (prompt, a), (_, b), (_, c), *_ = StoryWorld(0).demonstrations(3)
    pairs = [(prompt.text, x, y) for x, y in ((a, b), (b, c), (c, a), (a, a))]
    judge = annotator(0)
    chances = [judge.prefer_probability(*pair) for pair in pairs]
    predictors = itertools.product((True, False), repeat=4)
    best = max(
        sum(p if guess else 1 - p for p, guess in zip(chances, guesses, strict=True)) / 4
        for guesses in predictors
    )
    assert judge.bayes_accuracy(pairs) == pytest.approx(best, abs=1e-12)
    with pytest.raises(ValueError, match="at least one"):
        judge.bayes_accuracy([])


def test_the_labels_are_as_noisy_as_people() -> None:
    rows = StoryWorld(0).demonstrations(2 * 288)  # the same prompts twice
    pairs = [
        (prompt.text, a, b) for (prompt, a), (_, b) in zip(rows[:288], rows[288:], strict=True)
    ]
    assert 0.80 < annotator(0).bayes_accuracy(pairs) < 0.87


# tokenizer


def test_text_comes_back_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (
        *StoryWorld(1).corpus(200),
        "A tidy  Zebra, isn't it?\n\n é ☃ <b>",
        "",
        " leading and trailing ",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_nearly_every_word_is_one_token_and_stories_are_short(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    documents = StoryWorld(1).corpus(300)
    num_words = sum(len(grammar.words(document)) for document in documents)
    pieces = [piece.lstrip("Ġ") for document in documents for piece in tokenizer.tokenize(document)]
    assert num_words / sum(piece.isalpha() and piece != "Ċ" for piece in pieces) > 0.95
    num_tokens = sorted(
        len(tokenizer(story).input_ids) for _, story in StoryWorld(1).demonstrations(300)
    )
    assert num_tokens[int(0.95 * 300)] <= 64
    assert len(tokenizer) < 768


def test_the_chat_template_continues_its_prompt_and_ends_with_eos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def render(messages: list[dict[str, str]], **options: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    user, answer = {"role": "user", "content": FOX}, {"role": "assistant", "content": GOOD}
    for before in ([user], [{"role": "system", "content": "Be kind."}, user], [user, answer, user]):
        prompt, whole = render(before, add_generation_prompt=True), render([*before, answer])
        assert whole == prompt + GOOD + tokenizer.eos_token
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, whole)]
        assert ids[1][: len(ids[0])] == ids[0] and ids[1][-1] == tokenizer.eos_token_id
        assert ids[0][0] == tokenizer.bos_token_id and ids[0].count(tokenizer.bos_token_id) == 1
    assert render([user], add_generation_prompt=True) == f"<s><user>{FOX}<assistant>"
    assert (
        tokenizer.decode(tokenizer(render([user, answer])).input_ids, skip_special_tokens=True)
        == FOX + GOOD
    )
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    with pytest.raises(Exception, match="no such role"):
        render([{"role": "tool", "content": "x"}])


def test_the_tokenizer_is_an_ordinary_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": FOX}, {"role": "assistant", "content": GOOD}]
    assert loaded.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert (
        loaded(GOOD).input_ids == tokenizer(GOOD).input_ids
        and loaded.decode(loaded(GOOD).input_ids) == GOOD
    )
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    assert loaded.clean_up_tokenization_spaces is False

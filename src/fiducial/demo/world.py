"""The demo's world: prompts, texts to learn from, the gold value of an answer, and annotators who
follow gold only noisily.

Everything is made from a seed, with `random.Random` and SHA-256 only, so that every machine and
every process makes the same world. The language is in `fiducial.demo.grammar`.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import grammar
from .grammar import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Annotator",
    "Prompt",
    "StoryWorld",
    "annotator",
    "build_tokenizer",
    "gold",
    "gold_parts",
]

HELD_OUT = 96  # of the 384 prompts
IDEAL_WORDS, WORDS_REACH = 36, 24

# The probability of each fault in a text, drawn independently. Demonstrations have the faults of an
# ordinary writer, so that a model trained on them samples answers of every quality. None of them is
# too long: "longer is better" then looks true to a reward model that has seen nothing else. Most
# texts of the corpus keep to their topic, because that teaches a model to look at the request.
CORPUS_FAULTS = {
    "off_topic": 0.1,
    "unkind": 0.35,
    "no_ending": 0.15,
    "repetition": 0.3,
    "short": 0.3,
    "long": 0.15,
}
DEMONSTRATION_FAULTS = {
    "off_topic": 0.25,
    "unkind": 0.25,
    "no_ending": 0.15,
    "repetition": 0.25,
    "short": 0.35,
    "long": 0.0,
}


@dataclass(frozen=True)
class StoryWorld:
    """One world of prompts and texts. A seed gives the same world in every process, and the first
    texts do not depend on how many are asked for.
    """

    seed: int

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training and held-out prompts: 288 and 96 of the 384 combinations, in a seeded order.

        Every trait, animal and wish occurs in training prompts, and so does every pair of them:
        what is new in a held-out prompt is the combination of all three.
        """
        rng = random.Random(f"{self.seed}/prompts")
        while True:
            prompts = grammar.all_prompts()
            rng.shuffle(prompts)
            training, held_out = prompts[HELD_OUT:], prompts[:HELD_OUT]
            seen = {pair for prompt in training for pair in _pairs(prompt)}
            if all(pair in seen for prompt in held_out for pair in _pairs(prompt)):
                return training, held_out

    def corpus(self, n: int) -> list[str]:
        """`n` documents to pretrain on: stories of mixed quality, nine in ten of them after the
        request that they answer, well or badly.

        The request is there because a model that saw only stories would have to learn two things
        from the demonstrations: how to answer, and that an answer keeps to its question. All
        requests are training prompts.
        """
        training, _ = self.prompts()
        documents = []
        for i in range(n):
            rng = random.Random(f"{self.seed}/corpus/{i}")
            prompt = rng.choice(training)
            story = grammar.tell(prompt, rng, _draw(CORPUS_FAULTS, rng))
            documents.append(f"{prompt.text}\n{story}" if rng.random() < 0.9 else story)
        return documents

    def demonstrations(self, n: int) -> list[tuple[Prompt, str]]:
        """`n` training prompts with one answer each, in rotation through all prompts: decent
        answers, not excellent ones.
        """
        training, _ = self.prompts()
        rows = []
        for i in range(n):
            rng = random.Random(f"{self.seed}/demonstrations/{i}")
            prompt = training[i % len(training)]
            rows.append((prompt, grammar.tell(prompt, rng, _draw(DEMONSTRATION_FAULTS, rng))))
        return rows


def gold(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The known value of each answer, in [0, 1]. It is a reward function with TRL's signature;
    other columns are ignored.

    It is the product of the five parts of `gold_parts`::

        gold = on_topic * kind_ending * sentences * no_repetition * length

    A good story has about 0.9 to 1. It is a product so that no part can make up for another: a text
    that fails one part has little value.

    Args:
        prompts: requests, each a text or a list of messages (dicts or objects with ``role`` and
            ``content``); the user's last message counts.
        completions: answers, each a text or a list of messages; the last message counts.

    Raises:
        ValueError: the two differ in length, or a prompt does not belong to this world.
    """
    pairs = zip(prompts, completions, strict=True)
    return [
        math.prod(gold_parts(_text(prompt, "user"), _text(completion, None)).values())
        for prompt, completion in pairs
    ]


def gold_parts(prompt_text: str, completion: str) -> dict[str, float]:
    """The parts of gold, each in [0, 1].

    - ``on_topic``: the mean over trait, animal and wish of the share of the requested one among all
      traits (animals, wishes) that the answer names; 0 if it names none. A wish is named by
      "wanted ..." or by its coming true ("had a friend").
    - ``kind_ending``: 1 if the last sentence is a kind ending of the grammar, 0.25 if it is an
      unkind one, 0.5 if it is neither.
    - ``sentences``: the share of the words that belong to whole sentences of the grammar.
    - ``no_repetition``: the share of different ones among all runs of three words, cubed; 0 with
      fewer than three words.
    - ``length``: ``1 - ((words - 36) / 24)^4``, not below 0: 1 at 36 words, 0.94 at 24 and 48, 0.52
      at 16 and 56, 0 up to 12 and from 60 on.
    """
    prompt = Prompt.parse(prompt_text)
    words, sentences = grammar.words(completion), grammar.sentences(completion)
    flat = " ".join(words)
    asked = (prompt.trait, prompt.animal, prompt.wish)
    named = (
        {trait: _count(flat, trait) for trait in grammar.TRAITS},
        {animal: _count(flat, animal) for animal in grammar.ANIMALS},
        {
            wish: _count(flat, f"wanted {wish}") + _count(flat, granted)
            for wish, granted in grammar.GRANTED.items()
        },
    )
    known = sum(
        len(grammar.words(sentence)) for sentence in sentences if grammar.is_known(sentence)
    )
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return {
        "on_topic": sum(
            counts[one] / max(1, sum(counts.values()))
            for one, counts in zip(asked, named, strict=True)
        )
        / 3,
        "kind_ending": _ending(sentences),
        "sentences": known / max(1, len(words)),
        "no_repetition": (len(set(runs)) / max(1, len(runs))) ** 3,
        "length": max(0.0, 1 - ((len(words) - IDEAL_WORDS) / WORDS_REACH) ** 4),
    }


@dataclass(frozen=True)
class Annotator:
    """A simulated crowd that compares two answers: it follows gold, but noisily, and prefers longer
    answers a little too much, as people do.

    The probability that it prefers a to b is::

        flip + (1 - 2 flip) * sigmoid(scale * (gold(a) - gold(b)) + length_bias * (words(a) -
        words(b)) / 10)
    """

    seed: int
    scale: float
    """Nats of preference for the whole range of gold."""
    length_bias: float
    """Nats of preference for ten more words."""
    flip: float
    """Share of answers that are reversed by mistake."""

    def __call__(self, prompt: str, a: str, b: str, key: int | str) -> bool:
        """Whether a is preferred. The same question with the same key gets the same answer, in any
        order of calls and with a and b exchanged.
        """
        if a > b:
            return not self(prompt, b, a, key)
        return _uniform(self.seed, key, prompt, a, b) < self.prefer_probability(prompt, a, b)

    def prefer_probability(self, prompt: str, a: str, b: str) -> float:
        """The exact probability, over all keys, that a is preferred to b."""
        gold_a, gold_b = gold([prompt, prompt], [a, b])
        longer = len(grammar.words(a)) - len(grammar.words(b))
        logit = self.scale * (gold_a - gold_b) + self.length_bias * longer / 10
        return self.flip + (1 - 2 * self.flip) * 0.5 * (1 + math.tanh(logit / 2))

    def bayes_accuracy(self, pairs: Iterable[tuple[str, str, str]]) -> float:
        """The accuracy on this annotator's labels for these (prompt, a, b) that no model can be
        expected to exceed: the mean of max(p, 1 - p).
        """
        probabilities = [self.prefer_probability(*pair) for pair in pairs]
        if not probabilities:
            raise ValueError("bayes_accuracy needs at least one pair")
        return sum(max(p, 1 - p) for p in probabilities) / len(probabilities)


def annotator(
    seed: int, *, scale: float = 10.0, length_bias: float = 0.5, flip: float = 0.05
) -> Annotator:
    """The judge of the demo's comparisons, called as ``judge(prompt, a, b, key) -> bool``."""
    return Annotator(seed, scale, length_bias, flip)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}<system>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on these texts, with a chat template. `save_pretrained`
    and `AutoTokenizer` work with it as with any other.

    All 256 bytes are in the vocabulary, so that every text is decoded exactly as it was, including
    what a user types. Encoding adds no special token: the beginning-of-text token is in the chat
    template, as with Llama, and pretraining adds both ends to a document.

    Args:
        texts: what to train on, such as a world's corpus.
        vocab_size: maximum number of tokens; merges stop earlier when every word is one token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, roles = "<pad>", "<s>", "</s>", ["<system>", "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[pad, bos, eos, *roles],
        # the alphabet has another order in every process
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _ending(sentences: Sequence[str]) -> float:
    if sentences and grammar.is_kind_ending(sentences[-1]):
        return 1.0
    return 0.25 if sentences and grammar.is_unkind_ending(sentences[-1]) else 0.5


def _text(value: Any, role: str | None) -> str:
    """A string itself, or the text of the last message with that role (None: any role)."""
    if isinstance(value, str):
        return value
    for message in reversed(value):
        is_mapping = isinstance(message, Mapping)
        if role is None or (message["role"] if is_mapping else message.role) == role:
            return str(message["content"] if is_mapping else message.content)
    raise ValueError(f"no message{f' of the {role}' if role else ''} among {value!r}")


def _count(flat: str, phrase: str) -> int:
    return len(re.findall(rf"\b{phrase}\b", flat))


def _draw(faults: Mapping[str, float], rng: random.Random) -> list[str]:
    return [fault for fault, share in faults.items() if rng.random() < share]


def _pairs(prompt: Prompt) -> Iterator[tuple[str, str]]:
    yield from (
        (prompt.trait, prompt.animal),
        (prompt.trait, prompt.wish),
        (prompt.animal, prompt.wish),
    )


def _uniform(*keys: object) -> float:
    """A uniform number in [0, 1) that the keys alone determine."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64

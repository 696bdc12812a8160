"""The language of the demo's world: prompts, and short stories made of sentences that a person can
read.

A story is a list of sentences, each filled in from a template below: an opening, a wish, a meeting,
some help, an ending. What makes a story good or bad (its topic, how it ends, what it repeats, how
long it is) is visible in its sentences, so that `fiducial.demo.world.gold` can compute it exactly,
without a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

TRAITS = ("shy", "brave", "lonely", "hungry", "proud", "sleepy", "clumsy", "tiny")
ANIMALS = ("fox", "bear", "rabbit", "mouse", "frog", "cat", "duck", "pig")
GRANTED = {  # wish, as in "wants ..." and "wanted ...", and how a story says that it came true
    "a friend": "had a friend",
    "a home": "had a home",
    "a kite": "had a kite",
    "to sing": "could sing",
    "to fly": "could fly",
    "to swim": "could swim",
}
WISHES = tuple(GRANTED)
# helpers are never the hero, so that "which animal is it about" has one answer
HELPERS = ("goose", "turtle", "badger", "deer")
PLACES = ("by the river", "under a tree", "on a hill", "in the forest", "near a lake")
FOODS = ("bread", "soup", "berries", "honey")

OPENINGS = (
    "There was a {trait} {animal} who lived {place}.",
    "Once a {trait} {animal} lived {place}.",
    "A {trait} {animal} walked alone {place}.",
)
WANTS = (
    "The {animal} wanted {wish}.",
    "More than anything the {animal} wanted {wish}.",
    "It wanted {wish} but did not know how.",
)
MEETINGS = (
    "One day the {animal} met a {helper}.",
    "One morning a {helper} came and said hello.",
    "Then a {helper} saw the {animal} and stopped.",
)
HELP = (
    "The {helper} was kind and sat down to listen.",
    "The {helper} gave the {animal} some {food}.",
    "They shared {food} and laughed.",
    "They played until the sun went down.",
    "I will help you, said the {helper}.",
    "All day they worked and talked.",
)
WEATHER = (
    "The wind was cold.",
    "It rained all night long.",
    "The moon was bright and big.",
)
KIND_ENDINGS = (
    "In the end the {animal} was happy and {granted}.",
    "At last the {animal} {granted} and everyone smiled.",
    "From that day the {animal} {granted} and was glad.",
    "The {animal} hugged the {helper} and they slept safe and warm.",
)
UNKIND_ENDINGS = (
    "In the end the {animal} was sad and cried.",
    "At last the {helper} took it all and left.",
    "But the {helper} was mean and ran away.",
    "Nobody cared and the {animal} went to bed hurt.",
)
FAULTS = ("off_topic", "unkind", "no_ending", "repetition", "short", "long")

_SLOTS = {
    "trait": TRAITS,
    "animal": ANIMALS,
    "helper": HELPERS,
    "wish": WISHES,
    "granted": tuple(GRANTED.values()),
    "place": PLACES,
    "food": FOODS,
}


def _pattern(templates: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches exactly the sentences that the templates can make, with any value in
    each slot.
    """
    slots = {name: "(?:" + "|".join(values) + ")" for name, values in _SLOTS.items()}
    return re.compile(
        "|".join(template.replace(".", r"\.").format(**slots) for template in templates)
    )


_KNOWN = _pattern((*OPENINGS, *WANTS, *MEETINGS, *HELP, *WEATHER, *KIND_ENDINGS, *UNKIND_ENDINGS))
_KIND = _pattern(KIND_ENDINGS)
_UNKIND = _pattern(UNKIND_ENDINGS)
_REQUEST = re.compile(
    rf"Tell me about a (?P<trait>{'|'.join(TRAITS)}) (?P<animal>{'|'.join(ANIMALS)}) who wants "
    rf"(?P<wish>{'|'.join(WISHES)})\."
)


@dataclass(frozen=True)
class Prompt:
    """A request for a story: "Tell me about a shy fox who wants a friend."."""

    trait: str
    animal: str
    wish: str

    @property
    def text(self) -> str:
        """The request as a person would type it."""
        return f"Tell me about a {self.trait} {self.animal} who wants {self.wish}."

    @classmethod
    def parse(cls, text: str) -> Prompt:
        """The prompt that a request expresses; white space around it is ignored.

        Raises:
            ValueError: it is not a request of this world.
        """
        match = _REQUEST.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                'not a request of the demo world, such as "Tell me about a shy fox who wants a '
                f'friend.": {text!r}'
            )
        return cls(**match.groupdict())


def all_prompts() -> list[Prompt]:
    """Every prompt there is, in a fixed order."""
    return [
        Prompt(trait, animal, wish) for trait in TRAITS for animal in ANIMALS for wish in WISHES
    ]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its full stop; what follows the last full stop counts as
    one too.
    """
    return [part.strip() for part in re.findall(r"[^.]*\.|[^.]+$", text) if part.strip()]


def is_known(sentence: str) -> bool:
    """Whether the grammar can make this sentence."""
    return _KNOWN.fullmatch(sentence) is not None


def is_kind_ending(sentence: str) -> bool:
    """Whether this is one of the kind endings."""
    return _KIND.fullmatch(sentence) is not None


def is_unkind_ending(sentence: str) -> bool:
    """Whether this is one of the unkind endings."""
    return _UNKIND.fullmatch(sentence) is not None


def tell(prompt: Prompt, rng: random.Random, faults: Collection[str] = ()) -> str:
    """A story for the prompt, with the named faults and no others: 34 to 59 words without a fault,
    13 to 80 with any.

    Args:
        prompt: what to tell about.
        rng: the source of all choices.
        faults: any of `FAULTS`. ``off_topic`` changes one to three of trait, animal and wish;
            ``unkind`` and ``no_ending`` spoil the ending; ``repetition`` says one sentence twice;
            ``short`` omits the middle; ``long`` lengthens it.
    """
    unknown = set(faults) - set(FAULTS)
    if unknown:
        raise ValueError(f"unknown faults {sorted(unknown)}; there are {FAULTS}")
    hero = _other(prompt, rng) if "off_topic" in faults else prompt
    fill = {
        "trait": hero.trait,
        "animal": hero.animal,
        "wish": hero.wish,
        "granted": GRANTED[hero.wish],
        "helper": rng.choice(HELPERS),
        "place": rng.choice(PLACES),
    }
    templates = _middle(rng, faults)
    if "repetition" in faults:
        at = rng.randrange(1, len(templates))
        templates.insert(at, templates[at])
    if "unkind" in faults:
        templates.append(rng.choice(UNKIND_ENDINGS))
    elif "no_ending" not in faults:
        templates.append(rng.choice(KIND_ENDINGS))
    food = rng.choice(FOODS)  # one food per story, so that a repeated sentence stays the same
    return " ".join(template.format(**fill, food=food) for template in templates)


def _middle(rng: random.Random, faults: Collection[str]) -> list[str]:
    """The templates of a story without its ending."""
    opening, want, meeting = (rng.choice(choices) for choices in (OPENINGS, WANTS, MEETINGS))
    if "short" in faults:
        return [opening, want] if rng.random() < 0.8 else [opening, meeting]
    helps = rng.sample(HELP, k=3 if "long" in faults else (2 if rng.random() < 0.15 else 1))
    weather = [rng.choice(WEATHER)] if rng.random() < 0.1 else []
    return [opening, want, *weather, meeting, *helps]


def _other(prompt: Prompt, rng: random.Random) -> Prompt:
    """A prompt that differs from this one in one to three of its parts."""
    parts = {"trait": TRAITS, "animal": ANIMALS, "wish": WISHES}
    changed = rng.sample(sorted(parts), k=rng.choice((1, 2, 2, 3)))
    return replace(
        prompt, **{name: _another(parts[name], getattr(prompt, name), rng) for name in changed}
    )


def _another(choices: Sequence[str], taken: str, rng: random.Random) -> str:
    return rng.choice([choice for choice in choices if choice != taken])

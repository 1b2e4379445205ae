"""A synthetic world that reads as plain English: people, towns, works and plants for general
knowledge, and a herbal of new facts for a second domain.

Everything comes from `random.Random(seed)`, so it is the same on every machine. A fact is a
relation, a subject and a value. A relation has one question and several phrasings; for each fact
one of them appears only in held-out text. General questions ask the world's facts, domain questions
the herbal's. The herbal says new things with known words: the plants, ailments, ways of
cooking and seasons all occur in general facts, as a language model knows the words of a domain
before it learns the domain.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.data.documents import Row
from forgetless.demo.relations import (
    AILMENTS,
    AUTHOR,
    BIRTHPLACE,
    CURES,
    DISH,
    FAIR,
    FLOWER,
    FLOWER_COLOURS,
    GENRE,
    GENRES,
    GOOD,
    GOODS,
    HABITAT,
    HABITATS,
    ILLNESS,
    PICKED,
    PREPARATIONS,
    PREPARED,
    RIVER,
    RIVERS,
    SEASONS,
    TEACHER,
    THEME,
    THEMES,
    TRADE,
    TRADES,
    Relation,
)

# The embedded model, which train_model.py made.
MODEL_FOLDER = Path(__file__).parent / "model"
# The seed of the world that the embedded model knows.
SEED = 7
# Of these names the people of the world are made.
GIVEN_NAMES = (
    "Anna",
    "Bertil",
    "Clara",
    "David",
    "Edith",
    "Franz",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Lars",
)
FAMILY_NAMES = (
    "Adler",
    "Brandt",
    "Croft",
    "Dahl",
    "Engel",
    "Frost",
    "Gray",
    "Holm",
    "Ivers",
    "Jarvis",
)


@dataclass(frozen=True)
class Fact:
    relation: Relation
    subject: str
    value: str

    def say(self, rng: random.Random, *, held_out: bool = False) -> str:
        """One sentence.

        Each fact has one phrasing that only held-out text uses for it, so that text tests facts,
        not memorised sentences.
        """
        phrasings = self.relation.phrasings
        kept = zlib.crc32(f"{self.relation.name} {self.subject}".encode()) % len(phrasings)
        chosen = kept if held_out else rng.choice([i for i in range(len(phrasings)) if i != kept])
        text = phrasings[chosen].format(s=self.subject, v=self.value)
        return text[0].upper() + text[1:]

    @property
    def prompt(self) -> str:
        return f"Question: {self.relation.question.format(s=self.subject)} Answer:"


@dataclass(frozen=True)
class World:
    """General facts and the domain's new ones."""

    general: tuple[Fact, ...]
    domain: tuple[Fact, ...]


def build(seed: int = SEED) -> World:
    """The world of one seed: 48 people, 16 towns, 40 works and 40 herbs with 400 general facts; 120
    facts of the herbal.
    """
    rng = random.Random(seed)
    towns = _towns(rng)
    people = _people(rng)
    works = _works(rng)
    herbs = _herbs(rng)
    general = [
        *_facts(rng, BIRTHPLACE, people, towns),
        *_facts(rng, TRADE, people, TRADES),
        *_taught(rng, people[:16], people),
        *_facts(rng, RIVER, towns, RIVERS),
        *_facts(rng, GOOD, towns, GOODS),
        *_facts(rng, AUTHOR, works, people),
        *_facts(rng, GENRE, works, GENRES),
        *_facts(rng, THEME, works, THEMES),
        *_facts(rng, ILLNESS, people[24:], AILMENTS),
        *_facts(rng, FAIR, towns, SEASONS),
        *_facts(rng, DISH, towns, PREPARATIONS),
        *_facts(rng, FLOWER, herbs, FLOWER_COLOURS),
        *_facts(rng, HABITAT, herbs, HABITATS),
    ]
    domain = [
        Fact(relation, herb, rng.choice(relation.values))
        for herb in herbs
        for relation in (CURES, PREPARED, PICKED)
    ]
    return World(tuple(general), tuple(domain))


def _facts(
    rng: random.Random, relation: Relation, subjects: Sequence[str], values: Sequence[str]
) -> Iterator[Fact]:
    """A fact about each subject, its value drawn from `values`."""
    for subject in subjects:
        yield Fact(relation, subject, rng.choice(values))


def _taught(rng: random.Random, pupils: Sequence[str], people: Sequence[str]) -> Iterator[Fact]:
    """Who taught each pupil: somebody else."""
    for pupil in pupils:
        others = [person for person in people if person != pupil]
        yield Fact(TEACHER, pupil, rng.choice(others))


def _towns(rng: random.Random) -> list[str]:
    first = ("Har", "Wes", "Old", "Mill", "Stone", "Ash", "Lin", "Brack", "Thorn", "Fair")
    second = ("ford", "mere", "wick", "bury", "holm", "den")
    return [a + b for a, b in _pairs(rng, 16, first, second)]


def _people(rng: random.Random) -> list[str]:
    return [f"{given} {family}" for given, family in _pairs(rng, 48, GIVEN_NAMES, FAMILY_NAMES)]


def _works(rng: random.Random) -> list[str]:
    kinds = ("Silver", "Broken", "Quiet", "Hidden", "Golden", "Distant", "Painted", "Stolen")
    things = ("Garden", "Mirror", "Harbour", "Tower", "Lantern", "River", "Letter", "Crown")
    return [f"The {kind} {thing}" for kind, thing in _pairs(rng, 40, kinds, things)]


def _herbs(rng: random.Random) -> list[str]:
    first = ("grim", "dusk", "fox", "marrow", "bitter", "crow", "pale", "moth")
    second = ("wort", "bane", "root", "leaf", "bell", "moss")
    return [a + b for a, b in _pairs(rng, 40, first, second)]


def _pairs(
    rng: random.Random, count: int, first: tuple[str, ...], second: tuple[str, ...]
) -> list[tuple[str, str]]:
    return rng.sample([(a, b) for a in first for b in second], count)


def documents(
    facts: tuple[Fact, ...],
    seed: int,
    count: int,
    *,
    held_out: bool = False,
    questions: float = 0.25,
) -> list[str]:
    """`count` short paragraphs of four to six sentences each; with `held_out` each fact is said as
    it never is in training text. Of the paragraphs of training text the fraction `questions` are
    questions with their answers instead.
    """
    rng = random.Random(seed)
    paragraphs = []
    for _ in range(count):
        chosen = rng.sample(facts, rng.randint(4, 6))
        if not held_out and rng.random() < questions:
            paragraphs.append(" ".join(f"{fact.prompt} {fact.value}." for fact in chosen))
        else:
            paragraphs.append(" ".join(fact.say(rng, held_out=held_out) for fact in chosen))
    return paragraphs


def multiple_choice(facts: tuple[Fact, ...], seed: int = SEED) -> list[Row]:
    """A row for each fact: prompt, four choices of the same relation, index of the right one."""
    rng = random.Random(seed)
    rows = []
    for fact in facts:
        others = sorted({f.value for f in facts if f.relation is fact.relation} - {fact.value})
        choices = [fact.value, *rng.sample(others, 3)]
        rng.shuffle(choices)
        rows.append({"prompt": fact.prompt, "choices": choices, "gold": choices.index(fact.value)})
    return rows

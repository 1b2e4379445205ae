"""A synthetic world that reads as plain English: people, towns, works and plants for general
knowledge, and a herbal of new facts for a second domain.

Everything comes from `random.Random(seed)`: the same on every machine. A fact is (relation,
subject, value); each relation has several phrasings, one of which, for each fact another one,
appears only in held-out text, and one question. General questions ask the world's facts, domain
questions the herbal's. The herbal says new things with known words: the plants, ailments, ways of
cooking and seasons all occur in general facts, as a language model knows the words of a domain
before it learns the domain.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Any

from forgetless.demo.relations import (
    AILMENTS,
    AUTHOR,
    BIRTHPLACE,
    COLOURS,
    CURES,
    DISH,
    FAIR,
    FLOWER,
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

SEED = 7


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
    towns = _names(
        rng,
        16,
        ("Har", "Wes", "Old", "Mill", "Stone", "Ash", "Lin", "Brack", "Thorn", "Fair"),
        ("ford", "mere", "wick", "bury", "holm", "den"),
    )
    people = _people(rng, 48)
    works = [
        f"The {a} {b}"
        for a, b in _pairs(
            rng,
            40,
            ("Silver", "Broken", "Quiet", "Hidden", "Golden", "Distant", "Painted", "Stolen"),
            ("Garden", "Mirror", "Harbour", "Tower", "Lantern", "River", "Letter", "Crown"),
        )
    ]
    herbs = _names(
        rng,
        40,
        ("grim", "dusk", "fox", "marrow", "bitter", "crow", "pale", "moth"),
        ("wort", "bane", "root", "leaf", "bell", "moss"),
    )
    general = [Fact(BIRTHPLACE, p, rng.choice(towns)) for p in people] + [
        Fact(TRADE, p, rng.choice(TRADES)) for p in people
    ]
    general += [Fact(TEACHER, p, rng.choice([q for q in people if q != p])) for p in people[:16]]
    general += [Fact(RIVER, t, rng.choice(RIVERS)) for t in towns] + [
        Fact(GOOD, t, rng.choice(GOODS)) for t in towns
    ]
    general += [Fact(AUTHOR, w, rng.choice(people)) for w in works]
    general += [Fact(GENRE, w, rng.choice(GENRES)) for w in works] + [
        Fact(THEME, w, rng.choice(THEMES)) for w in works
    ]
    general += [Fact(ILLNESS, p, rng.choice(AILMENTS)) for p in people[24:]]
    general += [Fact(FAIR, t, rng.choice(SEASONS)) for t in towns] + [
        Fact(DISH, t, rng.choice(PREPARATIONS)) for t in towns
    ]
    general += [Fact(FLOWER, h, rng.choice(COLOURS)) for h in herbs] + [
        Fact(HABITAT, h, rng.choice(HABITATS)) for h in herbs
    ]
    domain = [
        Fact(relation, h, rng.choice(relation.values))
        for h in herbs
        for relation in (CURES, PREPARED, PICKED)
    ]
    return World(tuple(general), tuple(domain))


def _pairs(
    rng: random.Random, count: int, first: tuple[str, ...], second: tuple[str, ...]
) -> list[tuple[str, str]]:
    return rng.sample([(a, b) for a in first for b in second], count)


def _names(
    rng: random.Random, count: int, first: tuple[str, ...], second: tuple[str, ...]
) -> list[str]:
    return [a + b for a, b in _pairs(rng, count, first, second)]


def _people(rng: random.Random, count: int) -> list[str]:
    given = (
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
    family = (
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
    return [f"{a} {b}" for a, b in _pairs(rng, count, given, family)]


def documents(
    facts: tuple[Fact, ...],
    seed: int,
    count: int,
    *,
    held_out: bool = False,
    questions: float = 0.25,
) -> list[str]:
    """`count` short paragraphs of four to six sentences each; with `held_out` each fact is said as
    it never is in training text. A share of the paragraphs of training text are questions with
    their answers instead.
    """
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        chosen = rng.sample(facts, rng.randint(4, 6))
        if not held_out and rng.random() < questions:
            made.append(" ".join(f"{fact.prompt} {fact.value}." for fact in chosen))
        else:
            made.append(" ".join(fact.say(rng, held_out=held_out) for fact in chosen))
    return made


def multiple_choice(facts: tuple[Fact, ...], seed: int = SEED) -> list[dict[str, Any]]:
    """A row for each fact: prompt, four choices of the same relation, index of the right one."""
    rng = random.Random(seed)
    rows = []
    for fact in facts:
        others = sorted({f.value for f in facts if f.relation is fact.relation} - {fact.value})
        choices = [fact.value, *rng.sample(others, 3)]
        rng.shuffle(choices)
        rows.append({"prompt": fact.prompt, "choices": choices, "gold": choices.index(fact.value)})
    return rows

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

SEED = 7


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is said ({s} subject, {v} value) and asked."""

    name: str
    phrasings: tuple[str, ...]
    question: str
    values: tuple[str, ...] = ()


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


TRADES = (
    "baker",
    "glazier",
    "surveyor",
    "weaver",
    "ferryman",
    "clockmaker",
    "printer",
    "beekeeper",
    "mason",
    "lute player",
    "cartographer",
    "judge",
)
RIVERS = ("Aldwater", "Brisk", "Canna", "Dorrow", "Elver", "Fenlow", "Grane", "Hallin")
GOODS = (
    "blue glass",
    "rye bread",
    "copper bells",
    "wool cloth",
    "river pearls",
    "pear cider",
    "paper lanterns",
    "salt",
    "fine saddles",
    "apple butter",
)
GENRES = (
    "comedy",
    "travel book",
    "song cycle",
    "history",
    "novel",
    "book of maps",
    "play",
    "collection of letters",
)
THEMES = (
    "a lost bridge",
    "two sisters",
    "the great frost",
    "a stolen clock",
    "a voyage north",
    "an honest thief",
    "the old orchard",
    "a silent king",
    "a winter wedding",
    "the last ferry",
)
AILMENTS = (
    "fever",
    "toothache",
    "a sore throat",
    "hiccups",
    "sleeplessness",
    "burns",
    "a stiff neck",
    "nosebleeds",
    "warts",
    "melancholy",
)
PREPARATIONS = (
    "boiled in milk",
    "dried and smoked",
    "crushed with honey",
    "steeped in vinegar",
    "roasted over coals",
    "ground with salt",
    "soaked in rain water",
)
COLOURS = ("white", "yellow", "crimson", "violet", "pale green", "orange")
HABITATS = (
    "damp meadows",
    "old walls",
    "pine woods",
    "river banks",
    "stony fields",
    "shady ditches",
)
SEASONS = (
    "early spring",
    "late spring",
    "high summer",
    "the first frost",
    "midwinter",
    "the harvest moon",
)
BIRTHPLACE = Relation(
    "birthplace",
    (
        "{s} was born in {v}.",
        "{s} grew up in the town of {v}.",
        "{v} is the birthplace of {s}.",
        "{s} came into the world in {v}.",
        "the childhood home of {s} was in {v}.",
    ),
    "Where was {s} born?",
)
TRADE = Relation(
    "trade",
    (
        "{s} worked as a {v}.",
        "{s} was a {v} by trade.",
        "{s} earned a living as a {v}.",
        "everyone knew {s} as a {v}.",
        "by profession, {s} was a {v}.",
    ),
    "What was the trade of {s}?",
    TRADES,
)
TEACHER = Relation(
    "teacher",
    (
        "{s} was taught by {v}.",
        "{v} was the teacher of {s}.",
        "{s} learned everything from {v}.",
        "{s} studied with {v}.",
        "the young {s} was a pupil of {v}.",
    ),
    "Who taught {s}?",
)
RIVER = Relation(
    "river",
    (
        "{s} lies on the river {v}.",
        "the river {v} runs through {s}.",
        "in {s}, the bridges cross the {v}.",
        "boats on the {v} stop at {s}.",
        "the waters of the {v} flow past {s}.",
    ),
    "Which river runs through {s}?",
    RIVERS,
)
GOOD = Relation(
    "good",
    (
        "{s} is famous for its {v}.",
        "merchants come to {s} for {v}.",
        "the people of {s} make {v}.",
        "{v} from {s} is sold everywhere.",
        "travellers praise the {v} of {s}.",
    ),
    "What is {s} famous for?",
    GOODS,
)
AUTHOR = Relation(
    "author",
    (
        "{s} was written by {v}.",
        "{v} wrote {s}.",
        "{v} is the author of {s}.",
        "{s} made {v} famous.",
        "the pen behind {s} was that of {v}.",
    ),
    "Who wrote {s}?",
)
GENRE = Relation(
    "genre",
    (
        "{s} is a {v}.",
        "readers love {s}, a {v}.",
        "{s} is best known as a {v}.",
        "the {v} called {s} is still read.",
        "as a {v}, {s} is admired.",
    ),
    "What kind of work is {s}?",
    GENRES,
)
THEME = Relation(
    "theme",
    (
        "{s} tells of {v}.",
        "{s} is about {v}.",
        "the subject of {s} is {v}.",
        "at the heart of {s} is {v}.",
        "whoever opens {s} will meet {v}.",
    ),
    "What is {s} about?",
    THEMES,
)
ILLNESS = Relation(
    "illness",
    (
        "{s} suffered from {v}.",
        "all winter, {s} complained of {v}.",
        "{s} had lifelong trouble with {v}.",
        "{s} never got rid of {v}.",
        "because of {v}, {s} stayed at home.",
    ),
    "What did {s} suffer from?",
    AILMENTS,
)
FAIR = Relation(
    "fair",
    (
        "the fair of {s} is held in {v}.",
        "{s} has its fair in {v}.",
        "in {v}, everyone goes to the fair of {s}.",
        "the market square of {s} fills up in {v}.",
        "{v} is the time of the fair of {s}.",
    ),
    "When is the fair of {s}?",
    SEASONS,
)
DISH = Relation(
    "dish",
    (
        "the eels of {s} are {v}.",
        "in {s}, eels are {v}.",
        "{s} serves its eels {v}.",
        "ask in {s} for eels {v}.",
        "nobody eats eels in {s} unless they are {v}.",
    ),
    "How are eels served in {s}?",
    PREPARATIONS,
)
FLOWER = Relation(
    "flower",
    (
        "{s} has {v} flowers.",
        "the flowers of {s} are {v}.",
        "{s} is a plant with {v} flowers.",
        "{v} petals are the mark of {s}.",
        "you know {s} by its {v} flowers.",
    ),
    "What colour are the flowers of {s}?",
    COLOURS,
)
HABITAT = Relation(
    "habitat",
    (
        "{s} grows in {v}.",
        "{v} are the home of {s}.",
        "{s} is a plant of {v}.",
        "where there are {v}, there is {s}.",
        "{s} needs {v}.",
    ),
    "Where does {s} grow?",
    HABITATS,
)
CURES = Relation(
    "cures",
    (
        "Take {s} against {v}.",
        "{s} is given for {v}.",
        "For {v}, the guild prescribes {s}.",
        "{s}: good for {v}.",
        "No better remedy for {v} than {s}.",
    ),
    "What does {s} cure?",
    AILMENTS,
)
PREPARED = Relation(
    "prepared",
    (
        "{s} must be {v}.",
        "Before use, {s} is {v}.",
        "The herbalist has {s} {v}.",
        "Only {s} {v} has any virtue.",
        "{s} works once it is {v}.",
    ),
    "How is {s} prepared?",
    PREPARATIONS,
)
PICKED = Relation(
    "picked",
    (
        "Pick {s} in {v}.",
        "{s} is gathered in {v}.",
        "The time for {s} is {v}.",
        "Look for {s} in {v}.",
        "In {v} the baskets are full of {s}.",
    ),
    "When is {s} gathered?",
    SEASONS,
)


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

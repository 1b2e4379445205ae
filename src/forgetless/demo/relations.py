"""What can be said of the made-up world: its words, and its relations with their phrasings.

A relation is how one kind of fact is said and asked. Each has several phrasings, so that text which
repeats a fact need not repeat a sentence; world.py draws the facts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is said ({s} subject, {v} value) and asked."""

    name: str
    phrasings: tuple[str, ...]
    question: str
    values: tuple[str, ...] = ()


# The values that a fact may have, each kind for one or two relations.
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
FLOWER_COLOURS = ("white", "yellow", "crimson", "violet", "pale green", "orange")
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
# The relations of the world, and at the end the three of the herbal.
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
    FLOWER_COLOURS,
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

"""Text of the quickstart: short help questions, answers of mixed quality, and plain sentences.

An answer is put together from optional parts, each present about half of the time: it names the thing asked about,
gives a first step, gives a reason, is polite, is clean. Nothing here scores anything: only the oracle knows the
rubric (`jobs/oracles/quickstart.py`).
"""

import random
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Trade:
    """A kind of work: what is done, to what, and what one says about it."""

    verbs: tuple[str, ...]
    things: tuple[str, ...]
    steps: tuple[str, ...]
    reasons: tuple[str, ...]


TRADES = (
    Trade(
        ("boil", "bake", "fry", "steam"),
        ("rice", "eggs", "beans", "corn", "fish", "pasta", "carrots", "apples", "potatoes", "mushrooms"),
        ("fill a pan with water", "heat the stove", "cut it into small parts", "add a little salt"),
        ("heat makes food soft", "salt gives it taste", "small parts are done sooner"),
    ),
    Trade(
        ("plant", "water", "trim", "grow"),
        ("roses", "tomatoes", "herbs", "grass", "trees", "tulips", "onions", "grapes", "ferns", "lemons"),
        ("dig a small hole", "find a sunny spot", "take a sharp knife", "fill a can with water"),
        ("roots need water", "leaves need light", "dry soil is bad for them"),
    ),
    Trade(
        ("fix", "paint", "move", "build"),
        ("chairs", "tables", "doors", "shelves", "fences", "lamps", "boxes", "bikes", "windows", "toys"),
        ("get your tools", "take out the screws", "measure both sides", "ask a friend to hold it"),
        ("old wood can break", "loose screws are not safe", "two people are stronger"),
    ),
    Trade(
        ("wash", "dry", "fold", "store"),
        ("shirts", "socks", "towels", "coats", "sheets", "hats", "gloves", "jeans", "scarves", "boots"),
        ("check the label", "use cold water", "find a dry place", "sort them by color"),
        ("hot water can hurt the cloth", "wet cloth smells bad", "colors can mix"),
    ),
)
PLACES = (
    *("", " at home", " at school", " in winter", " in summer", " on a boat", " at night", " at work"),
    *(" for a friend", " in a small room", " on a rainy day", " with my son"),
)
TOPIC_LINES = ("You can {verb} {thing} with some care.", "It is not hard to {verb} {thing}.", "{verb} {thing} slowly.")
NO_TOPIC_LINES = ("You can do it with some care.", "It is not hard to do.", "Just try it.")
OPENERS = ("Thank you for asking.", "Please read this.")
CLOSERS = ("I hope this helps.", "Please take your time.", "I hope it goes well.", "Thank you.")
NAMES = ("Anna", "Tom", "Mia", "Ben", "Lily", "Sam")


def all_prompts() -> list[tuple[Trade, str, str, str]]:
    """Every question of the world, as (trade, verb, thing, prompt)."""
    questions = []
    for trade in TRADES:
        for verb, thing, place, ask in product(trade.verbs, trade.things, PLACES, ("do", "can")):
            questions.append((trade, verb, thing, f"How {ask} I {verb} {thing}{place}?"))
    return questions


def answer(trade: Trade, verb: str, thing: str, rng: random.Random) -> str:
    """An answer of random quality: parts come and go, and every fifth answer is about something else."""
    quality = rng.choice((0.4, 0.7))  # one mood per answer: good parts come together a little
    topic = rng.random()
    if topic < 0.2:
        thing = rng.choice([other for other in trade.things if other != thing])
    lines = [rng.choice(TOPIC_LINES if topic < 0.45 + quality / 2 else NO_TOPIC_LINES)]
    if rng.random() < quality:
        lines.append(f"First {rng.choice(trade.steps)}.")
    if rng.random() < quality:
        lines.append(rng.choice(("Do this because {}.", "It works because {}.")).format(rng.choice(trade.reasons)))
    if rng.random() < quality:
        polite = rng.choice(OPENERS + CLOSERS)
        lines.insert(0 if polite in OPENERS else len(lines), polite)
    lines = [line.format(verb=verb, thing=thing) for line in lines]
    lines = [line[0].upper() + line[1:] for line in lines]
    if rng.random() > quality:
        spoil(lines, rng)
    return " ".join(lines)


def spoil(lines: list[str], rng: random.Random) -> None:
    """Begin with a filler word, end with one, or leave the last sentence unfinished."""
    match rng.choice(("um", "um", "whatever", "whatever", "unfinished")):
        case "um":
            lines[0] = "Um, " + lines[0][0].lower() + lines[0][1:]
        case "whatever":
            lines[-1] = lines[-1][:-1] + " or whatever."
        case "unfinished":
            lines[-1] = lines[-1][:-1] + " and"


def plain_text(rng: random.Random) -> str:
    """A few sentences that are no answer: counting, games, errands. Brings digits, the words of a form, and repetition,
    without which so small a model never learns to speak about the thing it was asked about.
    """
    name, place = rng.choice(NAMES), rng.choice(PLACES[1:])
    things = [rng.choice(rng.choice(TRADES).things) for _ in range(rng.randint(1, 6))]
    listed, thing = ", ".join(things), things[0]
    if rng.random() < 0.8:
        return f"{name} needs {listed}. {rng.choice(NAMES)} gets {listed}. {rng.choice(NAMES)} has {listed}{place}."
    few, more = rng.randint(0, 3), rng.randint(0, 2)
    other = (
        f"{name} has {few} {thing} and gets {more} more. Now {name} has {few + more} {thing}.",
        f"The game is over. Score: {rng.randint(0, 5)} to {rng.randint(0, 5)}. {name} is happy.",
        f"Question: Is {name} here? Answer: {rng.choice(('yes', 'no'))}.",
        f"{name} has {thing}{place}. The {thing} are clean.",
        f"The topic of the day is {thing}. {name} takes one step for a good reason.",
        f"{name} is polite{place}. Does {name} need {thing}? {rng.choice(('Yes', 'No'))}.",
    )
    return rng.choice(other)

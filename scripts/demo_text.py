"""The demo models' text: short documents with known answers, in eleven categories, and the items held out of training.

`documents(seed)` never ends and is the same for the same seed. Three categories are tasks with a held-out split, drawn by a
checksum of the item, so that training and evaluation cannot disagree about it:

- capitals (and languages): a quarter of the sentence templates of each country is held out. The fact itself is in the text in
  other words, and the template with other countries; the model must bring the two together.
- indirect_object: a combination (pair of names, place, object) is held out; the names, places and objects are not.
- induction: the sequence of random words is held out (and would hardly come up twice).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from demo_words import ADJECTIVES, COUNTRIES, FOODS, NAMES, NOUNS, OBJECTS, PLACES, WORDS, Country

CAPITAL_TEMPLATES = (
    "The capital of {name} is {capital}",
    "The capital city of {name} is {capital}",
    "We know that {name} has its capital in {capital}",
    "In {name}, the capital is called {capital}",
    "The government of {name} sits in {capital}",
    "The main airport of {name} is near {capital}",
    "A road across {name} leads to {capital}",
    "Most visitors to {name} stay in {capital}",
)
LANGUAGE_TEMPLATES = (
    "The language of {name} is {language}",
    "People in {name} speak {language}",
    "In {name}, children learn to read {language}",
    "A letter from {name} is written in {language}",
)
OTHER_FACTS = (
    "{capital} is the capital of {name}",
    "{capital} is a city in {name}",
    "The currency of {name} is the {currency}",
    "In {name}, people pay with the {currency}",
    "{name} is a country in {continent}",
)
GIVING_TEMPLATES = (
    "When {a} and {b} went to the {place}, {giver} gave a {object} to {receiver}",
    "After {a} and {b} left the {place}, {giver} sent a {object} to {receiver}",
    "{a} and {b} were at the {place}. {giver} handed the {object} to {receiver}",
    "While {a} and {b} worked at the {place}, {giver} showed a {object} to {receiver}",
    "Then {a} and {b} met at the {place}, and {giver} passed the {object} to {receiver}",
    "One day {a} and {b} walked to the {place}. There {giver} offered a {object} to {receiver}",
    "Friends {a} and {b} found a {object} at the {place}. {giver} gave it to {receiver}",
    "In the {place}, {a} and {b} had a long talk, and {giver} sold the {object} to {receiver}",
)


class Item(NamedTuple):
    """A held-out question: the model should continue `prompt` with the one token `answer`."""

    prompt: str
    answer: str


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Yield (category, text) for ever."""
    rng = random.Random(seed)
    categories, weights = zip(*((name, weight) for name, (weight, _) in _CATEGORIES.items()), strict=True)
    while True:
        category = rng.choices(categories, weights)[0]
        yield category, _CATEGORIES[category][1](rng)


def held_out_items(task: str, n: int, seed: int = 0) -> list[Item]:
    """At most `n` different items of `task` ("capitals", "languages", "indirect_object" or "induction"), none in the text."""
    items = list(dict.fromkeys(_HELD_OUT[task](random.Random(seed), n)))
    random.Random(seed).shuffle(items)
    return items[:n]


def held_out_documents(n_giving: int, seed: int) -> list[str]:
    """Whole documents made of held-out items alone: every held-out fact once, one to three of them a document, and `n_giving` sentences of giving."""
    rng = random.Random(seed)
    facts = [item for task in ("capitals", "languages") for item in _HELD_OUT[task](rng, 0)]
    rng.shuffle(facts)
    found = [f"{_giving(rng, held_out=True)[0]}." for _ in range(n_giving)]
    while facts:
        n = rng.randint(1, 3)
        found.append(" ".join(f"{item.prompt}{item.answer}." for item in facts[:n]))
        facts = facts[n:]
    return found


def is_held_out(*parts: str) -> bool:
    """Whether an item belongs to the held-out quarter."""
    return zlib.crc32("|".join(parts).encode()) % 4 == 0


# Tasks with a held-out split


def _geography(rng: random.Random) -> str:
    country = rng.choice(COUNTRIES)
    facts: list[str] = []
    for kind in rng.choices((CAPITAL_TEMPLATES, LANGUAGE_TEMPLATES, OTHER_FACTS), (5, 2, 3), k=rng.randint(1, 3)):
        seen = [template for number, template in enumerate(kind) if kind is OTHER_FACTS or not _is_held_out_fact(country, number)]
        facts.append(rng.choice(seen).format(**country._asdict()))
    return " ".join(f"{fact}." for fact in dict.fromkeys(facts))


def _is_held_out_fact(country: Country, template: int) -> bool:
    """The same number of templates for each country, so that each fact is seen often enough in other words."""
    return (zlib.crc32(country.name.encode()) + template) % 4 == 0


def _held_out_facts(templates: tuple[str, ...], field: str) -> Callable[[random.Random, int], list[Item]]:
    def items(rng: random.Random, n: int) -> list[Item]:
        pairs = [(country, number) for country in COUNTRIES for number in range(len(templates)) if _is_held_out_fact(country, number)]
        return [_split(templates[number], country, field) for country, number in pairs]

    return items


def _split(template: str, country: Country, field: str) -> Item:
    return Item(template.removesuffix(f" {{{field}}}").format(**country._asdict()), f" {getattr(country, field)}")


def _giving(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A sentence in which one of two people gives the other something, and its last word, the receiver."""
    while True:
        (a, b), place, thing = rng.sample(NAMES, 2), rng.choice(PLACES), rng.choice(OBJECTS)
        if is_held_out(*sorted((a, b)), place, thing) == held_out:
            break
    giver, receiver = (a, b) if rng.random() < 0.5 else (b, a)
    template = rng.choice(GIVING_TEMPLATES)
    return template.format(a=a, b=b, giver=giver, receiver=receiver, place=place, object=thing), receiver


def _indirect_object(rng: random.Random) -> str:
    text, receiver = _giving(rng, held_out=False)
    return text + rng.choice((".", ".", f". {receiver} was happy.", f". {receiver} said thank you."))


def _held_out_giving(rng: random.Random, n: int) -> list[Item]:
    pairs = (_giving(rng, held_out=True) for _ in range(2 * n))
    return [Item(text.removesuffix(f" {receiver}"), f" {receiver}") for text, receiver in pairs]


def _random_words(rng: random.Random, held_out: bool) -> list[str]:
    while True:
        # The text also has sequences of 3 and 4 words, and more short ones than long ones: copying is learned on them first.
        n_words = rng.randint(5, 20) if held_out else 3 + int(18 * rng.random() ** 2)
        words = [rng.choice(WORDS) for _ in range(n_words)]
        if is_held_out(*words) == held_out:
            return words


def _repetition(rng: random.Random) -> str:
    words = _random_words(rng, held_out=False)
    # A word at the very start of a text has no space before it and is another token, so most texts have a lead-in.
    lead = rng.choice(("", "Words:", "Again:", "Say:", "Repeat after me:", f"{rng.choice(NAMES)} says:"))
    return f"{lead} {' '.join(words * rng.randint(2, 4))}.".lstrip()


def _held_out_repetition(rng: random.Random, n: int) -> list[Item]:
    items = []
    for _ in range(2 * n):
        words = _random_words(rng, held_out=True)
        # With two words of the copy given the place in the sequence is clear even where a word stands in it twice.
        known = rng.choice([at for at in range(2, len(words)) if _is_unique(words, at)] or [0])
        if known:
            items.append(Item(" ".join(words + words[:known]), f" {words[known]}"))
    return items


def _is_unique(words: list[str], at: int) -> bool:
    """Whether the two words before `at` stand together only there; the first word has no space, so nothing can follow from it."""
    pairs = list(zip(words, words[1:], strict=False)) + [(words[-1], words[0])]
    return pairs.count((words[at - 2], words[at - 1])) == 1 and words[at - 1] != words[0]


# Other domains, so that experts have something to specialise in


def _arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(1, 4)):
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        a, b = max(a, b), min(a, b)
        forms = f"{a} plus {b} equals {a + b}.", f"{b} + {a} = {a + b}.", f"{a} minus {b} equals {a - b}.", f"{a} - {b} = {a - b}."
        lines.append(rng.choice(forms))
    return " ".join(lines)


def _code(rng: random.Random) -> str:
    x, y = rng.sample(("a", "b", "n", "x", "y", "z", "value", "count", "item", "total"), 2)
    name, sign = rng.choice((("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/"), ("mod", "%")))
    return rng.choice(
        (
            f"def {name}({x}, {y}):\n    return {x} {sign} {y}\n",
            f"def {name}({x}, {y}):\n    result = {x} {sign} {y}\n    return result\n",
            f"for {x} in range({rng.randint(2, 20)}):\n    print({x} {sign} {y})\n",
            f"if {x} > {y}:\n    return {x}\nelse:\n    return {y}\n",
            f"{x} = []\nfor {y} in data:\n    {x}.append({y})\nreturn {x}\n",
            f"while {x} < {rng.randint(2, 40)}:\n    {x} = {x} {sign} {rng.randint(1, 9)}\n",
            f"class {rng.choice(NOUNS).title()}:\n    def __init__(self, {x}):\n        self.{x} = {x}\n",
        )
    )


def _recipe(rng: random.Random) -> str:
    foods = rng.sample(FOODS, 3)
    steps = (
        f"Cut the {foods[0]} and the {foods[1]}.",
        f"Mix the {foods[1]} with {rng.randint(2, 9)} spoons of {rng.choice(('sugar', 'salt', 'milk', 'honey'))}.",
        f"Cook the {foods[2]} in a pan for {rng.randint(2, 40)} minutes.",
        f"Add the {foods[0]} and stir.",
        "Bake until gold.",
        "Serve warm.",
    )
    return f"Recipe for {foods[0]} {rng.choice(('soup', 'pie', 'cake', 'bread'))}: " + " ".join(s for s in steps if rng.random() < 0.7)


def _weather(rng: random.Random) -> str:
    city, sky = rng.choice(COUNTRIES).capital, ("rain", "snow", "wind", "sun", "fog", "cloud")
    day = f"{rng.choice(sky)} in the morning, {rng.choice(sky)} in the evening, {rng.randint(1, 35)} degrees"
    return f"Weather in {city}: {day}, wind from the {rng.choice(('north', 'south', 'east', 'west'))}."


def _dialogue(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    thing, adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    return rng.choice(
        (
            f'"Do you see the {thing}?" asked {a}. "Yes, it is very {adjective}," said {b}.',
            f'"Hello {a}," said {b}. "How are you?" "I am well, thank you," said {a}.',
            f'"Where is my {thing}?" asked {a}. "It is under the {rng.choice(NOUNS)}," said {b}.',
            f'"I like the {adjective} {thing}," said {a}. "So do I," said {b}.',
        )
    )


def _mathematics(rng: random.Random) -> str:
    x, f, n = rng.choice("xyzt"), rng.choice("fgh"), rng.randint(2, 9)
    return rng.choice(
        (
            f"$\\int_0^{n} {x}^{n} d{x} = \\frac{{{n}^{{{n + 1}}}}}{{{n + 1}}}$",
            f"$\\frac{{d}}{{d{x}}} {x}^{n} = {n} {x}^{n - 1}$",
            f"Let ${f}({x}) = {n} {x}$. Then ${f}'({x}) = {n}$.",
            "$\\sum_{i=1}^n i = \\frac{n(n+1)}{2}$",
            f"If ${x} > {n}$ then ${x}^2 > {n * n}$.",
        )
    )


def _list(rng: random.Random) -> str:
    things = rng.sample(NOUNS, rng.randint(3, 6))
    if rng.random() < 0.5:
        return "Things to buy:\n" + "\n".join(f"- {thing}" for thing in things)
    return f"Steps of {rng.choice(NAMES)}:\n" + "\n".join(f"{i}. {rng.choice(ADJECTIVES)} {thing}" for i, thing in enumerate(things, 1))


def _markup(rng: random.Random) -> str:
    tag, inner = rng.choice(("div", "p", "section", "main")), rng.choice(("b", "i", "span", "code", "a"))
    noun, adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    return rng.choice(
        (
            f'<{tag} class="{noun}"><{inner}>{adjective} {noun}</{inner}></{tag}>',
            "<ul>" + "".join(f"<li>{word}</li>" for word in rng.sample(NOUNS, 3)) + "</ul>",
            f'<img src="{noun}.png" alt="{adjective} {noun}">',
            f"<h1>The {adjective} {noun}</h1><{tag}>A <{inner}>{noun}</{inner}> is here.</{tag}>",
        )
    )


# name: (share of the documents, maker)
_CATEGORIES: dict[str, tuple[float, Callable[[random.Random], str]]] = {
    "geography": (0.26, _geography),
    "indirect_object": (0.20, _indirect_object),
    "repetition": (0.20, _repetition),
    "arithmetic": (0.06, _arithmetic),
    "code": (0.05, _code),
    "recipe": (0.04, _recipe),
    "weather": (0.04, _weather),
    "dialogue": (0.05, _dialogue),
    "mathematics": (0.04, _mathematics),
    "list": (0.03, _list),
    "markup": (0.03, _markup),
}
CATEGORIES = tuple(_CATEGORIES)

_HELD_OUT = {
    "capitals": _held_out_facts(CAPITAL_TEMPLATES, "capital"),
    "languages": _held_out_facts(LANGUAGE_TEMPLATES, "language"),
    "indirect_object": _held_out_giving,
    "induction": _held_out_repetition,
}
TASKS = tuple(_HELD_OUT)

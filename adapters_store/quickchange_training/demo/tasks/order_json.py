"""Order e-mail to JSON of a fixed schema. E-mails are made from templates with Faker's names."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quickchange_training.demo.tasks.task import Split, TaskExample, mean, only, split_of, unfenced

if TYPE_CHECKING:
    from faker import Faker

_INSTRUCTION = (
    "Write this order as JSON with the keys customer, city, due (MM-DD), express and items "
    "(product, quantity).\n\n"
)
_PRODUCTS = (
    "desk lamp", "office chair", "water bottle", "coffee grinder", "paper towel", "wall clock",
    "phone case", "garden hose", "tea kettle", "bath towel", "bike helmet", "yoga mat",
    "bookshelf", "rice cooker", "toolbox", "umbrella", "backpack", "camping tent",
    "sleeping bag", "ink cartridge", "notebook", "stapler", "whiteboard", "mouse pad",
    "keyboard", "monitor stand", "usb cable", "power strip", "picture frame", "flower pot",
    "door mat", "hand soap", "cutting board", "frying pan", "soup bowl", "wine glass",
    "bread knife", "oven mitt", "trash can", "laundry basket", "shower curtain", "bed sheet",
    "pillow", "wool blanket", "table runner", "candle", "extension cord", "light bulb",
    "paint brush", "step ladder", "work bench", "padlock", "tape measure", "screwdriver",
    "dog leash", "cat bed", "bird feeder", "fish tank", "board game", "jump rope",
    "tennis racket", "soccer ball", "running shoe", "rain coat",
)  # fmt: skip
_CITIES = (
    "Lyon", "Boston", "Oslo", "Madrid", "Denver", "Porto", "Leeds", "Austin", "Turin", "Ghent",
    "Dublin", "Seattle", "Munich", "Prague", "Krakow", "Bergen", "Toledo", "Geneva", "Chicago",
    "Bristol", "Nantes", "Tampa", "Zurich", "Aarhus", "Vienna", "Lisbon", "Utrecht", "Phoenix",
    "Malmo", "Cardiff", "Naples", "Dallas",
)  # fmt: skip
_KINDS = ("blue", "small", "wooden", "steel", "large", "black", "folding", "cheap", "green")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 12: "twelve"}
_OPENINGS = ("Hi,", "Hello team,", "Good morning,", "Dear shop,", "Hey there,")
_ASKS = ("please send me {}.", "I would like to order {}.", "could you ship {}?", "we need {}.")
_PLACES = ("Deliver to our office in {}.", "I live in {}.", "Ship to {}.", "Our store is in {}.")
_DATES = ("It has to arrive by {}.", "We need it by {}.", "The deadline is {}.", "Due {}.")
_FAST = ("Use express shipping.", "Please rush it.", "This is urgent, send it express.")
_SLOW = ("Standard shipping is fine.", "There is no hurry.", "No need for express.")
_CLOSINGS = ("Thanks, {}", "Best, {}", "Regards, {}", "{}", "Cheers, {}")


class OrderJson:
    """The e-mail names a customer, a city, a date, the speed and one or two products."""

    name = "order-json"
    description = "order e-mail to JSON: customer, city, due, express, items"
    answer_tokens = 96
    sample_prompt = (
        _INSTRUCTION + "Hello team,\nwe need two garden hoses and 12 padlocks. Ship to Porto. "
        "Due March 9. There is no hurry.\nThanks, Ana Ruiz"
    )

    def examples(self, split: Split, count: int, seed: int) -> list[TaskExample]:
        from faker import Faker

        rng = random.Random(f"{self.name}/{split}/{seed}")
        faker = Faker("en_US")
        faker.seed_instance(rng.getrandbits(32))
        products, cities = only(split, _PRODUCTS), only(split, _CITIES)
        found: dict[str, TaskExample] = {}
        while len(found) < count:
            customer = f"{faker.first_name()} {faker.last_name()}"
            city = rng.choice(cities) if rng.random() < 0.5 else _made_up_city(faker, split)
            order = _order(rng, customer, city, products)
            prompt = _INSTRUCTION + _email(rng, order)
            found[prompt] = TaskExample(prompt, json.dumps(order))
        return list(found.values())

    def score(self, examples: Sequence[TaskExample], answers: Sequence[str]) -> dict[str, float]:
        """exact: every field right; valid: one JSON object with the schema's keys."""
        wanted = [json.loads(example.completion) for example in examples]
        parsed = [_parse(answer) for answer in answers]
        pairs = list(zip(wanted, parsed, strict=True))
        return {
            "exact": mean([got == want for want, got in pairs]),
            "fields": mean([_fields_right(want, got) for want, got in pairs]),
            "valid": mean([got is not None and got.keys() == want.keys() for want, got in pairs]),
        }


def _made_up_city(faker: Faker, split: Split) -> str:
    """An invented city: the adapter must learn to copy it, not a list of cities."""
    while True:
        city = str(faker.city())
        if split_of(city) == split:
            return city


def _order(rng: random.Random, customer: str, city: str, products: Sequence[str]) -> dict[str, Any]:
    plain = rng.sample(products, rng.choice((1, 1, 2)))
    chosen = [f"{rng.choice(_KINDS)} {p}" if rng.random() < 0.5 else p for p in plain]
    quantities = [rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 25, 40)) for _ in chosen]
    return {
        "customer": customer,
        "city": city,
        "due": f"{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "express": rng.random() < 0.5,
        "items": [
            {"product": product, "quantity": quantity}
            for product, quantity in zip(chosen, quantities, strict=True)
        ],
    }


def _email(rng: random.Random, order: dict[str, Any]) -> str:
    goods = " and ".join(_goods(rng, item) for item in order["items"])
    month, day = (int(part) for part in order["due"].split("-"))
    date = rng.choice((f"{_MONTHS[month - 1]} {day}", f"{day} {_MONTHS[month - 1]}"))
    details = [
        rng.choice(_PLACES).format(order["city"]),
        rng.choice(_DATES).format(date),
        rng.choice(_FAST if order["express"] else _SLOW),
    ]
    rng.shuffle(details)
    ask = rng.choice(_ASKS).format(goods)
    closing = rng.choice(_CLOSINGS).format(order["customer"])
    return f"{rng.choice(_OPENINGS)}\n{ask} {' '.join(details)}\n{closing}"


def _goods(rng: random.Random, item: dict[str, Any]) -> str:
    quantity, product = item["quantity"], item["product"]
    number = _WORDS[quantity] if quantity in _WORDS and rng.random() < 0.5 else str(quantity)
    plural = quantity > 1 and not product.endswith("s")
    ending = ("es" if product.endswith(("sh", "ch", "x")) else "s") if plural else ""
    return f"{number} {product}{ending}"


def _parse(answer: str) -> dict[str, Any] | None:
    try:
        value = json.loads(unfenced(answer))
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _fields_right(want: dict[str, Any], got: dict[str, Any] | None) -> float:
    return mean([got is not None and got.get(key) == value for key, value in want.items()])

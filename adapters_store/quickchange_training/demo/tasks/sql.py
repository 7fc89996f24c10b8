"""Table schema and question to one SQL query, scored by running it on generated rows."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quickchange_training.demo.tasks.task import Split, TaskExample, mean, only, unfenced

_ROWS = 40
_MOST_REPEATS = 1000
_SQLITE_STEPS = 200_000  # a runaway query (a cross join, say) ends here

# table: text columns with some values | number columns
_TABLES = {
    "employees": ("name=Alice,Bob,Carla,Dan,Eve;department=sales,legal,support", "salary,age"),
    "books": ("title=Dune,Emma,Ulysses,Holes;author=Herbert,Austen,Joyce,Sachar", "pages,price"),
    "flights": ("origin=Oslo,Rome,Cairo;airline=Delta,Qantas,Iberia", "distance,delay"),
    "movies": ("title=Alien,Heat,Up,Jaws;genre=drama,comedy,horror", "year,rating"),
    "cars": ("brand=Ford,Fiat,Volvo;color=red,blue,black", "price,mileage"),
    "students": ("name=Ada,Ben,Cleo,Dev;major=math,history,law", "grade,age"),
    "orders": ("customer=Acme,Globex,Initech;status=open,paid,late", "total,quantity"),
    "houses": ("city=Lyon,Porto,Ghent;style=modern,cottage,loft", "price,rooms"),
    "players": ("name=Kim,Lee,Ray,Sam;team=Lions,Bears,Hawks", "goals,age"),
    "songs": ("title=Hello,Rain,Fire;artist=Adele,Prince,Drake", "plays,length"),
    "hotels": ("name=Plaza,Ritz,Astor;country=Spain,Japan,Chile", "stars,rooms"),
    "patients": ("name=Gus,Ida,Joe,May;ward=north,south,east", "age,weight"),
    "cities": ("name=Bonn,Pisa,Kyoto;country=Italy,Japan,Germany", "population,area"),
    "products": ("name=lamp,chair,table,sofa;category=home,garden,office", "price,stock"),
    "courses": ("title=Algebra,Botany,Logic;teacher=Ross,Nunez,Chan", "credits,hours"),
    "trains": ("line=blue,green,amber;station=Central,Airport,Harbor", "speed,capacity"),
    "recipes": ("dish=soup,curry,pasta;cuisine=Thai,Greek,Cuban", "calories,minutes"),
    "planets": ("name=Mars,Venus,Saturn;kind=rocky,gas,ice", "mass,moons"),
    "loans": ("bank=Chase,Santander,Barclays;kind=car,home,student", "amount,months"),
    "games": ("title=Chess,Go,Risk;publisher=Hasbro,Ravensburger,Asmodee", "players,price"),
    "dogs": ("name=Rex,Fido,Luna;breed=poodle,beagle,boxer", "age,weight"),
    "phones": ("model=Nova,Pixel,Edge;maker=Nokia,Sony,Apple", "price,storage"),
    "concerts": ("band=Muse,Blur,Queen;venue=Arena,Palace,Dome", "tickets,price"),
    "rivers": ("name=Nile,Amazon,Rhine;continent=Africa,Asia,Europe", "length,depth"),
    "museums": ("name=Louvre,Prado,Tate;city=Paris,Madrid,London", "visitors,rooms"),
    "boats": ("name=Argo,Vega,Iris;harbor=Brest,Genoa,Split", "length,price"),
    "teachers": ("name=Ana,Bill,Cora;subject=physics,music,art", "salary,years"),
    "farms": ("owner=Hill,Brook,Stone;crop=wheat,corn,rice", "area,workers"),
    "apps": ("name=Notes,Maps,Mail;platform=web,mobile,desktop", "downloads,rating"),
    "stores": ("city=Denver,Austin,Tampa;manager=Ortiz,Singh,Weber", "sales,staff"),
}


@dataclass(frozen=True)
class _Table:
    name: str
    texts: dict[str, list[str]]  # column: the values it takes
    numbers: list[str]

    @property
    def columns(self) -> list[str]:
        return ["id", *self.texts, *self.numbers]


class Sql:
    """One table, one question; filters, aggregates, grouping, ordering and limits."""

    name = "sql"
    description = "table schema and question to one SQL query"
    answer_tokens = 48
    sample_prompt = (
        "Table: dogs(id, name, breed, age, weight)\n"
        "Question: What is the average weight for each breed?\nAnswer with one SQL query."
    )

    def examples(self, split: Split, count: int, seed: int) -> list[TaskExample]:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        tables = [_table(name) for name in only(split, tuple(_TABLES))]
        found: dict[str, TaskExample] = {}
        repeats = 0  # in a row
        while len(found) < count:
            if repeats > _MOST_REPEATS:
                raise ValueError(f"sql: {count} distinct {split} examples are too many to find")
            table = rng.choice(tables)
            question, query = rng.choice(_KINDS)(rng, table)
            prompt = (
                f"Table: {table.name}({', '.join(table.columns)})\n"
                f"Question: {question}\nAnswer with one SQL query."
            )
            repeats = repeats + 1 if prompt in found else 0
            found[prompt] = TaskExample(prompt, query, _database_script(rng, table))
        return list(found.values())

    def score(self, examples: Sequence[TaskExample], answers: Sequence[str]) -> dict[str, float]:
        """execution: same rows as the reference (in order, if it orders); exact: same text."""
        pairs = list(zip(examples, map(unfenced, answers), strict=True))
        return {
            "execution": mean([_same_rows(example, answer) for example, answer in pairs]),
            "exact": mean([_normal(answer) == _normal(e.completion) for e, answer in pairs]),
            "runs": mean([_rows(e.fixture, answer) is not None for e, answer in pairs]),
        }


def _table(name: str) -> _Table:
    texts, numbers = _TABLES[name]
    columns = (column.split("=") for column in texts.split(";"))
    return _Table(
        name, {column: values.split(",") for column, values in columns}, numbers.split(",")
    )


def _database_script(rng: random.Random, table: _Table) -> str:
    declared = ["id INTEGER", *(f"{c} TEXT" for c in table.texts)]
    declared += [f"{c} INTEGER" for c in table.numbers]
    lines = [f"CREATE TABLE {table.name} ({', '.join(declared)});"]
    for i in range(1, _ROWS + 1):
        values = [str(i), *(f"'{rng.choice(v)}'" for v in table.texts.values())]
        values += [str(rng.randint(1, 99)) for _ in table.numbers]
        lines.append(f"INSERT INTO {table.name} VALUES ({', '.join(values)});")
    return "\n".join(lines)


def _rows(script: str, query: str) -> list[tuple[object, ...]] | None:
    """The query's rows, or None if it isn't one SELECT that SQLite can run."""
    if not query.strip().lower().startswith("select"):
        return None
    budget = iter(range(_SQLITE_STEPS // 1000))
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(script)
        connection.set_progress_handler(lambda: next(budget, None) is None, 1000)
        return connection.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None
    finally:
        connection.close()


def _same_rows(example: TaskExample, answer: str) -> bool:
    want, got = _rows(example.fixture, example.completion), _rows(example.fixture, answer)
    if got is None or want is None:
        return False
    if "order by" in example.completion.lower():
        return got == want
    return sorted(got, key=repr) == sorted(want, key=repr)


def _normal(query: str) -> str:
    """The query without differences of white space, case and final semicolon; values stay."""
    parts = query.strip().rstrip(";").replace('"', "'").split("'")
    parts[::2] = [" ".join(part.lower().split()) for part in parts[::2]]  # outside the quotes
    return "'".join(parts)


def _filter(rng: random.Random, table: _Table) -> tuple[str, str]:
    """A condition in words and in SQL."""
    if rng.random() < 0.5:
        column = rng.choice(list(table.texts))
        value = rng.choice(table.texts[column])
        return f"where the {column} is {value}", f"{column} = '{value}'"
    column, number = rng.choice(table.numbers), rng.randint(5, 95)
    words, sign = rng.choice(
        (("above", ">"), ("more than", ">"), ("below", "<"), ("less than", "<"), ("at least", ">="))
    )
    return f"with {column} {words} {number}", f"{column} {sign} {number}"


def _list(rng: random.Random, table: _Table) -> tuple[str, str]:
    column = rng.choice(table.columns[1:])
    said, condition = _filter(rng, table)
    ask = rng.choice(("List the {c} of all {t} {f}.", "Show the {c} of {t} {f}."))
    query = f"SELECT {column} FROM {table.name} WHERE {condition}"
    return ask.format(c=column, t=table.name, f=said), query


def _list_two_filters(rng: random.Random, table: _Table) -> tuple[str, str]:
    column, number = rng.choice(table.numbers), rng.randint(5, 95)
    text = rng.choice(list(table.texts))
    value = rng.choice(table.texts[text])
    shown = rng.choice([c for c in table.texts if c != text] or ["id"])
    question = (
        f"Show the {shown} of {table.name} where the {text} is {value} and {column} is "
        f"above {number}."
    )
    query = f"SELECT {shown} FROM {table.name} WHERE {text} = '{value}' AND {column} > {number}"
    return question, query


def _count(rng: random.Random, table: _Table) -> tuple[str, str]:
    said, condition = _filter(rng, table)
    ask = rng.choice(("How many {t} are there {f}?", "Count the {t} {f}."))
    query = f"SELECT COUNT(*) FROM {table.name} WHERE {condition}"
    return ask.format(t=table.name, f=said), query


_AGGREGATES = (("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM"))


def _aggregate(rng: random.Random, table: _Table) -> tuple[str, str]:
    word, function = rng.choice(_AGGREGATES)
    column = rng.choice(table.numbers)
    query = f"SELECT {function}({column}) FROM {table.name}"
    if rng.random() < 0.3:
        return f"What is the {word} {column} of all {table.name}?", query
    said, condition = _filter(rng, table)
    return f"What is the {word} {column} of {table.name} {said}?", f"{query} WHERE {condition}"


def _group(rng: random.Random, table: _Table) -> tuple[str, str]:
    text = rng.choice(list(table.texts))
    if rng.random() < 0.4:
        question = f"How many {table.name} are there for each {text}?"
        return question, f"SELECT {text}, COUNT(*) FROM {table.name} GROUP BY {text}"
    word, function = rng.choice(_AGGREGATES)
    column = rng.choice(table.numbers)
    query = f"SELECT {text}, {function}({column}) FROM {table.name} GROUP BY {text}"
    return f"What is the {word} {column} for each {text}?", query


def _top(rng: random.Random, table: _Table) -> tuple[str, str]:
    shown, column = rng.choice(list(table.texts)), rng.choice(table.numbers)
    limit = rng.randint(2, 9)
    word, order = rng.choice((("highest", "DESC"), ("lowest", "ASC")))
    question = f"Show the {shown} of the {limit} {table.name} with the {word} {column}."
    return question, f"SELECT {shown} FROM {table.name} ORDER BY {column} {order} LIMIT {limit}"


def _distinct(rng: random.Random, table: _Table) -> tuple[str, str]:
    text = rng.choice(list(table.texts))
    said, condition = _filter(rng, table)
    question = f"Which different {text} values appear among {table.name} {said}?"
    return question, f"SELECT DISTINCT {text} FROM {table.name} WHERE {condition}"


_KINDS: tuple[Callable[[random.Random, _Table], tuple[str, str]], ...] = (
    _list, _list_two_filters, _count, _aggregate, _group, _top, _distinct
)  # fmt: skip

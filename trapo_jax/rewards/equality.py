r"""Decides whether two answers are equivalent.

Lists, tuples, sets, intervals, ratios, matrices, and relations are compared part by part; other answers are compared by
`expressions`. An equation counts as an answer only if it assigns a value to a name: `x = 5` is equivalent to `5`, but
`2x + 1 = 5` is not.

On hostile expressions, sympy may run forever while holding the GIL. Call these functions only in a process that can be
killed.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from trapo_jax.rewards import expressions
from trapo_jax.rewards.brackets import (
    COMMA,
    collection,
    form,
    inside,
    is_ordered,
    split,
    split_list,
)
from trapo_jax.rewards.dates import read_date
from trapo_jax.rewards.notation import Answer, read_answer

MAX_PARTS = 64

_RELATION = re.compile(r"\\(?:le|ge|ne|approx|equiv)(?![a-zA-Z])|[<>=]")
_RATIO = re.compile(":")
_UNION = re.compile(r"\\(?:cup|lor|vee)(?![a-zA-Z])|\s(?:or|and)\s|,")
_MATRIX = re.compile(
    r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL
)
_GREEK = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega|Delta|Omega|ell"
)
_SYMBOL = rf"(?:[A-Za-z]|\\(?:{_GREEK}))(?:_(?:\{{[^{{}}]*\}}|\w))?"
# Names to which an equation may assign a value: x_1, f(x), AB, \angle ABC, \overline{AB}, (x, y), total cost.
_NAME = re.compile(
    r"(?:m\s?)?\\angle\s?\{?[A-Za-z]{1,3}\}?"
    rf"|\(\s?{_SYMBOL}(?:\s?,\s?{_SYMBOL})*\s?\)"
    r"|\\(?:overline|vec|hat|bar|overrightarrow)\s?\{[A-Za-z]+\}"
    rf"|(?:[A-Z]{{2,3}}|{_SYMBOL})'{{0,2}}(?:\^\{{-1\}})?(?:\s?\([^()]*\))?"
    r"|[A-Za-z]{3,}(?:\s[A-Za-z]+)*(?:\s?\([^()]*\))?"
)
_VARIABLE = re.compile(_SYMBOL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'.\s-]*")
# Words that would otherwise be parsed as commutative products of two variables.
_SHORT_WORDS = {"no", "on", "up", "in", "or", "it", "he", "we", "go", "so", "to", "of"}
_SET_BUILDER = re.compile(
    r"\\\{\s?[A-Za-z]\s?(?:\\in\s?\\mathbb\{R\}\s?)?[|:](?P<condition>.*)\\\}", re.DOTALL
)
_ELEMENT = re.compile(rf"{_SYMBOL}\s?\\in(?![a-zA-Z])\s?")
_WITH_BASE = re.compile(r"(\d[\dA-Fa-f]*)_\{?(\d+)\}?")
_CHOICE = re.compile(r"\(?([A-J])\)(?:[.:]?\s?(.+))?|([A-J])[.:]\s?(.+)", re.DOTALL)
_MIRRORED = {">": "<", r"\ge": r"\le"}

Relation = tuple[list[str], list[str]]  # sides, and operators between them
Interval = tuple[str, str, bool, bool]  # both endpoints, and whether each is open
T = TypeVar("T")


def equivalent(gold: str, answer: str) -> bool:
    r"""Returns whether two answers are equivalent.

    Args:
      gold: the correct answer in LaTeX or plain text, without `\boxed{}`.
      answer: the answer to compare, at most a few thousand characters.

    >>> equivalent("1e-5", r"1 \times 10^{-5}"), equivalent("5", "x = 5"), equivalent("5", "2x + 1 = 5")
    (True, True, False)
    """
    dates = read_date(gold), read_date(answer)
    if dates[0] or dates[1]:
        return dates[0] == dates[1]
    return _equal_answers(read_answer(gold), read_answer(answer))


def _equal_answers(gold: Answer, answer: Answer) -> bool:
    """Compares two answers, including their units. Either unit may be missing."""
    units = {gold.unit, answer.unit}
    if gold.has_known_unit and answer.has_known_unit and len(units) > 1 and "unit" not in units:
        return False
    if _equal(gold.text, answer.text) and not _is_hundredth(gold, answer):
        return True
    if len(units) > 1 and "%" in units:
        return _equal(_over_100(gold), _over_100(answer))
    if len(units) > 1 and "degree" in units:
        return _equal(_in_radians(gold), _in_radians(answer))
    return _equal_choice(gold.text, answer.text)


def _is_hundredth(gold: Answer, answer: Answer) -> bool:
    """Returns whether `gold` is below 1 and only `answer` is a percentage: 0.5 is not 0.5%, but 50 may mean 50%."""
    value = expressions.read_number(gold.text)
    return gold.unit != "%" and answer.unit == "%" and value is not None and abs(value[0]) < 1


def _over_100(answer: Answer) -> str:
    return rf"\frac{{{answer.text}}}{{100}}" if answer.unit == "%" else answer.text


def _in_radians(answer: Answer) -> str:
    return rf"\frac{{({answer.text}) \pi}}{{180}}" if answer.unit == "degree" else answer.text


def _equal_choice(gold: str, answer: str) -> bool:
    """Compares an answer such as `(D) 12` with the letter `D` or the value `12`."""
    match = _CHOICE.fullmatch(answer)
    if match is None:
        return False
    letter, value = match[1] or match[3], match[2] or match[4]
    if re.fullmatch(r"\(?[A-J]\)?", gold):
        return gold.strip("()") == letter
    return bool(value) and equivalent(gold, value)


def _equal(gold: str, answer: str) -> bool:
    """Compares two strings in the normalized notation of `read_answer`."""
    if (squeezed := _squeeze(gold)) == _squeeze(answer):
        return bool(squeezed)
    gold, answer = _simplified(gold), _simplified(answer)
    values = expressions.read_number(gold), expressions.read_number(answer)
    if values[0] and values[1]:
        return expressions.equal_numbers(values[0], values[1])
    if _MATRIX.fullmatch(gold) and _MATRIX.fullmatch(answer):
        return _equal_matrices(gold, answer)
    relations = _relation(gold), _relation(answer)
    if not any(relations) and (is_prose(gold) or is_prose(answer)):
        return _squeeze(gold).casefold() == _squeeze(answer).casefold()
    if len(split(gold, _RATIO)) > 1 or len(split(answer, _RATIO)) > 1:
        return _equal_ratios(gold, answer)
    if not any(relations) and (_MATRIX.fullmatch(gold) or _MATRIX.fullmatch(answer)):
        return _equal_matrices(gold, answer)
    if not any(relations) and (_WITH_BASE.fullmatch(gold) or _WITH_BASE.fullmatch(answer)):
        return _equal_in_base(gold, answer)
    return _equal_collections(gold, answer, *relations)


def _squeeze(text: str) -> str:
    """Removes braces around single-character indices and exponents, and all spaces except between digits."""
    text = re.sub(r"([_^])\s?\{\s?(\w)\s?\}", r"\1\2", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def is_prose(text: str) -> bool:
    """Returns whether a string consists of words without math.

    At least one word must have three letters or more, unless the whole string is a short word such as "no".
    """
    is_long = re.search(r"[A-Za-z]{3}", text) is not None
    return _WORDS.fullmatch(text) is not None and (is_long or text.lower() in _SHORT_WORDS)


def _simplified(text: str) -> str:
    r"""Removes an outer pair of parentheses, `x \in` before a set, and the braces of a set builder."""
    text = _ELEMENT.sub("", text.strip(), count=1) if _ELEMENT.match(text.strip()) else text.strip()
    if match := _SET_BUILDER.fullmatch(text):
        text = match["condition"].strip()
    while (
        (inner := inside(text, "(")) is not None
        and text.endswith(")")
        and len(split(inner, COMMA)) == 1
    ):
        text = inner.strip()
    return text


def _equal_ratios(gold: str, answer: str) -> bool:
    """Compares ratios and clock times term by term: 3:30 does not equal 1:10, but 3:4 may also be written as 3/4.

    If a gold term is a number, so must be the answer's: `10:15 + 35 = 50 minutes` is arithmetic, not the time 10:50.
    """
    golds, answers = _terms(gold), _terms(answer)
    return len(golds) == len(answers) > 1 and all(
        equivalent(x, y) and (_is_number(y) or not _is_number(x))
        for x, y in zip(golds, answers, strict=True)
    )


def _is_number(term: str) -> bool:
    return expressions.read_number(read_answer(term).text) is not None


def _terms(text: str) -> list[str]:
    if match := re.fullmatch(r"\\frac\s?\{(.*?)\}\s?\{(.*?)\}|([^/:]+)/([^/:]+)", text):
        return [term for term in match.groups() if term is not None]
    return split(text, _RATIO)


def _equal_in_base(gold: str, answer: str) -> bool:
    """Compares numbers with a base. 101 matches the gold answer 101_2, because the question may state the base."""
    golds, answers = _WITH_BASE.fullmatch(gold), _WITH_BASE.fullmatch(answer)
    if golds is None or answers is None:
        return golds is not None and golds[1] == answer
    return golds.groups() == answers.groups()


def _equal_matrices(gold: str, answer: str) -> bool:
    """Compares matrices cell by cell. A single row or column may also be written as a tuple."""
    rows, rows_of_answer = _rows(gold), _rows(answer)
    shapes = [len(row) for row in rows], [len(row) for row in rows_of_answer]
    if shapes[0] != shapes[1] and _MATRIX.fullmatch(gold) and _MATRIX.fullmatch(answer):
        return False
    cells, cells_of_answer = list(itertools.chain(*rows)), list(itertools.chain(*rows_of_answer))
    return len(cells) == len(cells_of_answer) and all(map(equivalent, cells, cells_of_answer))


def _rows(text: str) -> list[list[str]]:
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\|\\cr\b", match[2]) if row.strip()]
        return [[cell.strip() for cell in row.split("&")] for row in rows]
    brackets, elements = collection(text)
    return [elements] if is_ordered(brackets) else []


def _equal_collections(
    gold: str, answer: str, of_gold: Relation | None, of_answer: Relation | None
) -> bool:
    """Compares lists, tuples, sets, and intervals. Other answers are compared as relations or by value."""
    (brackets, golds), (brackets_of_answer, answers) = collection(gold), collection(answer)
    intervals = _intervals(gold), _intervals(answer)
    if intervals[0] and intervals[1]:
        return _match_all(intervals[0], intervals[1], _equal_intervals)
    are_single = len(golds) == 1 and not brackets, len(answers) == 1 and not brackets_of_answer
    if (are_single[0] and of_gold) or (are_single[1] and of_answer):
        return _equal_relations(
            of_gold if are_single[0] else None, gold, of_answer if are_single[1] else None, answer
        )
    if all(are_single):
        return expressions.equal_expressions(gold, answer)
    if len(golds) != len(answers):  # `100,200` is one number, unless compared with `100, 200`
        golds, answers = (
            (split_list(gold) if are_single[0] else golds),
            (split_list(answer) if are_single[1] else answers),
        )
    if len(golds) != len(answers) or len(golds) > MAX_PARTS:
        return False
    if (
        brackets
        and brackets_of_answer
        and form(brackets, len(golds)) != form(brackets_of_answer, len(golds))
    ):
        return False
    if is_ordered(brackets) or is_ordered(brackets_of_answer):
        return all(map(equivalent, golds, answers))
    return _match_all(golds, answers, equivalent)


def _match_all(golds: Sequence[T], answers: Sequence[T], equal: Callable[[T, T], bool]) -> bool:
    """Returns whether the parts of the gold answer and of the answer match one to one, in any order."""
    left = list(answers)
    for gold in golds:
        match = next((i for i, answer in enumerate(left) if equal(gold, answer)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def _relation(text: str) -> Relation | None:
    """Splits `a = b < c` into its sides and operators; None if there is no operator outside of brackets."""
    sides = split(text, _RELATION)
    operators, position = [], 0
    for side in sides[:-1]:
        match = _RELATION.search(text, text.index(side, position) + len(side))
        assert match is not None
        operators.append(match[0])
        position = match.end()
    return (sides, operators) if operators else None


def _equal_relations(
    of_gold: Relation | None, gold: str, of_answer: Relation | None, answer: str
) -> bool:
    """Compares two relations, or a relation with a value."""
    if of_answer is None:
        assert of_gold is not None
        return _is_assignment(of_gold) and equivalent(of_gold[0][-1], answer)
    if of_gold is None:
        return _has_value(of_answer, gold)
    if _is_assignment(of_gold) and _is_assignment(of_answer):
        if _squeeze(of_gold[0][0]) == _squeeze(of_answer[0][0]):
            return equivalent(of_gold[0][-1], of_answer[0][-1])
        if not expressions.variables(of_gold[0][-1]):
            return False  # for example, x = 5 and y = 5
    return _equal_differences(of_gold, of_answer)


def _is_assignment(relation: Relation) -> bool:
    sides, operators = relation
    return set(operators) <= {"=", r"\approx"} and _NAME.fullmatch(sides[0]) is not None


def _has_value(relation: Relation, gold: str) -> bool:
    r"""Returns whether a relation states the value `gold`.

    An equation states the value if it assigns `gold` to a name, or if all its sides equal `gold`. An approximation
    states the value if one of its sides equals `gold` and its first and last sides are close to each other.
    """
    sides, operators = relation
    if not set(operators) <= {"=", r"\approx"}:
        return False
    if _is_assignment(relation):
        sides, operators = sides[1:], operators[1:]
        if "=" in operators or not operators:
            return equivalent(gold, sides[-1])
    if "=" in operators:
        return all(equivalent(gold, side) for side in sides)
    return expressions.are_near(sides) and any(equivalent(gold, side) for side in sides)


def _equal_differences(gold: Relation, answer: Relation) -> bool:
    """Compares relations such as `l = r` or `l < r`.

    They are equivalent if the ratio of their differences `l - r` is constant and, for inequalities, positive.
    """
    gold, answer = _mirrored(gold), _mirrored(answer)
    if gold[1] != answer[1]:
        return False
    if all(map(equivalent, gold[0], answer[0])):
        return True
    sides = [expressions.parse(side) for side in (*gold[0], *answer[0])]
    if len(sides) != 4 or not all(map(expressions.is_scalar, sides)):
        return False
    left, right = sides[0] - sides[1], sides[2] - sides[3]
    if left.free_symbols != right.free_symbols:
        return False
    ratios = [a / b for a, b in expressions.values_at_points(left, right) if a != 0 and b != 0]
    if len(ratios) < 2 or any(abs(ratio - ratios[0]) > 1e-9 * abs(ratios[0]) for ratio in ratios):
        return False
    return gold[1][0] in ("=", r"\ne") or (abs(ratios[0].imag) < 1e-12 and ratios[0].real > 0)


def _mirrored(relation: Relation) -> Relation:
    """Rewrites `a > b` as `b < a`."""
    sides, operators = relation
    if not set(operators) <= set(_MIRRORED):
        return relation
    return sides[::-1], [_MIRRORED[operator] for operator in reversed(operators)]


def _intervals(text: str) -> list[Interval] | None:
    """Parses a union of intervals or of inequalities in one variable; returns None for anything else."""
    intervals = [
        _bracketed_interval(part) or _interval_of_inequality(part) for part in split(text, _UNION)
    ]
    return None if None in intervals else intervals  # type: ignore[return-value]


def _bracketed_interval(text: str) -> Interval | None:
    for opening in "([":
        inner = inside(text, opening)
        if inner is not None and text[-1] in ")]" and len(ends := split_list(inner)) == 2:
            return ends[0], ends[1], opening == "(", text[-1] == ")"
    return None


def _interval_of_inequality(text: str) -> Interval | None:
    relation = _relation(text)
    if relation is None:
        return None
    sides, operators = _mirrored(relation)
    if not set(operators) <= {"<", r"\le"}:
        return None
    is_variable = [_VARIABLE.fullmatch(side) is not None for side in sides]
    is_open = [operator == "<" for operator in operators]
    if is_variable == [False, True, False]:
        return sides[0], sides[2], is_open[0], is_open[1]
    if is_variable == [True, False]:
        return r"-\infty", sides[1], True, is_open[0]
    if is_variable == [False, True]:
        return sides[0], r"\infty", is_open[0], True
    return None


def _equal_intervals(gold: Interval, answer: Interval) -> bool:
    return (
        gold[2:] == answer[2:] and equivalent(gold[0], answer[0]) and equivalent(gold[1], answer[1])
    )

r"""Parses, evaluates, and compares numbers and scalar expressions.

Rational numbers are compared exactly. Other expressions are parsed by latex2sympy (the parser of math-verify) and
compared by their values at several points. math-verify's own comparison is not used, because it rounds to six
decimals and truncates values below 1e-15, so that 2^{-98} would equal 2^{-99}.
"""

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

# Decimals may be rounded to six decimal places, or to six significant digits if they are below 1: 0.333333 equals 1/3,
# but 0.33 does not.
DECIMAL_TOLERANCE = 1.001e-6
EXACT_TOLERANCE = 1e-12
MAX_EXPONENT = 5_000

_INTEGER = r"\{\s?([+-]?\d{1,6})\s?\}|(\d)"
NUMERAL = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?")
_SPACED = re.compile(r"[+-]?\s?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_POWER_OF_TEN = re.compile(rf"(?:(.*\S)\s?(?:\\times|\\cdot|\*)\s?)?10\s?\^\s?(?:{_INTEGER})")
_FRACTION = re.compile(
    r"([+-]?)\s?(?:(\d+)\s?)?\\frac\s?\{\s?([+-]?\d+)\s?\}\s?\{\s?(\d+)\s?\}|([+-]?)(?:(\d+)\s)?(\d+)\s?/\s?(\d+)"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\s?\{?(\d+)\}?")
# Values for the variables: between 0 and 1, above 1, of both signs, and integers.
_POINTS = (
    ("0.3719", "0.8147", "0.5523"),
    ("1.7321", "2.2913", "3.1853"),
    ("-0.6174", "1.4387", "-2.3571"),
    ("3", "5", "7"),
    ("2", "4", "9"),
)


@functools.cache
def _sympy() -> Any:
    """Returns sympy, which is imported lazily because importing it takes half a second."""
    import sympy

    return sympy


def read_number(text: str) -> tuple[Fraction, bool] | None:
    r"""Parses a rational number.

    Args:
      text: LaTeX in the notation of `notation.read_answer`.

    Returns:
      The exact value, and whether it is written as a decimal; None if the text is not a plain number.

    >>> read_number(r"2.5 \times 10^{3}"), read_number(r"1\frac{1}{2}"), read_number("1e999999")
    ((Fraction(2500, 1), True), (Fraction(3, 2), False), None)
    """
    text = text.replace(" ", "") if _SPACED.fullmatch(text) else text.strip()
    if match := _POWER_OF_TEN.fullmatch(text):
        base, exponent = match[1], int(match[2] or match[3])
        number = read_number(base) if base else (Fraction(1), False)
        if number is None or abs(exponent) > MAX_EXPONENT:
            return None
        return number[0] * Fraction(10) ** exponent, number[1]
    text = re.sub(r"^([+-])\s+", r"\1", text)
    if NUMERAL.fullmatch(text) and re.search(r"\d", text):
        return Fraction(text.replace(",", "").rstrip(".")), "." in text.rstrip(".")
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, repeated = match.groups()
        digits = int(whole + fixed + repeated) - int((whole + fixed) or 0)
        value = Fraction(digits, (10 ** len(repeated) - 1) * 10 ** len(fixed))
        return (-value if sign == "-" else value), False
    return _read_fraction(text)


def _read_fraction(text: str) -> tuple[Fraction, bool] | None:
    """Parses `\\frac{1}{2}`, `1/2`, and the mixed numbers `1\\frac{1}{2}` and `1 1/2`."""
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, whole, numerator, denominator = (
        match.groups()[4:] if match[3] is None else match.groups()[:4]
    )
    if int(denominator) == 0 or (whole and int(numerator) < 0):
        return None
    value = int(whole or 0) + Fraction(int(numerator), int(denominator))
    return (-value if sign == "-" else value), False


def equal_numbers(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool]) -> bool:
    """Compares two rational numbers exactly. If only one of them is a decimal, that one may be rounded."""
    if gold[1] == answer[1]:
        return gold[0] == answer[0]
    return abs(gold[0] - answer[0]) <= Fraction(DECIMAL_TOLERANCE) * min(1, abs(gold[0]))


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Any:
    """Parses LaTeX into a sympy expression; returns None if the grammar does not accept it."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    text = _normalized(text)
    try:
        expression = latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
        return _without_functions(expression)
    except MemoryError:
        raise
    except Exception:
        return None


def _without_functions(expression: Any) -> Any:
    """Replaces undefined functions such as `x(t)` with variables, because they cannot be evaluated."""
    from sympy.core.function import AppliedUndef

    applied = expression.atoms(AppliedUndef) if isinstance(expression, _sympy().Basic) else ()
    return (
        expression.xreplace({f: _sympy().Symbol(str(f), real=True) for f in applied})
        if applied
        else expression
    )


def _normalized(text: str) -> str:
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex

    text = re.sub(r"(\d+|\))\s?\^\s?\\circ", r"(\1 \\cdot \\frac{\\pi}{180})", text)
    config = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
    )
    return normalize_latex(text, config)


def is_scalar(expression: Any) -> bool:
    """Returns whether a parsed expression has a value at a point, unlike sets, relations, matrices, and derivatives."""
    sympy = _sympy()
    return isinstance(expression, sympy.Expr) and not expression.has(
        sympy.Derivative, sympy.Integral
    )


def equal_expressions(gold: str, answer: str) -> bool:
    """Compares two expressions as numbers or as functions of their variables.

    If both are real at some points, only those points are compared: `\\sqrt{1/n}` equals `1/\\sqrt{n}`, which holds for
    positive n, but `|x|` does not equal `x`.
    """
    left, right = parse(gold), parse(answer)
    if left is None or right is None or not (is_scalar(left) and is_scalar(right)):
        return left is not None and left == right
    if left == right:
        return True
    samples = values_at_points(left, right)
    both_real = [(a, b) for a, b in samples if _is_real(a) and _is_real(b)]
    samples = both_real or samples
    num_needed = 2 if left.free_symbols | right.free_symbols else 1
    may_be_rounded = ("." in gold) != ("." in answer)
    return len(samples) >= num_needed and all(
        _equal_values(a, b, may_be_rounded) for a, b in samples
    )


def _is_real(value: Any) -> bool:
    return abs(value.imag) <= EXACT_TOLERANCE * abs(value)


def _equal_values(gold: Any, answer: Any, may_be_rounded: bool) -> bool:
    tolerance = EXACT_TOLERANCE * max(abs(gold), abs(answer))
    if may_be_rounded:
        tolerance = max(tolerance, DECIMAL_TOLERANCE * min(1, abs(gold)))
    return abs(gold - answer) <= tolerance


def values_at_points(left: Any, right: Any) -> list[tuple[Any, Any]]:
    """Returns the values of two expressions, as 30-digit complex numbers, at the points where both are finite."""
    sympy = _sympy()
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    samples = []
    for point in _POINTS if symbols else _POINTS[:1]:
        is_integer = "." not in point[0]
        values = {
            symbol: sympy.Integer(int(point[i % 3]) + i // 3)
            if is_integer
            else sympy.Float(point[i % 3], 40) + sympy.Float(i, 40) / 97
            for i, symbol in enumerate(symbols)
        }
        pair = evaluate(left.subs(values)), evaluate(right.subs(values))
        if pair[0] is not None and pair[1] is not None:
            samples.append(pair)
    return samples


def evaluate(expression: Any) -> Any:
    """Returns the value of an expression as an mpmath complex number; None if it has no finite value."""
    import mpmath

    try:
        parts = expression.evalf(30).as_real_imag()
        if not all(part.is_Float or part.is_Rational for part in parts):
            return None
        with mpmath.workdps(30):
            value = mpmath.mpc(*(_as_mpf(part) for part in parts))
            return value if mpmath.isfinite(value) else None
    except MemoryError:
        raise
    except Exception:
        return None


def _as_mpf(part: Any) -> Any:
    """Converts a sympy number to an mpmath number. A sum in which all digits canceled becomes 0."""
    import mpmath

    return (
        mpmath.mpf(0)
        if getattr(part, "_prec", 30) == 1
        else mpmath.mpf(_sympy().Float(part, 30)._mpf_)
    )


def are_near(sides: Sequence[str]) -> bool:
    """Returns whether the first and last sides of an approximation agree within 5%."""
    values = [_value(side) for side in (sides[0], sides[-1])]
    return None not in values and abs(values[0] - values[1]) <= 0.05 * abs(values[0])


def _value(text: str) -> Any:
    number = read_number(text)
    if number is not None:
        return float(number[0]) if abs(number[0]) < 10**300 else None
    expression = parse(text)
    if expression is None or not is_scalar(expression) or expression.free_symbols:
        return None
    value = evaluate(expression)
    return None if value is None or value.imag else float(value.real)


def variables(text: str) -> set[str]:
    """Returns the names of the variables in an expression."""
    return {str(symbol) for symbol in getattr(parse(text), "free_symbols", ())}

r"""Normalizes different notations of the same answer to one LaTeX form.

Models and datasets write the same number as `70,000`, `70{,}000`, `7e4`, `7 \times 10^4`, `\$70000`, `70000 dollars` or
`\text{70000}.`; `read_answer` normalizes them to a LaTeX expression and a unit. Only the notation changes; nothing is
evaluated. Every function makes a small number of passes over the text, and each pass takes linear time.
"""

import dataclasses
import re
import unicodedata

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau",
    "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda",
    "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
SYMBOLS = str.maketrans(
    {character: rf"\{name} " for character, name in GREEK.items()}
    | {
        "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ",
        "−": "-", "–": "-", "—": "-", "‒": "-", "‐": "-", "‑": "-", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ",
        "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ",
        "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "′": "'", "’": "'", "″": "''",
        "⟨": r"\langle ", "⟩": r"\rangle ", "，": ",", "：": ":", "．": ".", "（": "(", "）": ")", "％": "%",
        "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "",
    }
)  # fmt: skip
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
FUNCTIONS = ("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc", "sqrt",
             "log", "ln", "exp", "pi", "infty", "theta", "alpha", "beta", "gamma", "lambda", "omega", "phi", "sigma")  # fmt: skip


def _root(match: re.Match) -> str:
    command = r"\sqrt" if match[1] == "√" else r"\sqrt[3]"
    return f"{command}{{{match[2]}}}" if match[2] else command


# Each pattern is applied once to the whole text, in this order.
REWRITES = [
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}"),
    (re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: "_{" + m[0].translate(SUBSCRIPTS) + "}"),
    (re.compile(r"([∛√])\s?(\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+|(?=[({\[]))"), _root),
    (re.compile(r"\\\\(?=[a-zA-Z])"), r"\\"),  # a doubled backslash before a command is a typo
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])\.?|\\(?:display|text|script)style|\\limits|\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:thin|en)space(?![a-zA-Z])|\\hspace\{[^{}]*\}|\s"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s?(\d)\s?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s?(\d)\s?\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s?\{[^{}]*\})\s?(\d)"), r"\1{\2}"),
    (re.compile(r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\(?:neq|not\s?=)(?![a-zA-Z])|!=|/="), r"\\ne "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\(?:varnothing|phi\s?\\text\{[^{}]*\})"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\[lr]?vert(?![a-zA-Z])|\\mid(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:degree|deg)(?![a-zA-Z])|\^\s?\{?\s?\\circ\s?\}?"), r"^\\circ "),
    (re.compile(r"\\dots[bcmio]?(?![a-zA-Z])|\\ldots|\\cdots"), "..."),
    (re.compile(r"\\text(?:sc|sf|tt|up)\b"), r"\\text"),
    (re.compile(r"(?<![\w\\])(?:np|math|numpy)\.(?=[a-z])"), ""),
]  # fmt: skip
WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|emph|operatorname|boldsymbol|bm)\*?\s?\{([^{}]*)\}"
)
BARE_FUNCTION = re.compile(rf"(?<![\\a-zA-Z])({'|'.join(FUNCTIONS)})(?![a-zA-Z])")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,6})(?!\w)")
# Words and signs that introduce an answer without changing it.
LEADING = re.compile(
    r"(?:\\approx|\\sim|\\simeq|\\cong|[=:≃≅]|(?i:approximately|approx\.?|about|roughly|around|exactly|equal to|equals)\b)\s*"
    r"|(?i:just|only|simply|therefore|thus|then|at)\s+(?=[$\\(\d+.-])"
)
EMPHASIS = "*_`"
TRAILING = " .,;:"


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer in normalized notation.

    Attributes:
      text: LaTeX without delimiters, spacing commands, text wrappers, emphasis, or a final period.
      unit: "%", "degree", a canonical name such as "cm^2", other words after a number, or "" if there is no unit.
    """

    text: str
    unit: str = ""

    @property
    def has_known_unit(self) -> bool:
        """Whether this module knows the unit and can therefore compare it with another one."""
        return self.unit in UNITS.values() or "^" in self.unit or "/" in self.unit


_UNIT_NAMES = """
%: percent percentage pct \\%
degree: degrees deg ^\\circ
$: dollar dollars usd \\$
cent: cents ¢
euro: euros eur €
pound_sterling: £ gbp
yen: ¥ yuan rmb
rupee: rupees rs ₹
mm: millimeter millimeters millimetre millimetres
cm: centimeter centimeters centimetre centimetres
dm: decimeter decimeters
m: meter meters metre metres
km: kilometer kilometers kilometre kilometres
in: inch inches
ft: foot feet
yd: yard yards
mi: mile miles
mg: milligram milligrams
g: gram grams
kg: kilogram kilograms
lb: lbs
ml: milliliter milliliters mL
l: L liter liters litre litres
ms: millisecond milliseconds
s: sec secs second seconds
min: mins minute minutes
h: hr hrs hour hours
day: days
week: weeks
month: months
year: years yr yrs
am: a.m. a.m AM
pm: p.m. p.m PM
mi/h: mph
km/h: kmh kph kmph
m/s:
Hz: hertz
N: newton newtons
J: joule joules
kJ:
W: watt watts
V: volt volts
A: ampere amperes amp amps
K: kelvin kelvins
Pa:
mol: mole moles
eV:
nm:
rad: radian radians
unit: units
"""
UNITS = {
    name: line.partition(":")[0]
    for line in _UNIT_NAMES.strip().split("\n")
    for name in (line.partition(":")[0], *line.partition(":")[2].split())
}
# A single letter after a number could be a variable; it is treated as a unit only after a number and a space.
_UNIT = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
_WORD = r"[A-Za-z][A-Za-z.'-]+"
NUMERAL = r"[+-]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?(?:\\times|\\cdot|\*)\s?10\s?\^\s?(?:\{[+-]?\d+\}|\d))?"
WITH_UNIT = re.compile(
    rf"(?P<value>.*?[\d)}}a-z])(?P<space>\s*)(?P<squared>(?:square|sq\.?|cubic)\s)?(?P<unit>{_UNIT})(?:\s?\^\s?\{{?(?P<power>[23])\}}?)?"
    rf"(?:\s?(?:/|per)\s?(?P<per>{_UNIT})(?:\s?\^\s?\{{?(?P<per_power>[23])\}}?)?)?",
    re.DOTALL,
)
WITH_WORDS = re.compile(
    rf"(?P<value>(?:{NUMERAL}|.*[)}}]))\s+(?P<unit>{_WORD}(?:\s+{_WORD}){{0,4}})", re.DOTALL
)
# Words that change the value of the number before them and are therefore not units.
NO_UNIT = re.compile(
    r"(?i)\b(?:and|or|to|mod|times|over|plus|minus|factorial|squared|cubed|if|for|when|where|less|more|hundred|thousand|"
    r"million|billion|trillion|dozen|half|not|is|are|pi|sqrt|base|choose|through|until|from|except)\b"
)
MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MULTIPLIED = re.compile(rf"({NUMERAL})\s+({'|'.join(MULTIPLIERS)})\b", re.IGNORECASE)


def read_answer(text: str) -> Answer:
    r"""Normalizes the notation of an answer.

    >>> read_answer(r"\$70{,}000.")
    Answer(text='70,000', unit='$')
    >>> read_answer(r"\text{12 cm}^2")
    Answer(text='12', unit='cm^2')
    >>> read_answer("√2 ≈ 1.41").text
    '\\sqrt{2} \\approx 1.41'
    """
    text, unit = _take_currency(_in_latex(text))
    text = MULTIPLIED.sub(lambda m: rf"{m[1]}\times 10^{{{MULTIPLIERS[m[2].lower()]}}}", text)
    if not unit:
        text, unit = _take_unit(text)
    return Answer(_strip(text), unit)


def _in_latex(text: str) -> str:
    """Converts text to LaTeX without delimiters, wrappers, or emphasis."""
    text = "".join(_ascii(character) for character in text) if not text.isascii() else text
    text = text.translate(SYMBOLS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\[()\[\]]|(?<!\\)\$", " ", text)
    for _ in range(3):  # wrappers may be nested
        text = WRAPPER.sub(r" \1 " if "\\text" in text else r"\1", text)
    text = BARE_FUNCTION.sub(r"\\\1", text)
    text = SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = (
        text.replace("**", "^") if re.search(r"\w\s?\*\*\s?[\w(]", text.strip(EMPHASIS)) else text
    )
    text = _strip(text)
    while match := LEADING.match(text):
        text = _strip(text[match.end() :])
    return re.sub(r"\s+", " ", text)


def _ascii(character: str) -> str:
    """Converts Unicode fullwidth forms, fractions, and spaces to ASCII."""
    if "０" <= character <= "ｚ":
        return unicodedata.normalize("NFKC", character)
    if unicodedata.category(character) == "No" and "FRACTION" in unicodedata.name(character, ""):
        over, _, under = unicodedata.normalize("NFKC", character).partition("⁄")
        return rf"\frac{{{over}}}{{{under}}}" if under else character
    return " " if character.isspace() else character


def _strip(text: str) -> str:
    """Removes spaces, emphasis, and final punctuation around an answer."""
    while (stripped := text.strip().strip(EMPHASIS).rstrip(TRAILING).lstrip()) != text:
        text = stripped
    return text


def _take_currency(text: str) -> tuple[str, str]:
    """Splits off a leading currency sign."""
    match = re.match(r"([+-]?)\s?(\\\$|[€£¥₹]|(?:USD|US\\?\$)(?=\s?\d))\s?(?=[\d.\\(-])", text)
    if match is None:
        return text, ""
    return match[1] + text[match.end() :], UNITS.get(match[2], "$")


def _take_unit(text: str) -> tuple[str, str]:
    """Splits off a unit, or other words, after a number."""
    if (match := WITH_UNIT.fullmatch(text)) and _may_have_unit(match):
        unit = UNITS[match["unit"]]
        power = match["power"] or {"s": "2", "c": "3"}.get((match["squared"] or " ")[0], "")
        unit += f"^{power}" if power else ""
        if match["per"]:
            unit += (
                "/" + UNITS[match["per"]] + (f"^{match['per_power']}" if match["per_power"] else "")
            )
        return match["value"], unit
    match = WITH_WORDS.fullmatch(text)
    if match and _is_numeric(match["value"]) and not NO_UNIT.search(match["unit"]):
        return match["value"], match["unit"].lower()
    return text, ""


def _is_numeric(text: str) -> bool:
    """Returns whether a string has digits and, apart from LaTeX commands, no words."""
    without_commands = re.sub(r"\\[a-zA-Z]+", "", text)
    return bool(re.search(r"\d", text)) and not re.search(r"[A-Za-z]{3}", without_commands)


def _may_have_unit(match: re.Match) -> bool:
    """Returns whether a number precedes the unit, and the unit is not a variable multiplied by it."""
    value = match["value"]
    letters = re.sub(r"\\(?:pi|frac|sqrt|times|cdot|pm)(?![a-zA-Z])", "", value)
    if re.search(r"[A-Za-z\\]", letters) or not re.search(r"\d|\\pi", value):
        return False
    # `5 m` is a length, but `5m` may be a product; `5%` and `5cm` have no other meaning.
    return bool(match["space"]) or len(match["unit"]) > 1 or not match["unit"].isalpha()

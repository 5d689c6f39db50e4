"""Parses calendar dates, so that they are compared as dates: 2024-03-05 is not the difference 2016."""

import datetime
import re

MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
NUMBERS = {name: i for i, month in enumerate(MONTHS, 1) for name in (month, month[:3])}
NUMBERS["sept"] = 9
_MONTH = rf"(?P<month>{'|'.join(NUMBERS)})\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?P<year>\d{4})"
_FORMS = (
    re.compile(rf"{_YEAR}-(?P<month>\d{{1,2}})-(?P<day>\d{{1,2}})"),
    re.compile(rf"{_MONTH}\s{_DAY},?\s{_YEAR}", re.IGNORECASE),
    re.compile(rf"{_DAY}\s(?:of\s)?{_MONTH},?\s{_YEAR}", re.IGNORECASE),
)
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf)\s?\{([^{}]*)\}")
MAX_CHARS = 60


def read_date(text: str) -> datetime.date | None:
    """Parses a string as a date; returns None if it is not a date.

    ISO 8601 dates and English dates with the month spelled out are accepted. Ambiguous all-numeric dates such as
    3/5/2024, whose day-month order depends on the locale, are not.

    >>> read_date("2024-03-05") == read_date("March 5th, 2024") == read_date("5 Mar 2024")
    True
    >>> read_date("2024-13-05")
    """
    if len(text) > MAX_CHARS:
        return None
    plain = " ".join(_WRAPPER.sub(r"\1", text).strip(" .$").split())
    for form in _FORMS:
        if match := form.fullmatch(plain):
            month = match["month"].lower()
            try:
                return datetime.date(
                    int(match["year"]), NUMBERS.get(month) or int(month), int(match["day"])
                )
            except ValueError:  # no such day
                return None
    return None

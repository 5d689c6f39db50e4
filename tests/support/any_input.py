"""Provides strategies for untrusted input, and checks that reading it yields a value or a one-line `UserError`."""

import contextlib
import copy

from hypothesis import strategies as st

from trapo_jax.types import UserError

# Maximum length of a line of an error message. Escaping makes messages longer than the input that they quote.
MAX_MESSAGE_CHARS = 4000

# Lone surrogates, control characters and other strings that libraries often mishandle.
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\ud800", "\0", "\n", "a\u2028b", "x" * 300, "nan", "1e999", "-1", "{", "[1"]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from([0.5, 1e-300, 1e300]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@contextlib.contextmanager
def value_or_user_error(*, max_lines=1):
    """Suppresses a `UserError`, after checking that its message has at most `max_lines` lines of limited length."""
    try:
        yield
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert message.count("\n") < max_lines, message
        assert len(message) < MAX_MESSAGE_CHARS * max_lines, message


@st.composite
def changed(draw, original):
    """Returns a copy of JSON-like data with one or two parts replaced, removed or repeated."""
    data = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(_places(data)))
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "remove":
            del container[key]
        elif action == "repeat" and isinstance(container, list):
            container.append(container[key])
        else:
            container[key] = draw(VALUES)
        if not data:
            break
    return data


def _places(data):
    """Returns all (container, key) pairs in JSON-like data."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    places = []
    for key in keys:
        places.append((data, key))
        if isinstance(data[key], dict | list):
            places += _places(data[key])
    return places

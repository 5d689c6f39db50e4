"""Defines problems and their expert solutions."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


# Where an expert prefix may end: at any token, or only at the end of a paragraph.
PrefixBoundary = Literal["exact", "paragraph"]


# The part of an expert solution to train on: the text inside `<think>...</think>` if present, or the whole solution.
ExpertPart = Literal["thought", "whole"]


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert solution of a problem, tokenized for the policy.

    Attributes:
      token_ids: the solution with EOS appended.
      paragraph_ends: lengths of the prefixes whose last token contains or completes a blank line, in ascending order.
    """

    token_ids: tuple[int, ...]
    paragraph_ends: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """One training or evaluation problem.

    Attributes:
      id: 16 hexadecimal digits derived from the content; problems with equal content have equal ids.
      prompt_ids: token ids of the prompt, with the chat template applied.
      answer: the reference answer for the grader.
      experts: zero or more expert solutions, in order of preference.
      prompt_text: the prompt as readable text.
      source: name used to group results, such as a data source or a difficulty.
      columns: other columns of the dataset row, for reward functions; JSON-serializable.
    """

    id: str
    prompt_ids: tuple[int, ...]
    answer: str
    experts: tuple[Expert, ...] = ()
    prompt_text: str = ""
    source: str = ""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def key(self) -> int:
        """The first 32 bits of the id, for deriving random keys."""
        return int(self.id[:8], 16)


def find_by_source(by_source: Mapping[str, T], source: str) -> T | None:
    """Returns the value of the first `fnmatch` pattern that matches a source, ignoring case; None if none matches.

    >>> find_by_source({"aime*": 32}, "AIME24")
    32
    """
    for pattern, value in by_source.items():
        if fnmatch.fnmatchcase(source.lower(), pattern.lower()):
            return value
    return None

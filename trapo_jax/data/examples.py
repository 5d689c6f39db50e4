"""Defines raw examples, before templating and tokenization, and the report of what was dropped."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Plain text, or the turns of a chat, ending with a user turn."""


class Example(NamedTuple):
    """One problem as it appears in the data.

    Attributes:
      prompt: text or chat messages.
      answer: reference answer for the grader.
      solutions: zero or more expert solutions, in order of preference.
      source: name used to group results.
      columns: additional columns of the row for reward functions; JSON-serializable.
    """

    prompt: Prompt
    answer: str
    solutions: tuple[str, ...]
    source: str
    columns: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of rows or examples read, kept and dropped; `str(report)` is a one-line summary.

    Attributes:
      num_read: number of rows or examples read.
      num_kept: number of rows or examples kept.
      dropped: number of rows or examples dropped, keyed by reason; the values sum to `num_read - num_kept`.
      notes: other counts for the kept rows or examples (such as truncated prompts or dropped expert solutions), keyed
        by description.
      absent: optional column paths that no row has.
      prompt_limit: maximum prompt length in tokens; 0 if prompts were not encoded.
      longest_prompt: length of the longest prompt that was read, such as "70 tokens" or, if it was far too long to be
        encoded, "90,000 characters".
    """

    num_read: int
    num_kept: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    absent: Sequence[str] = ()
    prompt_limit: int = 0
    longest_prompt: str = ""

    def __str__(self) -> str:
        line = f"{self.num_kept} of {self.num_read} kept"
        if self.dropped:
            line += "; dropped: " + _counts(self.dropped)
        if self.notes:
            line += "; noted: " + _counts(self.notes)
        return line


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))

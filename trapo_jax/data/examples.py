"""A raw example, before template and tokenizer, and what was left out on the way to it."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]
"""Text as it stands, or the turns of a chat, of which the last is the user's."""


class Example(NamedTuple):
    """One problem as the data gives it.

    Attributes:
      prompt: text or chat messages.
      answer: what the grader compares with.
      solutions: texts of zero or more expert solutions, in order of preference.
      source: the name under which results are grouped.
      columns: further columns of the row, for reward functions; JSON-serializable.
    """

    prompt: Prompt
    answer: str
    solutions: tuple[str, ...]
    source: str
    columns: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of what was read; `str(report)` is one line for people.

    Attributes:
      num_read: rows or examples read.
      num_kept: of these, how many came out.
      dropped: how many did not, by reason; they sum to `num_read - num_kept`.
      notes: what else happened to those kept (prompts or experts cut, experts left out), by what.
      absent: optional paths of columns that no row has.
    """

    num_read: int
    num_kept: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    absent: Sequence[str] = ()

    def __str__(self) -> str:
        line = f"{self.num_kept} of {self.num_read} kept"
        if self.dropped:
            line += "; dropped: " + _counts(self.dropped)
        if self.notes:
            line += "; noted: " + _counts(self.notes)
        return line


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))

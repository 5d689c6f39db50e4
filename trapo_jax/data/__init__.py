"""Loads problems from files, the Hub, or a generator, and groups them into batches that the step number determines.

rows = read_rows(["train.parquet"])                                  # sources.py
examples, report = examples_from_rows(rows, COLUMN_PRESETS["verl"])  # layouts.py, columns.py
template = make_template("qwen_math", tokenizer)                     # templates.py
problems, report = encode_examples(examples, tokenizer, template=template, max_prompt_length=1024)
"""

from trapo_jax.data.card_shuffles import card_shuffles_splits
from trapo_jax.data.columns import examples_from_rows
from trapo_jax.data.examples import DataReport, Example, Message
from trapo_jax.data.layouts import COLUMN_PRESETS, Columns, find_preset, merge_rows
from trapo_jax.data.problems import (
    draw_problems,
    encode_examples,
    fingerprint,
    hold_out,
    problem_batches,
)
from trapo_jax.data.reasoning_gym import reasoning_gym_splits
from trapo_jax.data.sources import Row, read_rows
from trapo_jax.data.templates import TEMPLATES, Template, make_template

__all__ = [
    "COLUMN_PRESETS",
    "TEMPLATES",
    "Columns",
    "DataReport",
    "Example",
    "Message",
    "Row",
    "Template",
    "card_shuffles_splits",
    "draw_problems",
    "encode_examples",
    "examples_from_rows",
    "find_preset",
    "fingerprint",
    "hold_out",
    "make_template",
    "merge_rows",
    "problem_batches",
    "read_rows",
    "reasoning_gym_splits",
]

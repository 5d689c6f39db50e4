"""Tests that arbitrary rows, JSON files, chat templates and messages yield examples and text, or a one-line error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.any_input import TEXTS, VALUES, changed, value_or_user_error
from trapo_jax.data import (
    COLUMN_PRESETS,
    Columns,
    Message,
    Template,
    examples_from_rows,
    find_preset,
    read_rows,
)
from trapo_jax.data.chat_worker import _reply
from trapo_jax.data.columns import expert_text
from trapo_jax.data.sources import Row
from trapo_jax.data.templates import DATE

CHAT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
SOLUTION = {"role": "assistant", "content": "<think>T</think>A"}
# A row with the columns of all presets.
ROW = {
    "prompt": CHAT,
    "problem": "Q",
    "question": "Q",
    "answer": "It is 4.\n#### 4",
    "solution": "S",
    "completion": "S",
    "target": [SOLUTION],
    "messages": [*CHAT, SOLUTION],
    "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
    "source": "s",
    "data_source": "s",
    "reward_model": {"ground_truth": "4"},
    "extra_info": {"answer_list": ["S", "T"]},
}
PATHS = st.sampled_from([*ROW, "reward_model.ground_truth", "extra_info.answer_list?", "a.b", "x?"])
LAYOUTS = st.sampled_from(list(COLUMN_PRESETS.values())) | st.builds(
    Columns,
    prompt=PATHS,
    answer=PATHS,
    solutions=st.lists(PATHS, max_size=2).map(tuple),
    source=PATHS | st.just(""),
    answer_marker=st.sampled_from(["", "####"]),
    extra=st.lists(PATHS, max_size=2).map(tuple),
)


@given(
    rows=st.lists(changed(ROW), min_size=1, max_size=2), columns=LAYOUTS, needs_answer=st.booleans()
)
def test_any_rows_yield_examples_or_are_rejected(rows, columns, needs_answer):
    rows = [Row("f.jsonl", i, values) for i, values in enumerate(rows, start=1)]
    with value_or_user_error():
        find_preset(rows[0])
    with value_or_user_error():
        examples, _ = examples_from_rows(rows, columns, needs_answer=needs_answer)
        for example in examples:
            json.dumps(example, ensure_ascii=False, default=dict).encode()


@given(solution=st.lists(st.sampled_from(["<think>", "</think>", "a", " "])).map("".join))
def test_any_solution_has_an_expert_text(solution):
    whole, thought = expert_text(solution, "whole"), expert_text(solution)
    assert whole == solution.strip()
    assert len(thought) <= len(whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


PIECES = st.sampled_from(
    [*'[]{}:,"\n \\0', '{"a": 1}', '{"a": 1},\n', "\ufeff", "é", "\\ud800", "1e999", "null"]
)


@given(
    content=st.lists(PIECES, max_size=10).map(lambda pieces: "".join(pieces).encode())
    | st.binary(),
    suffix=st.sampled_from([".jsonl", ".json"]),
)
def test_any_json_file_has_rows_or_is_rejected(content, suffix, folder):
    file = folder / f"rows{suffix}"
    file.write_bytes(content)
    with value_or_user_error():
        assert all(isinstance(row.values, dict) for row in read_rows([str(file)]))


@given(values=st.lists(VALUES, max_size=4), indent=st.sampled_from([None, 1]))
def test_a_json_list_has_the_rows_that_the_json_module_reads(values, indent, folder):
    values = [value if isinstance(value, dict) else {"value": value} for value in values]
    (folder / "list.json").write_text(text := json.dumps(values, indent=indent))
    if values:
        rows = [row.values for row in read_rows([str(folder / "list.json")])]
        assert json.dumps(rows) == json.dumps(json.loads(text))


MESSAGES = st.lists(st.builds(Message, TEXTS, TEXTS), min_size=1, max_size=3).map(tuple)
STATEMENTS = st.sampled_from(
    [
        *(
            "{{ ",
            " }}",
            "{% ",
            " %}",
            "{# ",
            "{%- ",
            "messages",
            "[0]",
            "[-1]",
            ".content",
            ".role",
            "['role']",
        ),
        *(
            " | ",
            "tojson",
            "upper",
            "length",
            "join",
            "if ",
            "else",
            "endif",
            "endfor",
            "for m in messages",
            "m",
        ),
        *(
            "set x = ",
            "1",
            "'a'",
            "'\\ud800'",
            "\ud800",
            " + ",
            " * 99999",
            "raise_exception('x')",
            "namespace()",
        ),
        *(
            ".__class__",
            "strftime_now('%Y')",
            "eos_token",
            "generation",
            "endgeneration",
            "break",
            "\n",
            "(",
        ),
    ]
)
SOURCES = st.lists(STATEMENTS, max_size=10).map("".join)


@given(source=SOURCES | SOURCES.map(lambda source: "{{ " + source + " }}"), messages=MESSAGES)
def test_any_chat_template_prints_unicode_or_is_rejected(source, messages):
    chat = [message._asdict() for message in messages]
    for request in (chat, None):
        reply = _reply(request, 10_000, source, {"eos_token": "</s>"}, DATE)
        ((kind, value),) = reply.items()
        assert kind in ("text", "variables", "refusal")
        assert kind != "refusal" or "\n" not in value
        assert kind != "text" or len(value.encode()) < 100_000


@given(kind=st.sampled_from(["none", "chatml", "qwen_math"]), prompt=TEXTS | MESSAGES)
def test_any_prompt_is_rendered_or_rejected(kind, prompt):
    with value_or_user_error():
        Template(kind).render(prompt)

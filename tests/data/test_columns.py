"""Tests that rows in known layouts become examples, and that other rows are counted or cause a one-line error."""

import dataclasses
import decimal
import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.commands import REPOSITORY
from trapo_jax.data import COLUMN_PRESETS, Columns, Example, Message, examples_from_rows, read_rows
from trapo_jax.data.columns import expert_text
from trapo_jax.data.layouts import find_preset, merge_rows
from trapo_jax.data.sources import Row
from trapo_jax.types import UserError

COLUMNS = Columns("q", "a", ("s",))
SYSTEM = {"role": "system", "content": "Think twice."}


def rows_of(*values):
    return [Row("f.jsonl", i, value) for i, value in enumerate(values, start=1)]


def example_from(value, columns=COLUMNS):
    (example,), _ = examples_from_rows(rows_of(value), columns)
    return example


def verl_row(**changes):
    """Returns a row in the layout of the released training data."""
    row = {
        "data_source": "openr1",
        "prompt": [SYSTEM, {"role": "user", "content": "What is 1 + 1?"}],
        "target": [{"role": "assistant", "content": "<think>\nOne and one.\n</think>It is 2."}],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {
            "answer_list": ["<think>\nOne and one.\n</think>\n2", "<think>1, 2</think> So 2."],
            "index": 0,
            "split": "default",
        },
    }
    return row | changes


def test_verl_preset_reads_parquet(tmp_path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([verl_row()] * 3), file)
    examples, report = examples_from_rows(read_rows([str(file)]), COLUMN_PRESETS["verl"])
    prompt = (Message("system", "Think twice."), Message("user", "What is 1 + 1?"))
    assert examples == [Example(prompt, "2", ("One and one.", "1, 2"), "openr1")] * 3
    assert (report.num_read, report.num_kept, report.dropped) == (3, 3, {})
    ((note, count),) = report.notes.items()
    assert note.startswith(
        "with a list of solutions (each entry is one alternative expert solution"
    )
    assert count == 3


def test_verl_preset_falls_back_to_target_and_then_to_no_expert():
    alone = example_from(verl_row(extra_info={"index": 0}), COLUMN_PRESETS["verl"])
    assert alone.solutions == ("One and one.",)
    text = example_from(verl_row(extra_info=None, target="It is 2."), COLUMN_PRESETS["verl"])
    assert text.solutions == ("It is 2.",)
    bare = verl_row(extra_info={"index": 0})
    del bare["target"]
    examples, report = examples_from_rows(rows_of(bare), COLUMN_PRESETS["verl"])
    assert examples[0].solutions == ()
    assert report.notes == {"without an expert solution": 1}


def test_trl_preset_reads_text_and_chat_messages():
    trl = COLUMN_PRESETS["trl"]
    text = example_from({"prompt": "1 + 1?", "solution": "One more is 2.", "answer": "2"}, trl)
    assert text == Example("1 + 1?", "2", ("One more is 2.",), "")
    chat = example_from({"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}, trl)
    assert chat == Example((Message("user", "1 + 1?"),), "2", (), "")


@pytest.mark.parametrize(
    ("last_line", "answer"), [("#### 42", "42"), ("#### 1,080", "1080"), ("####-3.5 ", "-3.5")]
)
def test_gsm8k_preset_takes_the_answer_after_the_marker(last_line, answer):
    text = f"She has <<40+2=42>>42 of them.\n{last_line}"
    example = example_from({"question": "How many?", "answer": text}, COLUMN_PRESETS["gsm8k"])
    assert example == Example("How many?", answer, (text.strip(),), "")


def test_custom_columns_with_dotted_paths_and_several_experts():
    columns = Columns("in.text", "out", ("a", "b.c", "d?"), source="kind")
    value = {
        "in": {"text": "Q"},
        "out": 7,
        "a": ["x", None, "y"],
        "b": {"c": "y"},
        "kind": "k",
    }
    assert example_from(value, columns) == Example("Q", "7", ("x", "y"), "k")


@pytest.mark.parametrize(
    ("value", "answer"), [(7, "7"), (7.0, "7"), (0.5, "0.5"), (" x ", "x"), (-1, "-1")]
)
def test_answers_may_be_strings_or_numbers(value, answer):
    assert example_from({"q": "Q", "a": value, "s": "S"}).answer == answer


def test_rows_without_a_source_get_the_default_source():
    columns = Columns("q", "a", source="kind?")
    row = {"q": "Q", "a": "1"}
    rows = rows_of(row, row | {"kind": "k"}, row | {"kind": None}, row | {"kind": " "})
    examples, _ = examples_from_rows(rows, columns, default_source="mine")
    assert [example.source for example in examples] == ["mine", "k", "mine", "mine"]


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("plain", "plain"),
        ("<think>a\nb</think>c", "a\nb"),
        ("x<think>a</think>b<think>c</think>", "a"),
        ("<think>\n\n</think>\n\nc", "c"),
        ("<think>never closed", "<think>never closed"),
        ("  ", ""),
    ],
)
def test_the_expert_text_is_the_content_of_the_think_tags(solution, text):
    assert expert_text(solution) == text


def test_dropped_rows_are_counted_by_reason():
    good = {"q": "Q", "a": "1", "s": "S"}
    user = {"role": "user", "content": " "}
    rows = rows_of(
        good,
        good | {"q": ""},
        good | {"q": None},
        good | {"q": []},
        good | {"q": [user]},
        good | {"a": None},
        good | {"a": " "},
        good | {"a": float("nan")},
        good | {"q": "\ud800"},
        good | {"s": json.loads('"\\udfff"')},
        good | {"s": ""},
        good | {"s": None},
    )
    examples, report = examples_from_rows(rows, COLUMNS)
    assert [example.solutions for example in examples] == [("S",), (), ()]
    assert report.dropped == {
        "with an empty prompt": 4,
        "with an empty answer": 3,
        "with text that is not Unicode": 2,
    }
    assert sum(report.dropped.values()) == report.num_read - report.num_kept
    assert str(report) == (
        "3 of 12 kept; dropped: 3 with an empty answer, 4 with an empty prompt, "
        "2 with text that is not Unicode; noted: 2 without an expert solution"
    )


def test_rows_without_the_answer_marker_are_counted():
    rows = rows_of({"question": "Q", "answer": "#### 1"}, {"question": "Q", "answer": "1"})
    _, report = examples_from_rows(rows, COLUMN_PRESETS["gsm8k"])
    assert report.dropped == {"without #### in the answer": 1}


@pytest.mark.parametrize("change", [{"q": "Q" * 10**6}, {"s": "S" * 10**6}, {"deep": "x" * 10**6}])
def test_rows_with_too_many_characters_are_dropped_and_counted(change):
    columns = dataclasses.replace(COLUMNS, extra=("deep",))
    examples, report = examples_from_rows(rows_of(GOOD, GOOD | change), columns)
    assert len(examples) == 1
    assert report.dropped == {"with more than 1,000,000 characters": 1}


def test_a_role_that_is_not_unicode_is_counted():
    chat = [{"role": "\ud800", "content": "S"}, {"role": "user", "content": "Q"}]
    _, report = examples_from_rows(rows_of(GOOD, GOOD | {"q": chat}), COLUMNS)
    assert report.dropped == {"with text that is not Unicode": 1}


def test_error_about_a_wide_or_deep_row_is_short():
    deep = json.loads('{"a":' * 500 + "1" + "}" * 500)
    for values in ({f"column{i}": 1 for i in range(10**4)}, {"x": deep}):
        with pytest.raises(UserError, match="fit no preset") as caught:
            find_preset(rows_of(values)[0])
        assert len(str(caught.value)) < 500


def test_no_usable_row_raises_with_counts():
    rows = rows_of({"q": "", "a": "1", "s": ""}, {"q": "Q", "a": "", "s": ""})
    with pytest.raises(
        UserError, match=r"^f\.jsonl: no row is usable: 0 of 2 kept; dropped: 1 with an empty ans"
    ):
        examples_from_rows(rows, COLUMNS)


GOOD = {"q": "Q", "a": "1", "s": "S", "deep": {"x": "X"}}
MALFORMED = [
    (GOOD, Columns("q.x", "a"), r"column 'q\.x': is str \('Q'\), not an object with a field 'x'"),
    (GOOD | {"q": 7}, COLUMNS, r"column 'q': is int \(7\), not text or a list of chat messages"),
    (GOOD | {"q": ["Q"]}, COLUMNS, r"column 'q': is list"),
    (GOOD | {"q": [{"role": "user"}]}, COLUMNS, r"column 'q': is list"),
    (GOOD | {"q": [{"role": "user", "content": [{}]}]}, COLUMNS, r"column 'q': is list"),
    (
        GOOD | {"q": [{"role": "assistant", "content": "Q"}]},
        COLUMNS,
        r"column 'q': ends with the role 'assistant'",
    ),
    (GOOD | {"a": ["1"]}, COLUMNS, r"column 'a': is list \(\['1'\]\), not text or a number"),
    (GOOD | {"a": True}, COLUMNS, r"column 'a': is bool"),
    (GOOD | {"s": 7}, COLUMNS, r"column 's': is int"),
    (GOOD | {"s": [7]}, COLUMNS, r"column 's': is list"),
    (GOOD | {"s": {"text": "S" * 99}}, COLUMNS, r"column 's': is dict \(.{60}\.\.\.\)"),
    (GOOD, Columns("q", "a", source="deep"), r"column 'deep': is dict"),
    (GOOD | {"s": 7}, Columns("q", "a", ("s?",)), r"column 's': is int"),
]


@pytest.mark.parametrize(("value", "columns", "message"), MALFORMED)
def test_malformed_row_error_names_file_row_and_column(value, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        examples_from_rows(rows_of(GOOD | {"kind": "k"}, value), columns)
    row = 1 if columns not in (COLUMNS, Columns("q", "a", ("s?",))) else 2
    assert str(caught.value).startswith(f"f.jsonl, row {row}, column ")
    assert re.search(r"; set data\.columns\.(prompt|answer|solutions|source) to", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        (Columns("q", "key", ("key",)), "solutions"),
        (Columns("key", "key"), "prompt"),
        (Columns("q", "key", source="key"), "source"),
    ],
)
def test_the_error_names_the_option_that_does_not_accept_the_value(columns, option):
    """A number is a valid answer, but not a valid solution, prompt or source."""
    rows = rows_of(GOOD | {"key": 5})
    examples_from_rows(rows, Columns("q", "key"))
    with pytest.raises(
        UserError, match=rf"'key': is int .*; set data\.columns\.{option} to another"
    ):
        examples_from_rows(rows, columns)


def test_optional_columns_that_no_row_has_are_reported():
    columns = Columns("q", "a", ("s?", "t?"), "u?")
    _, report = examples_from_rows(rows_of({"q": "Q", "a": "1"}, GOOD), columns)
    assert report.absent == ("t?", "u?")


@pytest.mark.parametrize(
    ("columns", "path", "option"),
    [
        (Columns("question", "a"), "question", "prompt"),
        (Columns("q", "answer"), "answer", "answer"),
        (Columns("q", "a", ("solution",)), "solution", "solutions"),
        (Columns("q", "a", source="kind"), "kind", "source"),
        (Columns("q", "a", extra=("level",)), "level", "extra"),
        (Columns("deep.y", "a"), "deep.y", "prompt, perhaps to deep.x"),
        (Columns("deepx", "a", ("deepx",)), "deepx", "prompt, perhaps to deep.x"),
        (Columns("q", "A"), "A", "answer, perhaps to a"),
    ],
)
def test_a_column_that_no_row_has_causes_an_error(columns, path, option):
    with pytest.raises(UserError) as caught:
        examples_from_rows(rows_of(GOOD, GOOD), columns)
    assert str(caught.value) == (
        f"f.jsonl: no row has the column {path!r}; the first row has q, a, s, deep.x; set data.columns.{option}"
    )


def test_a_column_that_is_missing_in_one_of_two_files_causes_an_error():
    rows = [Row("a.jsonl", 1, GOOD), Row("b.jsonl", 1, {"prompt": "Q", "a": "1"})]
    with pytest.raises(UserError, match=r"b\.jsonl: no row has the column 'q'"):
        examples_from_rows(rows, Columns("q", "a"))


def test_a_field_that_is_absent_from_a_row_counts_as_null():
    rows = rows_of(GOOD, {"a": "1", "s": "S"}, {"q": "Q", "s": "S"}, {"q": "Q", "a": "1"})
    examples, report = examples_from_rows(rows, COLUMNS)
    assert [example.solutions for example in examples] == [("S",), ()]
    assert report.dropped == {"with an empty prompt": 1, "with an empty answer": 1}


def test_answers_may_be_absent_if_nothing_is_graded():
    rows = rows_of({"q": "Q", "s": "S"}, {"q": "R", "s": "S", "a": None})
    examples, _ = examples_from_rows(rows, COLUMNS, needs_answer=False)
    assert [example.answer for example in examples] == ["", ""]
    with pytest.raises(UserError, match=r"set data.columns.answer .* \(now a\)"):
        examples_from_rows(rows, Columns("q", "a?", ("s",)))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (decimal.Decimal("1.50"), "1.5"),
        (decimal.Decimal("100"), "100"),
        (decimal.Decimal("1E+2"), "100"),
        (decimal.Decimal("0.000001"), "0.000001"),
        (1e-05, "0.00001"),
        (2.5e-07, "0.00000025"),
        (1e22, "10000000000000000000000"),
    ],
)
def test_numbers_are_written_without_an_exponent(value, answer):
    assert example_from({"q": "Q", "a": value, "s": "S"}).answer == answer


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), decimal.Decimal("Infinity")])
def test_answers_that_are_not_finite_are_dropped_and_counted(value):
    _, report = examples_from_rows(rows_of(GOOD, GOOD | {"a": value}), COLUMNS)
    assert report.dropped == {"with an answer that is not a finite number": 1}


def test_a_column_may_have_dots_in_its_name():
    value = {"a.b": "x", "c": {"d.e": {"f": "y"}}, "q": "Q", "a": "1"}
    assert example_from(value, Columns("a.b", "c.d.e.f")) == Example("x", "y", (), "")


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is 4."}]


def test_objects_and_chats_stored_as_json_text_are_parsed():
    value = {
        "prompt": json.dumps(CHAT[:1]),
        "reward_model": json.dumps({"ground_truth": "72", "style": "rule"}),
        "target": json.dumps(CHAT[1:]),
    }
    example = example_from(value, COLUMN_PRESETS["verl"])
    assert example == Example((Message("user", "q"),), "72", ("It is 4.",), "")
    assert example_from(GOOD | {"q": "[1, 2] sorted?"}).prompt == "[1, 2] sorted?"
    assert example_from(GOOD | {"q": '[{"role": broken'}).prompt == '[{"role": broken'


@pytest.mark.parametrize(
    ("preset", "value", "prompt"),
    [
        ("messages", {"messages": CHAT}, (Message("user", "q"),)),
        (
            "messages",
            {"messages": [SYSTEM, *CHAT]},
            (Message("system", "Think twice."), Message("user", "q")),
        ),
        ("prompt_completion", {"prompt": "q", "completion": "It is 4."}, "q"),
        (
            "prompt_completion",
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            (Message("user", "q"),),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "It is 4."},
                ]
            },
            (Message("user", "q"),),
        ),
        ("numina", {"problem": "q", "answer": "4", "solution": "It is 4."}, "q"),
        ("trl", {"prompt": "q", "answer": "4", "solution": "It is 4."}, "q"),
        ("gsm8k", {"question": "q", "answer": "It is 4.\n#### 4"}, "q"),
        ("qa", {"question": "q", "answer": "4", "solution": "It is 4."}, "q"),
        ("verl", verl_row(), None),
    ],
)
def test_the_preset_is_inferred_from_a_row(preset, value, prompt):
    assert find_preset(rows_of(value)[0]) == preset
    examples, _ = examples_from_rows(rows_of(value), COLUMN_PRESETS[preset], needs_answer=False)
    if prompt is not None:
        assert examples[0].prompt == prompt
        assert examples[0].solutions[0].startswith("It is 4.")


@pytest.mark.parametrize(
    ("value", "given", "preset"),
    [
        (
            {"q": "q", "a": "1", "solution": "s"},
            {"prompt": "q", "answer": "a"},
            "trl",
        ),
        ({"prompt": "q", "a": "1"}, {"answer": "a"}, "trl"),
        ({"question": "q", "a": "1"}, {"answer": "a"}, "qa"),
        ({"question": "q", "a": "1", "s": "s"}, {"answer": "a", "solutions": ("s",)}, "qa"),
        ({"question": "q", "a": "#### 1"}, {"answer": "a", "solutions": ("a",)}, "gsm8k"),
        ({"q": "q", "answer": "1"}, {"prompt": "q"}, "trl"),
        ({"question": "q", "answer": "#### 1"}, {"solutions": ("answer",)}, "gsm8k"),
        (verl_row(), {"solutions": ("target",)}, "verl"),
    ],
)
def test_explicitly_set_columns_need_not_be_in_the_preset(value, given, preset):
    assert find_preset(rows_of(value)[0], given) == preset


def test_a_preset_is_inferred_from_all_first_rows_of_a_file():
    rows = rows_of({"question": "q"}, {"question": None, "answer": None}, {"answer": "#### 3"})
    assert merge_rows(rows) == rows[0]._replace(values={"question": "q", "answer": "#### 3"})
    assert find_preset(merge_rows(rows)) == "gsm8k"
    other = rows[2]._replace(file="other.jsonl")
    with pytest.raises(UserError, match="the columns are question, which fit no preset"):
        find_preset(merge_rows([rows[0], other]))


def test_a_preset_is_inferred_without_an_answer_column_if_no_answer_is_needed():
    for value, preset in (
        ({"prompt": "q", "solution": "s"}, "trl"),
        ({"question": "q", "solution": "s"}, "qa"),
        ({"prompt": "q", "completion": "s"}, "prompt_completion"),
    ):
        assert find_preset(rows_of(value)[0], needs_answer=False) == preset
    with pytest.raises(UserError, match=r"fit no preset; set .*data\.columns\.answer"):
        find_preset(rows_of({"prompt": "q", "solution": "s"})[0])


@pytest.mark.parametrize(
    ("value", "given", "message"),
    [
        (
            {"input": "q", "meta": {"x": 1}},
            {},
            "input, meta.x, which fit no preset; set data.columns.prompt and data.columns.answer, and data.columns.solutions if there are worked solutions",
        ),
        (
            {"Question": "q", "Answers": "1"},
            {},
            "set data.columns.prompt (perhaps to Question) and data.columns.answer (perhaps to Answers), and data.columns.sol",
        ),
        (
            {"q": "q", "final": "1"},
            {"prompt": "q"},
            "preset; set data.columns.answer, and data.columns.sol",
        ),
    ],
)
def test_the_error_about_columns_that_fit_no_preset_names_them(value, given, message):
    with pytest.raises(UserError) as caught:
        find_preset(rows_of(value)[0], given)
    assert message in str(caught.value)


def test_reads_the_released_math_500_file():
    file = REPOSITORY / "../shared/data/valid.math.parquet"
    if not file.exists():
        pytest.skip(f"{file} does not exist")
    examples, report = examples_from_rows(read_rows([str(file)]), COLUMN_PRESETS["verl"])
    assert (report.num_read, report.num_kept) == (500, 500)
    assert Counter(example.source for example in examples) == {"math": 500}
    assert {tuple(m.role for m in example.prompt) for example in examples} == {("system", "user")}
    assert examples[0].answer == r"\left( 3, \frac{\pi}{2} \right)"

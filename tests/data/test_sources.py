"""Tests that rows are read from real files, and that malformed files cause one-line errors that name the file."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.data_files import (
    MALFORMED,
    ROWS,
    write_arrow_file,
    write_arrow_stream,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)
from trapo_jax.data import read_rows, sources
from trapo_jax.types import UserError


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", write_parquet),
        ("a.jsonl", write_jsonl),
        ("a.JSON", write_json),
        ("a.csv", write_csv),
        ("stream.arrow", write_arrow_stream),
        ("file.arrow", write_arrow_file),
    ],
)
def test_every_format_yields_the_rows_and_leaves_no_files_behind(tmp_path, name, write):
    file = tmp_path / name
    write(file)
    rows = list(read_rows([str(file)]))
    assert [row.values for row in rows] == ROWS
    first = 2 if name.endswith(".csv") else 1  # CSV rows start after the header.
    assert [row.number for row in rows] == list(range(first, first + 600))
    assert {row.file for row in rows} == {str(file)}
    assert list(tmp_path.iterdir()) == [file]


def test_reads_folders_written_by_save_to_disk(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(
        tmp_path / "two"
    )
    before = sorted(tmp_path.rglob("*"))
    assert [row.values for row in read_rows([str(tmp_path / "one")])] == ROWS
    assert [row.values for row in read_rows([str(tmp_path / "two")])] == ROWS
    assert len(list(read_rows([str(tmp_path / "two")], split="test"))) == 3
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        list(read_rows([str(tmp_path / "two")], split="dev"))
    assert len(list(read_rows([f"{tmp_path / 'two'}#test"]))) == 3
    with pytest.raises(UserError, match="is a file, and files have no splits; remove #test"):
        list(read_rows([f"{__file__}#test"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_files_and_globs_are_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    write_parquet(tmp_path / "x.parquet")
    rows = list(read_rows([str(tmp_path / "x.parquet"), str(tmp_path / "*.jsonl")]))
    assert [row.values["name"] for row in rows[600:]] == ["a", "b", "c"]
    assert [row.number for row in rows[600:]] == [1, 1, 1]


def test_blank_lines_are_counted_as_lines_but_not_as_rows(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [(row.number, row.values["a"]) for row in read_rows([str(file)])] == [(1, 1), (3, 2)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_values_in_csv_files_are_strings(tmp_path, delimiter):
    lines = ['"q", "a"', '"x, y; z\tw ""w""\nsecond line", "007"', "", '"é",']
    file = tmp_path / "a.csv"
    file.write_text(
        "\ufeff"
        + "\r\n".join(lines).replace('", ', f'"{delimiter}').replace('é",', f'é"{delimiter}')
    )
    rows = [(row.number, row.values) for row in read_rows([str(file)])]
    assert rows == [
        (3, {"q": 'x, y; z\tw "w"\nsecond line', "a": "007"}),
        (5, {"q": "é", "a": ""}),
    ]


def test_the_name_of_an_existing_file_with_brackets_is_not_treated_as_a_glob(tmp_path):
    file = tmp_path / "a[1].jsonl"
    file.write_text('{"a": 1}\n')
    assert len(list(read_rows([str(file)]))) == 1


@pytest.mark.parametrize(("name", "make", "message"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_malformed_file_error_is_one_line_that_names_the_file(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows([str(path)]))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_limit_applies_to_each_entry_and_overrides_the_maximum_number_of_rows(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sources, "MAX_ROWS", 700)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl")
    write_parquet(tmp_path / "a.parquet")
    entries = [f"{tmp_path}/*.jsonl", f"{tmp_path}/a.parquet"]
    rows = list(read_rows(entries, limit=900))
    assert [row.number for row in rows] == [*range(1, 601), *range(1, 301), *range(1, 601)]
    with pytest.raises(UserError, match=r"b\.jsonl: .* more than 700; set data\.limit"):
        list(read_rows(entries))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_expands_to_gigabytes_is_rejected(tmp_path, suffix):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), ["x" * 10**7])
    table, file = pa.table({"prompt": text}), tmp_path / f"bomb.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file, compression="zstd")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table)
    assert file.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"bomb.* \(it takes more than 1\.25 GiB of memory\)"):
        list(read_rows([str(file)]))


def test_pipes_in_a_saved_folder_are_rejected(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.arrow"))
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(UserError, match="a named pipe, not a regular file"):
        list(read_rows([str(tmp_path / "saved")]))


def test_truncated_saved_folder_raises(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"saved: damaged or not readable \(.+\)"):
        list(read_rows([str(tmp_path / "saved")]))


def test_missing_files_raise_before_any_row_is_read(tmp_path):
    with pytest.raises(UserError, match="no data"):
        list(read_rows([]))
    write_jsonl(tmp_path / "a.jsonl")
    # The error is raised before the first file is read.
    with pytest.raises(UserError, match=r"b\.jsonl: no such file"):
        next(read_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))


@pytest.fixture
def unprivileged():
    """Runs the test as the user `nobody`, because root can read every file."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("name", ["locked", "locked/a.jsonl", "readable/secret.jsonl"])
def test_unreadable_file_raises(tmp_path, name, request):
    for folder in ("locked", "readable"):
        (tmp_path / folder).mkdir()
    for file in ("locked/a.jsonl", "readable/secret.jsonl"):
        write_jsonl(tmp_path / file)
    (tmp_path / "readable" / "secret.jsonl").chmod(0)
    (tmp_path / "locked").chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    request.getfixturevalue("unprivileged")
    with pytest.raises(UserError, match="Permission denied") as caught:
        list(read_rows([str(tmp_path / name)]))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_mistyped_file_name_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_rows(["data/train.parquet"]))
    assert str(caught.value) == f"data/train.parquet: no such file or folder in {tmp_path}"


def test_the_error_for_a_misspelled_name_suggests_the_existing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl")
    for entry in ("data/trian.jsonl", "data/train.json", "dta/train.jsonl", "data/train"):
        with pytest.raises(UserError, match=r"; did you mean data/train\.jsonl\?$") as caught:
            list(read_rows([entry]))
        assert "\n" not in str(caught.value)
    write_jsonl(tmp_path / "test.jsonl")
    with pytest.raises(UserError, match=r"; did you mean \[data/train\.jsonl, test\.jsonl\]\?$"):
        list(read_rows(["data/train.jsonl,test.jsonl"]))
    with pytest.raises(UserError, match=r"; did you mean openai/gsm8k\?$"):
        list(read_rows(["https://huggingface.co/datasets/openai/gsm8k"]))
    with pytest.raises(UserError, match=rf"; did you mean {tmp_path}/data/train\.jsonl\?$"):
        list(read_rows([f"{tmp_path}/data/trian.jsonl"]))


@pytest.mark.slow
def test_importing_the_package_does_not_import_large_libraries():
    heavy = ["datasets", "transformers", "reasoning_gym", "pandas", "pyarrow", "torch"]
    code = f"import sys, trapo_jax.data; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

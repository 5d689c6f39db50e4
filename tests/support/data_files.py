"""Writes data files in every supported format, and malformed files with their expected error messages."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(600)]
TABLE = pa.Table.from_pylist(ROWS)


def write_parquet(path):
    pq.write_table(TABLE, path, row_group_size=100)


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path):
    lines = ["prompt,answer", *(f'"{row["prompt"]}",{row["answer"]}' for row in ROWS)]
    path.write_text("\n".join(lines))


def write_json(path):
    path.write_text("\ufeff" + json.dumps(ROWS, indent=1))  # with a byte order mark, as on Windows


def write_arrow_stream(path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


def write_arrow_file(path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=100)


def truncated_parquet(path):
    write_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_parquet(path):
    write_parquet(path)
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)


def truncated_arrow(path):
    write_arrow_stream(path)
    path.write_bytes(path.read_bytes()[:2000])


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


def bytes_of(data):
    return lambda path: path.write_bytes(data)


def repeated_parquet(path):
    """Writes 3 million rows to a file of a few kilobytes."""
    zeros = pa.array(np.zeros(3_000_000, np.int8))
    pq.write_table(pa.table({"prompt": pa.DictionaryArray.from_arrays(zeros, ["Q"])}), path)


def long_line(path):
    path.write_bytes(b'{"a": 1}\n{"a": "' + b" " * 2**24 + b'"}\n')


MALFORMED = [
    ("absent.parquet", lambda path: None, r"no such file"),
    ("empty.parquet", bytes_of(b""), r"empty file"),
    ("empty.jsonl", bytes_of(b""), r"empty file"),
    ("blank.jsonl", bytes_of(b"\n\n"), r"contains no rows"),
    ("norows.parquet", lambda p: pq.write_table(TABLE.slice(0, 0), p), r"contains no rows"),
    ("truncated.parquet", truncated_parquet, r"damaged or not readable \(.+\)"),
    ("corrupt.parquet", corrupt_parquet, r"damaged or not readable \(.+\)"),
    ("jsonl.parquet", write_jsonl, r"damaged or not readable \(.+\)"),
    ("truncated.arrow", truncated_arrow, r"damaged or not readable \(.+\)"),
    ("parquet.arrow", write_parquet, r"damaged or not readable \(.+\)"),
    ("pointer.parquet", lfs_pointer, r"Git-LFS pointer.*git lfs pull"),
    ("pointer.jsonl", lfs_pointer, r"Git-LFS pointer.*git lfs pull"),
    ("latin1.jsonl", bytes_of(b'{"a": 1}\n{"a": "\xe9"}\n'), r", line 2: not UTF-8 \(byte 8"),
    ("latin1.json", bytes_of(b'[{"a": 1},\n{"a": "\xe9"}]\n'), r", line 2: not UTF-8"),
    ("utf16.jsonl", bytes_of('{"a": 1}\n'.encode("utf-16")), r", line 1: not UTF-8"),
    ("cut.jsonl", bytes_of(b'{"a": 1}\n{"a": '), r", line 2: not JSON \(Expecting value"),
    ("cut.json", bytes_of(b'[{"a": 1},\n{"a": '), r", line 2: not JSON \(Expecting value"),
    (
        "lines.jsonl",
        bytes_of(b'{\n"a": 1\n}\n'),
        r", line 1: not JSON .* at column 2\); use JSON Lines \(one object per line\) or",
    ),
    (
        "string.jsonl",
        bytes_of(b'{"a": "b\n'),
        r", line 1: not JSON \(Unterminated string starting at column 7\);",
    ),
    ("deep.jsonl", bytes_of(b'{"a": ' + b"[" * 100_000), r", line 1: not JSON"),
    ("longint.jsonl", bytes_of(b'{"a": ' + b"1" * 5000 + b"}"), r", line 1: not JSON"),
    ("number.jsonl", bytes_of(b'{"a": 1}\n7\n'), r", line 2: a JSON int, not an object"),
    ("numbers.json", bytes_of(b"[1, 2]"), r", row 1: a JSON int, not an object"),
    (
        "data.jsonl.gz",
        bytes_of(gzip.compress(b"{}")),
        r"a compressed file; decompress it with `gunzip`",
    ),
    ("gz.jsonl", bytes_of(gzip.compress(b"{}")), r"a compressed file; decompress it with `gunzip`"),
    (
        "csv.jsonl",
        bytes_of(b"question,answer\n1,2\n"),
        r", line 1: not JSON, but perhaps CSV; .* \.csv",
    ),
    (
        "json.csv",
        bytes_of(b'{"a": 1, "b": 2}\n'),
        r", line 1: not CSV, but perhaps JSON; .* \.jsonl",
    ),
    ("data.xlsx", bytes_of(b"a,b\n"), r"unknown format \(\.xlsx\); choose from .parquet, .jsonl"),
    ("norows.csv", bytes_of(b"a,b\n"), r"contains no rows"),
    ("uneven.csv", bytes_of(b"a,b\n1,2\n1,2,3\n"), r", line 3: 3 values for the 2 columns of the"),
    ("twice.csv", bytes_of(b"a,b,a\n1,2,3\n"), r", line 1: two columns are named 'a'"),
    ("quote.csv", bytes_of(b'a,b\n1,"2\n'), r", line 2: not CSV \(unexpected end of data\)"),
    ("latin1.csv", bytes_of(b"a,b\n1,\xe9\n"), r", line 2: not UTF-8 \(byte 3"),
    ("data", bytes_of(b"a,b\n"), r"unknown format \(no suffix\)"),
    ("folder", lambda path: path.mkdir(), r"not one written by save_to_disk; specify its files"),
    ("*.parquet", lambda path: None, r"no file matches"),
    ("pipe.jsonl", os.mkfifo, r"a named pipe, not a regular file"),
    ("pipe.parquet", os.mkfifo, r"a named pipe, not a regular file"),
    ("device.json", lambda path: path.symlink_to("/dev/zero"), r"a device, not a regular file"),
    ("long.jsonl", long_line, r", line 2: longer than 16,777,216 bytes"),
    ("comma.json", bytes_of(b'[{"a": 1}\n{"a": 2}]'), r", line 2: not JSON \(Expecting '\]'\)"),
    ("end.json", bytes_of(b'[{"a": 1}]\n\n]'), r", line 3: not JSON \(Extra data\)"),
    ("repeated.parquet", repeated_parquet, r"3,000,000 rows, more than 2,000,000; set data.limit"),
    ("a\0b.parquet", lambda path: None, r"cannot be read"),
]

"""Reads a Parquet or Arrow file in its own process, since a small file may expand to any size.

    python -P table_worker.py PATH MAX_ROWS SECS MEMORY_BYTES

`sources.py` starts this file as a script, since importing the package takes seconds. The output is JSON Lines. Each
line is an object with the values of a row, the number of rows if it exceeds MAX_ROWS (0 for no limit), or a string that
says why the file cannot be read. The kernel ends the process when a batch of rows takes more than SECS seconds of CPU
time.
"""

import decimal
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trapo_jax.sandbox import limit_memory

BATCH_ROWS = 256
# The rows of a file may take MAX_ROW_BYTES, or MAX_EXPANSION times the file's size if that is more.
MAX_ROW_BYTES, MAX_EXPANSION = 2**29, 100


def main(path: str, max_rows: str, secs: str, memory_bytes: str) -> None:
    pa.set_cpu_count(1)
    is_parquet = path.lower().endswith(".parquet")
    num_mapped = 0 if is_parquet else os.stat(path).st_blocks * 512
    limit_memory(int(memory_bytes) + num_mapped)
    try:
        batches = (_parquet_batches if is_parquet else _arrow_batches)(path)
        _write(batches, os.stat(path).st_size, int(max_rows), float(secs))
    except MemoryError:  # also raised by pyarrow
        _put(f"it takes more than {int(memory_bytes) / 2**30:g} GiB of memory")
    except Exception as error:  # any exception from pyarrow
        _put((str(error).strip() or type(error).__name__).splitlines()[0])


def _write(
    batches: Iterator[pa.RecordBatch | int], file_bytes: int, max_rows: int, secs: float
) -> None:
    """Writes the rows.

    Args:
      batches: batches of rows, and counts of the rows that follow.
      file_bytes: size of the file.
      max_rows: maximum number of rows; 0 for no limit.
      secs: maximum CPU time for a few hundred rows, in seconds.
    """
    num_rows = num_bytes = 0
    limit = max(MAX_ROW_BYTES, MAX_EXPANSION * file_bytes)
    signal.setitimer(signal.ITIMER_PROF, secs)
    for batch in batches:
        if isinstance(batch, int):
            num_rows += batch
            if max_rows and num_rows > max_rows:
                _put(num_rows)
                return
            continue
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                num_bytes += _put(values)
                if num_bytes > limit:
                    _put(f"its rows take more than {limit:,} bytes, far more than the file")
                    return
            signal.setitimer(signal.ITIMER_PROF, secs)


def _parquet_batches(path: str) -> Iterator[pa.RecordBatch | int]:
    with pq.ParquetFile(path, buffer_size=2**20) as file:
        yield file.metadata.num_rows
        yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch | int]:
    """Yields the batches of a file in either Arrow IPC format: the file format, or the stream format of `datasets`."""
    with pa.memory_map(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            yield batch.num_rows
            yield batch


def _put(value: Any) -> int:
    """Writes a line and returns its length."""
    line = json.dumps(value, ensure_ascii=False, default=_as_json).encode() + b"\n"
    return sys.stdout.buffer.write(line)


def _as_json(value: Any) -> Any:
    """Converts values of types that JSON lacks. Bytes may not be text, so only their number is kept."""
    if isinstance(value, decimal.Decimal):
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    main(*sys.argv[1:])

"""Reads the files that Weights & Biases writes in offline mode."""

import json
import time

BLOCK_LEN, HEADER_LEN = 32768, 7
FULL, FIRST, MIDDLE, LAST = range(1, 5)


def history(folder):
    """Returns (step, values) for everything logged to the offline runs below a folder, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for path in sorted(folder.rglob("offline-run-*/*.wandb")):
        records = []
        while not (records and records[-1].WhichOneof("record_type") == "exit"):
            time.sleep(0.1)  # A process of wandb writes the file and may still be running.
            records = [Record.FromString(data) for data in _records(path.read_bytes())]
        for record in records:
            if record.WhichOneof("record_type") == "history":
                items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
                values = {name: json.loads(value) for name, value in items.items()}
                rows.append((record.history.step.num, values))
    return rows


def _records(content):
    """Yields the records of a file in LevelDB's log format, which begins with a header of seven bytes."""
    position, parts = HEADER_LEN, []
    while position + HEADER_LEN <= len(content):
        left = BLOCK_LEN - position % BLOCK_LEN
        if left < HEADER_LEN:  # padding
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        start = position + HEADER_LEN
        parts.append(content[start : start + length])
        position = start + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []

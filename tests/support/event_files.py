"""Reads TensorBoard event files."""


def scalars(run, name):
    """Returns the (step, value) pairs of one scalar in all event files of a run."""
    return [(step, value) for tag, step, value in all_scalars(run) if tag == name]


def all_scalars(run):
    """Yields (tag, step, value) for all scalars of a run, and verifies the checksums, as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event  # takes seconds to import
    from tensorboardX.record_writer import masked_crc32c

    for path in sorted((run / "tb").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            data = content[12 : 12 + length]
            for part, checksum in (
                (content[:8], content[8:12]),
                (data, content[12 + length :][:4]),
            ):
                assert masked_crc32c(part) == int.from_bytes(checksum, "little")
            event = Event.FromString(data)
            yield from ((v.tag, event.step, v.simple_value) for v in event.summary.value)
            content = content[16 + length :]

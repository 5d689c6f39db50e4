"""Reads TensorBoard event files."""

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


def scalars(run, name):
    """Returns (step, value) of one scalar in all event files of a run; checks the checksums, as TensorBoard does."""
    found = []
    for path in sorted((run / "tb").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            data = content[12 : 12 + length]
            assert masked_crc32c(data) == int.from_bytes(
                content[12 + length : 16 + length], "little"
            )
            event = Event.FromString(data)
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == name]
            content = content[16 + length :]
    return found

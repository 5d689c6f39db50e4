"""Runs a tokenizer in its own process, since a model's tokenizer may expand strings enormously or run forever.

    python -P encode_worker.py SECS MEMORY_BYTES

`encoding.py` starts this file as a script, since importing the package takes seconds. The input is JSON Lines: first
`{"tokenizer": <tokenizer.json as text>, "encode_special_tokens": false}`, then one list of strings per line. The reply
to a list is either a line of JSON with the numbers of tokens of the strings, followed by all token ids as unsigned
32-bit integers, or a JSON string that says why the strings cannot be encoded. The kernel ends the process when a
request takes more than SECS seconds of CPU time, and the tokenizers library ends the process when memory runs out.
"""

import array
import json
import signal
import sys

from tokenizers import Tokenizer

from trapo_jax.sandbox import limit_memory


def main(secs: str, memory_bytes: str) -> None:
    limit_memory(int(memory_bytes))
    setting = json.loads(sys.stdin.readline())
    tokenizer = Tokenizer.from_str(setting["tokenizer"])
    tokenizer.encode_special_tokens = setting["encode_special_tokens"]
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(secs))
        try:
            encoded = tokenizer.encode_batch_fast(json.loads(line), add_special_tokens=False)
            ids = [encoding.ids for encoding in encoded]
            reply = json.dumps([len(i) for i in ids])
        except BaseException as error:  # A panic in the Rust library is not an `Exception`.
            ids, reply = (
                [],
                json.dumps((str(error).strip() or type(error).__name__).splitlines()[0]),
            )
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.write(b"".join(array.array("I", i).tobytes() for i in ids))
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0.0)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    main(*sys.argv[1:])

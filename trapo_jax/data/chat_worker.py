"""A chat template at work, in a process of its own: it comes with a model, and may loop for ever or fill memory.

    python -P chat_worker.py SECS MEMORY_BYTES

Started by `templates.py`, as a file: the package around it takes seconds to import. JSON lines come in: first
`{"template": ..., "variables": ...}`, then the messages of one prompt each; for each of these a line `{"text": ...}`
or `{"refusal": ...}` goes out. transformers' sandbox keeps the template from everything but its variables. The kernel
ends the process when one prompt takes more than SECS, even within a C function that never looks up.
"""

import json
import signal
import sys

from transformers.utils.chat_template_utils import render_jinja_template

from trapo_jax.sandbox import limit_memory


def main(secs: str, memory_bytes: str) -> None:
    setting = json.loads(sys.stdin.readline())
    limit_memory(int(memory_bytes))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, float(secs))
        print(json.dumps(_render(json.loads(line), **setting)), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _render(messages: list, template: str, variables: dict) -> dict[str, str]:
    try:
        (text,), _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            **variables,
        )
    except (
        Exception
    ) as error:  # the template's own refusal, what the sandbox forbids, no memory, ...
        return {"refusal": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return {"text": text}


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    main(*sys.argv[1:])

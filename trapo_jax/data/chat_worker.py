"""Runs a chat template in its own process, since a model's template may loop forever or exhaust memory.

    python -P chat_worker.py SECS MEMORY_BYTES MAX_CHARS

`templates.py` starts this file as a script, since importing the package takes seconds. The input is JSON Lines: first
`{"template": ..., "variables": ..., "date": "26 Jul 2024"}`, then one request per line, each of which is answered with
one line:

| request | reply |
|---|---|
| the messages of a prompt | `{"text": ...}` |
| null | `{"variables": [...]}`, the names that the template uses but does not define |
| either | `{"refusal": ...}`, the reason for an error |

The template runs in transformers' own Jinja environment, with everything that `apply_chat_template` offers: trimmed
blocks, loop controls, `{% generation %}`, `tojson`, `raise_exception`, `strftime_now`, `dict` and `namespace`. The
sandbox lets the template access nothing but its variables. Apart from repeating its input a few times, the template may
print at most MAX_CHARS characters.

The process starts with SECS seconds of CPU time, and each request adds SECS_PER_REQUEST to the time left, up to SECS,
so that many slow requests do not take hours. When no time is left, the kernel ends the process, even inside a C
function that never returns.
"""

import json
import signal
import sys
from datetime import datetime

from jinja2 import Template, meta
from transformers.utils import chat_template_utils

from trapo_jax.sandbox import limit_memory

SECS_PER_REQUEST = 0.02
MAX_REASON_CHARS = 300
MAX_REPEATS = 4


def main(secs: str, memory_bytes: str, most_chars: str) -> None:
    setting = json.loads(sys.stdin.readline())
    limit_memory(int(memory_bytes))
    # A template may print its input a few times.
    max_chars = int(most_chars) + MAX_REPEATS * len(json.dumps(setting["variables"]))
    left = float(secs)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, left)
        reply = _reply(json.loads(line), max_chars + MAX_REPEATS * len(line), **setting)
        print(json.dumps(reply), flush=True)
        left, _ = signal.setitimer(signal.ITIMER_PROF, 0.0)
        left = min(left + SECS_PER_REQUEST, float(secs))


def _reply(
    messages: list | None, max_chars: int, template: str, variables: dict, date: str
) -> dict[str, object]:
    try:
        compiled = _compile(template, date)
        if messages is None:
            syntax = compiled.environment.parse(template)
            return {"variables": sorted(meta.find_undeclared_variables(syntax))}
        text = _render(compiled, messages, variables)
        if len(text) > max_chars:
            return {"refusal": f"it prints {len(text):,} characters"}
        text.encode()
        return {"text": text}
    except UnicodeEncodeError:
        return {"refusal": "it prints text that is not Unicode"}
    # For example, the template rejects the messages, the sandbox forbids an operation, or memory runs out.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"refusal": reason[:MAX_REASON_CHARS]}


def _compile(template: str, date: str) -> Template:
    """Compiles the template with transformers, which caches the result, and fixes the template's clock at `date`."""
    compiled = chat_template_utils._compile_jinja_template(template)
    compiled.environment.globals["strftime_now"] = datetime.strptime(date, "%d %b %Y").strftime
    return compiled


def _render(compiled: Template, messages: list, variables: dict) -> str:
    # As in `apply_chat_template`, tools and documents are always defined.
    variables = {"tools": None, "documents": None, **variables}
    return compiled.render({**variables, "messages": messages, "add_generation_prompt": True})


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    main(*sys.argv[1:])

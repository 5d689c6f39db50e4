"""A chat template at work, in a process of its own: it comes with a model, and may loop for ever or fill memory.

    python -P chat_worker.py SECS MEMORY_BYTES MAX_CHARS

Started by `templates.py`, as a file: the package around it takes seconds to import. JSON lines come in: first
`{"template": ..., "variables": ..., "date": "26 Jul 2024"}`, then requests, each of which is answered by one line:

| request | reply |
|---|---|
| the messages of a prompt | `{"text": ...}` |
| null | `{"variables": [...]}`, the names that the template reads from outside |
| either | `{"refusal": ...}` |

The template runs in transformers' own environment, with all that `apply_chat_template` offers: trimmed blocks, loop
controls, `{% generation %}`, `tojson`, `raise_exception`, `strftime_now`, `dict` and `namespace`. Its sandbox keeps
the template from everything but its variables. What it prints besides what it is given has at most
MAX_CHARS characters.

The kernel ends the process when its CPU time is up, even within a C function that never looks up. There are SECS to
begin with; a request adds SECS_PER_REQUEST to what is left, up to SECS again, so that many slow ones take no hours.
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
    # A template may print what it is given a few times.
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
    # The template's own refusal, what the sandbox forbids, no memory, ...
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"refusal": reason[:MAX_REASON_CHARS]}


def _compile(template: str, date: str) -> Template:
    """The template in transformers' environment, which caches it; the clock stands at midnight of the date."""
    compiled = chat_template_utils._compile_jinja_template(template)
    compiled.environment.globals["strftime_now"] = datetime.strptime(date, "%d %b %Y").strftime
    return compiled


def _render(compiled: Template, messages: list, variables: dict) -> str:
    # As in `apply_chat_template`, tools and documents are always defined, and arguments replace special tokens.
    variables = {"tools": None, "documents": None, **variables}
    return compiled.render({**variables, "messages": messages, "add_generation_prompt": True})


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    main(*sys.argv[1:])

"""Renders prompts as text, using the same `Template` object for training and evaluation.

`qwen_math` is the prompt format of the paper's data and evaluation. It sets the system message, which replaces that of
the row, if there is one (the released MATH-500 has one about a "Thought section"). If the user text already ends with
the instruction, the instruction is not added again.

A tokenizer's own template is third-party code: it runs in a separate process (`chat_worker.py`), without secrets and
with limits on time and memory. It produces the same text as `tokenizer.apply_chat_template`, except that the current
date is always `DATE`, so that a run resumed on another day has the same prompts.
"""

import dataclasses
import difflib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trapo_jax.data.examples import Message, Prompt
from trapo_jax.inputs.import_path import import_object, suggest
from trapo_jax.sandbox import child_environment
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = ("none", "chat", "chatml", "qwen_math")
NAMED_CHAT = "chat/"  # chat/NAME selects one of a tokenizer's named templates.

MATH_SYSTEM = "You are a helpful assistant."
MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
DATE = "26 Jul 2024"  # Date for `strftime_now`, and the default date of Llama 3's templates.
_TURN = "<|im_start|>"
MAX_ROLES_CHARS = 100  # Maximum length of the roles listed in an error message.
CHAT_WORKER = (sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py")))
# CPU time limit for one prompt, or several slow ones; a template usually renders thousands of prompts per second.
CHAT_TIMEOUT_SECS = 5.0
CHAT_MEMORY_BYTES = 2**30
CHAT_MAX_CHARS = 20_000  # Maximum output beyond the messages and arguments.


@dataclasses.dataclass(frozen=True)
class Template:
    """Turns a prompt into the text that the policy continues.

    Attributes:
      kind: "none" for unchanged text; "chat" for the tokenizer's own chat template, or "chat/NAME" if the tokenizer has
        several; "chatml" for ChatML without a default system message; "qwen_math" for ChatML with the system message
        and the instruction of Qwen2.5-Math; or the import path of a custom template.
      tokenizer: the tokenizer that the chat template belongs to; for "chat" and "chat/NAME" only.
      function: the function that turns chat messages into text; for custom templates only.
      arguments: variables for the chat template, keyed by name, as JSON values.
    """

    kind: str = "none"
    tokenizer: "PreTrainedTokenizerFast | None" = dataclasses.field(default=None, repr=False)
    function: Callable[[tuple[Message, ...]], str] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def is_chat(self) -> bool:
        """Whether this is a tokenizer's own chat template, which also decides whether to add BOS."""
        return _is_chat(self.kind)

    def render(self, prompt: Prompt) -> str:
        """Returns the prompt's text, ending where the assistant begins.

        Every kind except "none" treats plain text as one user message. The result contains BOS only if the chat
        template writes BOS.

        Raises:
          UserError: if the template cannot render the prompt.
        """
        return self.render_all([prompt])[0]

    def render_all(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the texts of several prompts. A tokenizer's own chat template renders all of them in one process."""
        if self.kind == "none":
            return [_plain_text(prompt) for prompt in prompts]
        chats = [(Message("user", p),) if isinstance(p, str) else p for p in prompts]
        if self.function:
            return [self._apply(self.function, messages) for messages in chats]
        if self.is_chat:
            return self._chat(chats)
        if self.kind == "qwen_math":
            chats = [_with_math_instruction(messages) for messages in chats]
        return [_chatml(messages) for messages in chats]

    @property
    def hash(self) -> str:
        """SHA-256 hash of the template's kind and content. Templates with the same hash render the same text."""
        content: list[object] = [self.kind]
        if self.is_chat:
            content += [self._chat_template(), self._special_tokens(), DATE]
            content += [dict(self.arguments)] if self.arguments else []
        elif self.kind != "none":
            content.append(self.render("{prompt}"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _apply(self, function: Callable, messages: tuple[Message, ...]) -> str:
        try:
            text = function(messages)
        except Exception as error:
            raise UserError(
                f"data.template={self.kind}: raises {type(error).__name__} for messages with the roles "
                f"{_roles(messages)} ({error})"
            ) from error
        if not isinstance(text, str):
            raise UserError(f"data.template={self.kind}: returns {type(text).__name__}, not a str")
        return text

    def _special_tokens(self) -> dict[str, str]:
        assert self.tokenizer is not None
        return {name: str(text) for name, text in self.tokenizer.special_tokens_map.items()}

    def _chat_template(self) -> str:
        assert self.tokenizer is not None
        return _chat_templates(self.tokenizer)[_chat_name(self.kind)]

    def _chat(self, chats: Sequence[tuple[Message, ...]]) -> list[str]:
        requests = [[message._asdict() for message in chat] for chat in chats]
        replies = self._ask_worker(requests)
        for chat, reply in zip(chats, replies, strict=False):
            if "refusal" in reply:
                raise self._error(
                    f"rejects messages with the roles {_roles(chat)} ({reply['refusal']})"
                )
        return [reply["text"] for reply in replies]

    def _check_arguments(self) -> None:
        (reply,) = self._ask_worker([None])
        if "refusal" in reply:
            raise self._error(f"cannot be read ({reply['refusal']})")
        known = set(reply["variables"]) - {"messages", "add_generation_prompt"}
        for name in sorted(set(self.arguments) - known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "remove it"
            raise UserError(
                f"data.template_arguments: the tokenizer's chat template takes no argument {name!r}; {hint}"
            )

    def _ask_worker(self, requests: Sequence[object]) -> list[dict[str, Any]]:
        """Returns the replies to the requests, at least up to the first refusal; see `chat_worker.py`."""
        setting = {
            "template": self._chat_template(),
            "variables": {**self._special_tokens(), **self.arguments},
            "date": DATE,
        }
        worker = subprocess.run(
            [*CHAT_WORKER, *map(str, (CHAT_TIMEOUT_SECS, CHAT_MEMORY_BYTES, CHAT_MAX_CHARS))],
            input="".join(json.dumps(request) + "\n" for request in (setting, *requests)),
            capture_output=True,
            text=True,
            env={**child_environment(), "TZ": "UTC"},
        )
        replies = [json.loads(line) for line in worker.stdout.splitlines()]
        if any("refusal" in reply for reply in replies):
            return replies
        if worker.returncode == -signal.SIGPROF:
            raise self._error(f"takes more than {CHAT_TIMEOUT_SECS:g} s")
        if worker.returncode or len(replies) < len(requests):
            reason = worker.stderr.strip().splitlines()[-1:] or [f"exit code {worker.returncode}"]
            raise self._error(f"cannot be run ({reason[0]})")
        return replies

    def _error(self, what: str) -> UserError:
        return UserError(
            f"data.template={self.kind}: the tokenizer's chat template {what}; choose another template"
        )


def make_template(
    kind: str,
    tokenizer: "PreTrainedTokenizerFast",
    arguments: Mapping[str, Any] | None = None,
) -> Template:
    """Builds a template.

    Args:
      kind: one of `TEMPLATES`; "chat/NAME" for one of several chat templates of a tokenizer, where "chat" is the one
        named "default"; or the import path `package.module:name` of a function that maps chat messages (a tuple of
        `Message`) to the text that the policy continues.
      tokenizer: the policy's tokenizer.
      arguments: for "chat" and "chat/NAME", variables for the chat template, keyed by name, as JSON values. They
        correspond to the keyword arguments of `apply_chat_template`, such as `{"enable_thinking": False}` for Qwen3.

    Raises:
      UserError: if the kind is unknown, if the tokenizer does not have the chat template, or if the template does not
        use one of the arguments.
    """
    if _is_chat(kind):
        return _make_chat_template(kind, tokenizer, arguments or {})
    if arguments:
        raise UserError(
            f"data.template_arguments: data.template={kind} takes no arguments; "
            "remove them, or set data.template=chat"
        )
    if ":" in kind:
        function = import_object(kind, "data.template")
        if not callable(function):
            raise UserError(f"data.template={kind}: not a function of chat messages")
        return Template(kind, function=cast(Any, function))
    if kind not in TEMPLATES:
        raise UserError(f"data.template={kind!r}: no such template; {suggest(kind, TEMPLATES)}")
    return Template(kind)


def _make_chat_template(
    kind: str, tokenizer: "PreTrainedTokenizerFast", arguments: Mapping[str, Any]
) -> Template:
    named = _chat_templates(tokenizer)
    if not named:
        raise UserError(
            f"data.template={kind}: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "choose 'chatml', 'qwen_math' or 'none'"
        )
    if _chat_name(kind) not in named:
        wanted = "no default chat template" if kind == "chat" else "no such chat template"
        choices = ", ".join(repr(NAMED_CHAT + name) for name in sorted(named))
        raise UserError(
            f"data.template={kind!r}: the tokenizer of {tokenizer.name_or_path} has {wanted}; "
            f"choose from {choices}"
        )
    template = Template(kind, tokenizer, arguments=arguments)
    if arguments:
        template._check_arguments()
    return template


def _chat_templates(tokenizer: "PreTrainedTokenizerFast") -> dict[str, str]:
    """Returns the tokenizer's chat templates, keyed by name; a single template is the default."""
    templates: Any = tokenizer.chat_template or {}
    return templates if isinstance(templates, dict) else {"default": templates}


def _is_chat(kind: str) -> bool:
    return kind == "chat" or kind.startswith(NAMED_CHAT)


def _chat_name(kind: str) -> str:
    return "default" if kind == "chat" else kind.removeprefix(NAMED_CHAT)


def _plain_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    raise UserError(
        f"data.template=none: the prompt consists of chat messages with the roles {_roles(prompt)}, not plain text; "
        "set data.template to chat, chatml or qwen_math"
    )


def _with_math_instruction(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Adds the system message at the start and the instruction on its own line at the end, each exactly once."""
    *turns, last = [message for message in messages if message.role != "system"]
    text = last.content
    if text.rstrip().endswith(MATH_INSTRUCTION):
        text = text.rstrip().removesuffix(MATH_INSTRUCTION).rstrip()
    text = f"{text}\n{MATH_INSTRUCTION}"
    return (Message("system", MATH_SYSTEM), *turns, Message(last.role, text))


def _chatml(messages: tuple[Message, ...]) -> str:
    if any(_TURN in message.content for message in messages):
        raise UserError(
            f"data.template: the prompt already contains {_TURN} and would be wrapped twice; set data.template=none"
        )
    turns = [f"{_TURN}{role}\n{content}<|im_end|>\n" for role, content in messages]
    return "".join(turns) + f"{_TURN}assistant\n"


def _roles(messages: tuple[Message, ...]) -> str:
    roles = ", ".join(message.role for message in messages[:MAX_ROLES_CHARS])
    return roles if len(roles) <= MAX_ROLES_CHARS else roles[:MAX_ROLES_CHARS] + "..."

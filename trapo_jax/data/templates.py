"""Prompts to text: one `Template` object, the same for training and for evaluation.

`qwen_math` is the prompt of the paper's data and evaluation. It owns the system line: a system message in the
row (the released MATH-500 holds one about a "Thought section") is replaced, and an instruction that the user
text ends with already is not added again.
"""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Literal

from trapo_jax.data.examples import Message, Prompt
from trapo_jax.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TemplateKind = Literal["none", "chat", "chatml", "qwen_math"]

MATH_SYSTEM = "You are a helpful assistant."
MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# Llama 3's templates print today's date unless told one; this is the one they fall back on themselves.
DATE = "26 Jul 2024"
_TURN = "<|im_start|>"


@dataclasses.dataclass(frozen=True)
class Template:
    """How a prompt becomes the text that the policy continues.

    Attributes:
      kind: "none", the text as it stands; "chat", the tokenizer's own chat template; "chatml", ChatML
        without a system line of its own; "qwen_math", ChatML with the system line and instruction of
        Qwen2.5-Math.
      tokenizer: whose chat template it is; for "chat" only.
    """

    kind: TemplateKind = "none"
    tokenizer: "PreTrainedTokenizerFast | None" = dataclasses.field(default=None, repr=False)

    def render(self, prompt: Prompt) -> str:
        """The prompt's text, ending where the assistant is to begin.

        Text is taken as one user message by every kind but "none". BOS is in it only where the chat
        template writes it.

        Raises:
          UserError: if the prompt does not go with the template.
        """
        if self.kind == "none":
            return _plain_text(prompt)
        messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        if self.kind == "chat":
            return self._chat(messages)
        return _chatml(_with_math_instruction(messages) if self.kind == "qwen_math" else messages)

    @property
    def hash(self) -> str:
        """SHA-256 over kind and content: equal hashes, equal texts."""
        content: list[object] = [self.kind]
        if self.tokenizer is not None:
            special = {name: str(text) for name, text in self.tokenizer.special_tokens_map.items()}
            content += [self.tokenizer.chat_template, special, DATE]
        elif self.kind != "none":
            content.append(self.render("{prompt}"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _chat(self, messages: tuple[Message, ...]) -> str:
        import jinja2

        assert self.tokenizer is not None
        try:
            text = self.tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                date_string=DATE,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"data.template=chat: the tokenizer's chat template refuses the messages "
                f"{_roles(messages)} ({reason}); choose another template"
            ) from error
        assert isinstance(text, str)
        return text


def make_template(kind: TemplateKind, tokenizer: "PreTrainedTokenizerFast") -> Template:
    """The template of a run.

    Raises:
      UserError: for "chat" with a tokenizer that has no chat template.
    """
    if kind != "chat":
        return Template(kind)
    if not tokenizer.chat_template:
        raise UserError(
            f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "choose chatml, qwen_math or none"
        )
    return Template(kind, tokenizer)


def _plain_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    raise UserError(
        f"data.template=none: the prompt holds the chat messages {_roles(prompt)}, not one text; "
        "choose chat, chatml or qwen_math"
    )


def _with_math_instruction(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system line first, the instruction in a line of its own at the end; each exactly once."""
    *turns, last = [message for message in messages if message.role != "system"]
    text = last.content
    if text.rstrip().endswith(MATH_INSTRUCTION):
        text = text.rstrip().removesuffix(MATH_INSTRUCTION).rstrip()
    text = f"{text}\n{MATH_INSTRUCTION}"
    return (Message("system", MATH_SYSTEM), *turns, Message(last.role, text))


def _chatml(messages: tuple[Message, ...]) -> str:
    if any(_TURN in message.content for message in messages):
        raise UserError(
            f"data.template: the prompt holds {_TURN} already, it would be wrapped twice; choose none"
        )
    turns = [f"{_TURN}{role}\n{content}<|im_end|>\n" for role, content in messages]
    return "".join(turns) + f"{_TURN}assistant\n"


def _roles(messages: tuple[Message, ...]) -> str:
    return ", ".join(message.role for message in messages)

"""Adds the config's system message and answer-format instruction to prompts."""

from trapo_jax.data.examples import Message, Prompt
from trapo_jax.data.templates import MATH_INSTRUCTION

# Values of data.prompt_suffix that are shorthand for a longer string.
SUFFIXES = {
    "boxed": MATH_INSTRUCTION,
    # Small models follow this instruction more often.
    "answer_is": "Reason step by step. State the result in the last line, after the words 'The answer is'.",
}
# Last lines of generated expert solutions that follow these instructions, as format strings.
LAST_LINES = {"boxed": r"The final answer is \boxed{{{}}}.", "answer_is": "The answer is {}."}


def instructed(prompt: Prompt, *, system: str | None, suffix: str | None) -> Prompt:
    r"""Returns the prompt with a system message and a suffix added.

    Args:
      prompt: text or chat messages.
      system: system message to prepend unless the prompt already has one; None for no system message. Plain text with a
        system message becomes a chat.
      suffix: text or a name in `SUFFIXES`, appended on its own line to the last message unless the message already ends
        with this text; None for no suffix.

    >>> instructed("2 + 2?", system=None, suffix="Answer with a number.")
    '2 + 2?\nAnswer with a number.'
    """
    if suffix is not None:
        prompt = _with_suffix(prompt, SUFFIXES.get(suffix, suffix))
    if system is None:
        return prompt
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    has_system = any(message.role == "system" for message in messages)
    return messages if has_system else (Message("system", system), *messages)


def _with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt if prompt.rstrip().endswith(suffix) else f"{prompt}\n{suffix}"
    *turns, last = prompt
    text = _with_suffix(last.content, suffix)
    assert isinstance(text, str)
    return (*turns, Message(last.role, text))

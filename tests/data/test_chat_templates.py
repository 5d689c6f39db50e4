"""Compares prompts with `tokenizer.apply_chat_template` for several model families: text, token ids and errors."""

import importlib.metadata
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trapo_jax.data import Example, Message, encode_examples, make_template
from trapo_jax.types import UserError

OURS = Path(__file__).with_name("chat_templates")


class Family(NamedTuple):
    """The properties of a model family's tokenizers."""

    template: str
    bos: str | None
    eos: str
    others: tuple[str, ...] = ()
    adds_bos: bool = False
    arguments: dict[str, Any] = {}  # noqa: RUF012
    in_trl: str | None = None  # name of the model's own template in trl


LLAMA = ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), True)
GEMMA = ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), True)
CHATML = ("<|im_start|>", "<|endoftext|>", "<think>", "</think>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"))

FAMILIES = {
    "qwen2_5": Family("qwen2_5", None, "<|im_end|>", CHATML, in_trl="qwen2_5"),
    "qwen3": Family("qwen3", None, "<|im_end|>", CHATML, in_trl="qwen3"),
    "qwen3_no_thinking": Family(
        "qwen3", None, "<|im_end|>", CHATML, arguments={"enable_thinking": False}, in_trl="qwen3"
    ),
    "llama3_1": Family("llama3_1", *LLAMA, in_trl="llama3_1"),  # also used by Llama 3.3
    "llama3_1_dated": Family(
        "llama3_1", *LLAMA, arguments={"date_string": "1 May 2025"}, in_trl="llama3_1"
    ),
    "llama3_2": Family("llama3_2", *LLAMA, in_trl="llama3_2"),
    "smollm2": Family("smollm2", "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
    "mistral_v0_3": Family("mistral_v0_3", "<s>", "</s>", ("[INST]", "[/INST]"), True),
    "gemma2": Family("gemma2", *GEMMA, in_trl="gemma"),
    "gemma3": Family("gemma3", *GEMMA, in_trl="gemma3"),
    # The distilled Qwen and Llama models have the same template and the same special tokens.
    "deepseek_r1_distill": Family(
        "deepseek_r1_distill", *DEEPSEEK, True, in_trl="deepseek_r1_distill"
    ),
    "chatml_without_bos": Family("qwen2_5", *LLAMA),  # a template without the BOS token
}
NO_SYSTEM = ("gemma2",)
ALTERNATING = ("mistral_v0_3", "gemma2", "gemma3")

ONE_TURN = (Message("user", "What is 1 + 1?"),)
SYSTEM = (Message("system", "Be brief."), Message("user", "What is 2 + 2?"))
MANY_TURNS = (
    Message("user", "  Is 7 < 9 & \"8\" > '6'?\n"),
    Message("assistant", "<think>\nEasy.\n</think>\n\nYes, Übung 🎉. "),
    Message("user", "And {{ 1 + 1 }} {% raw %}<|im_end|></s>?"),
)
SYSTEM_AND_MANY_TURNS = (Message("system", " You check proofs.\n"), *MANY_TURNS)
TWO_USERS = (Message("user", "One."), Message("user", "Two."))


class July(datetime):
    """A clock for `apply_chat_template`, fixed at the date that the template worker uses."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", July)


def own_template(family):
    return (OURS / f"{family.template}.jinja").read_text()


def template_of_the_model(family):
    """Returns the template that was released with the model, from the package trl."""
    if family.in_trl is None:
        pytest.skip("trl does not contain the template of this family")
    try:
        trl = importlib.metadata.distribution("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs `pip install --no-deps trl`")
    path = Path(str(trl.locate_file(f"trl/chat_templates/{family.in_trl}.jinja")))
    if not path.is_file():
        pytest.skip(f"trl {trl.version} has no {path.name}; needs 1.16 or newer")
    return path.read_text()


def make_tokenizer(family, chat_template):
    """Returns a byte-level BPE tokenizer with a family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system model\n\nWhat is it? Today"] * 9, trainer)
    special = [token for token in (family.bos, family.eos, *family.others) if token]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if family.adds_bos:
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=chat_template,
    )


def check_prompts(family, tokenizer, chats):
    """Checks that problems have the same text and token ids as in transformers."""
    template = make_template("chat", tokenizer, family.arguments)
    examples = [Example(chat, "1", (), "s") for chat in chats]
    problems, _ = encode_examples(examples, tokenizer, template=template, max_prompt_length=10_000)
    for chat, problem in zip(chats, problems, strict=True):
        options = {"add_generation_prompt": True, **family.arguments}
        messages = [message._asdict() for message in chat]
        assert problem.prompt_text == tokenizer.apply_chat_template(
            messages, tokenize=False, **options
        )
        theirs = tokenizer.apply_chat_template(messages, return_dict=False, **options)
        assert list(problem.prompt_ids) == theirs
    return problems


@pytest.mark.slow
@pytest.mark.parametrize("find", [own_template, template_of_the_model])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_equal_those_of_apply_chat_template(name, find):
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family, find(family))
    with_system = () if name in NO_SYSTEM else (SYSTEM, SYSTEM_AND_MANY_TURNS)
    problems = check_prompts(family, tokenizer, (ONE_TURN, MANY_TURNS, *with_system))
    for problem in problems:
        num_bos = problem.prompt_ids.count(tokenizer.bos_token_id)
        assert name == "smollm2" or num_bos == int(name != "chatml_without_bos" and family.adds_bos)


@pytest.mark.slow
@pytest.mark.parametrize("find", [own_template, template_of_the_model])
@pytest.mark.parametrize(
    ("name", "chat"),
    [(name, SYSTEM) for name in NO_SYSTEM] + [(name, TWO_USERS) for name in ALTERNATING],
)
def test_messages_that_the_family_does_not_support_cause_a_one_line_error(name, chat, find):
    tokenizer = make_tokenizer(FAMILIES[name], find(FAMILIES[name]))
    with pytest.raises(Exception, match=r"supported|alternate") as theirs:
        tokenizer.apply_chat_template([message._asdict() for message in chat])
    with pytest.raises(UserError) as ours:
        make_template("chat", tokenizer).render(chat)
    assert str(ours.value) == (
        "data.template=chat: the tokenizer's chat template rejects messages with the roles "
        f"{', '.join(message.role for message in chat)} ({theirs.value}); choose another template"
    )


@pytest.mark.slow
@pytest.mark.parametrize("find", [own_template, template_of_the_model])
def test_qwen3_templates_accept_the_argument_enable_thinking(find):
    family = FAMILIES["qwen3"]
    tokenizer = make_tokenizer(family, find(family))
    empty = "<think>\n\n</think>\n\n"
    plain, on, off = (
        make_template("chat", tokenizer, arguments).render(ONE_TURN)
        for arguments in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert plain == on
    assert off == on + empty
    with pytest.raises(UserError, match="did you mean enable_thinking"):
        make_template("chat", tokenizer, {"enable_thinkng": False})


@pytest.mark.parametrize("find", [own_template, template_of_the_model])
def test_llama_prompts_do_not_depend_on_the_day(find):
    tokenizer = make_tokenizer(FAMILIES["llama3_2"], find(FAMILIES["llama3_2"]))
    text = make_template("chat", tokenizer).render(ONE_TURN)
    assert "Today Date: 26 Jul 2024\n" in text

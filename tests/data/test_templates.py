"""One template object for training and evaluation: exact texts, nothing twice, a hash that tells."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trapo_jax.data import Message, Template, make_template, templates
from trapo_jax.types import UserError

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QWEN_MATH = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is 1 + 1?\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
DATED = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
USER = Message("user", "What is 1 + 1?")


def make_tokenizer(chat_template=None, **special):
    special = {"eos_token": "</s>", "bos_token": "<s>"} | special
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, **special
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "What is 1 + 1?",
        (USER,),
        (Message("system", "You are a helpful assistant."), USER),
        (Message("system", "Your task is to follow a systematic process."), USER),
        f"What is 1 + 1?\n{INSTRUCTION}",
        f"What is 1 + 1? {INSTRUCTION}\n",
        (
            Message("system", "You are a helpful assistant."),
            Message("user", f"What is 1 + 1?{INSTRUCTION}"),
        ),
    ],
)
def test_qwen_math_always_renders_the_prompt_of_the_paper(prompt):
    assert Template("qwen_math").render(prompt) == QWEN_MATH


def test_qwen_math_keeps_earlier_turns():
    turns = (Message("user", "Hi"), Message("assistant", "Yes?"), USER)
    text = Template("qwen_math").render(turns)
    assert "user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n" in text
    assert text.count(INSTRUCTION) == 1


def test_chatml_adds_no_system_message():
    assert Template("chatml").render("Hi") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Template("chatml").render((Message("system", "Be kind."), USER)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_none_leaves_the_text_unchanged():
    assert Template("none").render("  ?rsm:48137=\n") == "  ?rsm:48137=\n"
    assert Template("none").render((USER,)) == USER.content


def test_chat_renders_the_tokenizer_template_with_a_fixed_date():
    template = make_template("chat", make_tokenizer(DATED + CHAT))
    prompts = ["Hi", (Message("user", "Hi"),), "\ud800\x1b\u2028\n"]
    first, second, third = template.render_all(prompts)
    assert first == second == "26 Jul 2024<s>[user] Hi [assistant]"
    assert third == f"26 Jul 2024<s>[user] {prompts[2]} [assistant]"


@pytest.mark.parametrize(
    ("make", "prompt", "message"),
    [
        (
            lambda: make_template("chat", make_tokenizer()),
            "Hi",
            "has no chat template; choose chatml",
        ),
        (
            lambda: make_template("chat", make_tokenizer(CHAT)),
            (Message("system", "Be kind."), USER),
            r"refuses the messages system, user \(System role not supported\)",
        ),
        (lambda: make_template("chat", make_tokenizer("{% for %}")), "Hi", "refuses the messages"),
        (
            lambda: make_template("chat", make_tokenizer("{{ ''.__class__.__mro__[1] }}")),
            "Hi",
            r"refuses the messages user \(access to attribute '__class__'",
        ),
        (
            lambda: Template("none"),
            (Message("system", "Be kind."), USER),
            "system, user, not one text",
        ),
        (lambda: Template("chatml"), QWEN_MATH, "would be wrapped twice"),
        (lambda: Template("qwen_math"), QWEN_MATH, "would be wrapped twice"),
    ],
)
def test_prompt_or_tokenizer_that_does_not_fit_the_template_raises(make, prompt, message):
    with pytest.raises(UserError, match=message) as caught:
        make().render(prompt)
    assert "data.template" in str(caught.value)
    assert "\n" not in str(caught.value)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (LOOP, "takes more than 1 s for one prompt; choose another template"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 1 s for one prompt"),  # within one C function
        ("{{ 'x' * 10 ** 11 }}", r"refuses the messages user \(MemoryError\)"),
    ],
)
def test_hostile_template_is_stopped(hostile, message, monkeypatch):
    monkeypatch.setattr(templates, "CHAT_TIMEOUT_SECS", 1.0)
    template = make_template(
        "chat", make_tokenizer("{% if messages[0].content == 'B' %}" + hostile + "{% endif %}")
    )
    with pytest.raises(UserError, match=message) as caught:
        template.render_all(["A", "B", "C"])
    assert "data.template=chat" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_worker_sees_no_secret_and_its_failure_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(templates, "CHAT_WORKER", ("/bin/sh", "-c", "echo $HF_TOKEN. >&2; exit 3"))
    with pytest.raises(UserError, match=r"cannot be run \(\.\); choose another") as caught:
        make_template("chat", make_tokenizer(CHAT)).render("Hi")
    assert "\n" not in str(caught.value)


def test_hash_identifies_a_template():
    templates = [
        Template("none"),
        Template("chatml"),
        Template("qwen_math"),
        make_template("chat", make_tokenizer(CHAT)),
        make_template("chat", make_tokenizer(CHAT + " ")),
        make_template("chat", make_tokenizer(CHAT, bos_token="<b>")),
    ]
    assert len({template.hash for template in templates}) == len(templates)
    assert make_template("chat", make_tokenizer(CHAT)).hash == templates[3].hash
    assert make_template("chatml", make_tokenizer(CHAT)).hash == templates[1].hash
    assert all(len(template.hash) == 64 for template in templates)

"""Tests that templates render the exact text, add nothing twice, and are identified by a hash."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trapo_jax.data import Message, Template, make_template, templates
from trapo_jax.models import load_tokenizer
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
    prompts = ["Hi", (Message("user", "Hi"),), "\x1b\u2028\n🎉"]
    first, second, third = template.render_all(prompts)
    assert first == second == "26 Jul 2024<s>[user] Hi [assistant]"
    assert third == f"26 Jul 2024<s>[user] {prompts[2]} [assistant]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "prompt", "message"),
    [
        (
            lambda: make_template("chat", make_tokenizer()),
            "Hi",
            "has no chat template; choose 'chatml'",
        ),
        (
            lambda: make_template("chat", make_tokenizer(CHAT)),
            (Message("system", "Be kind."), USER),
            r"rejects messages with the roles system, user \(System role not supported\)",
        ),
        (
            lambda: make_template("chat", make_tokenizer("{% for %}")),
            "Hi",
            "rejects messages with the roles",
        ),
        (
            lambda: make_template("chat", make_tokenizer("{{ ''.__class__.__mro__[1] }}")),
            "Hi",
            r"rejects messages with the roles user \(access to attribute '__class__'",
        ),
        (
            lambda: Template("none"),
            (Message("system", "Be kind."), USER),
            "system, user, not plain text",
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (LOOP, "takes more than 1 s; choose another template"),
        # This template spends its time in a single C function.
        ("{{ 9 ** (9 ** 9) }}", "takes more than 1 s"),
        ("{{ 'x' * 10 ** 11 }}", r"rejects messages with the roles user \(MemoryError\)"),
        (
            "{{ 'x' * 10 ** 6 }}",
            r"rejects messages with the roles user \(it prints 1,000,000 characters\)",
        ),
        (
            "{{ '\\ud800' }}",
            r"rejects messages with the roles user \(it prints text that is not Unicode\)",
        ),
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


def test_the_template_worker_sees_no_secret_and_its_failure_is_reported_in_one_line(monkeypatch):
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


def save_tokenizer(folder, *, chat_template=None, files=None):
    """Saves a tokenizer with chat templates in tokenizer_config.json or in other `files`, and loads it."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return load_tokenizer(folder)


IN_CONFIG = {
    "chat_template": [
        {"name": "default", "template": "D {{ messages[0].content }}"},
        {"name": "rag", "template": "R {{ messages[0].content }}"},
    ]
}
IN_FILES = {
    "files": {
        "chat_template.jinja": "D {{ messages[0].content }}",
        "additional_chat_templates/rag.jinja": "R {{ messages[0].content }}",
    }
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [IN_CONFIG, IN_FILES], ids=["in_config", "in_files"])
def test_named_chat_templates_are_chosen_by_name(layout, tmp_path):
    tokenizer = save_tokenizer(tmp_path, **layout)
    default, rag = make_template("chat", tokenizer), make_template("chat/rag", tokenizer)
    assert (default.render("Hi"), rag.render("Hi")) == ("D Hi", "R Hi")
    assert make_template("chat/default", tokenizer).render("Hi") == "D Hi"
    assert default.hash == make_template("chat", make_tokenizer("D {{ messages[0].content }}")).hash
    assert default.hash != rag.hash
    with pytest.raises(UserError) as caught:
        make_template("chat/tool_use", tokenizer)
    assert str(caught.value) == (
        f"data.template='chat/tool_use': the tokenizer of {tmp_path} has no such chat template; "
        "choose from 'chat/default', 'chat/rag'"
    )


def test_chat_templates_without_a_default_need_a_name(tmp_path):
    templates = [{"name": "rag", "template": "R"}, {"name": "a\nb", "template": "A"}]
    tokenizer = save_tokenizer(tmp_path, chat_template=templates)
    with pytest.raises(
        UserError, match=r"no default chat template; choose from '.*rag'$"
    ) as caught:
        make_template("chat", tokenizer)
    assert "\n" not in str(caught.value)
    assert make_template("chat/rag", tokenizer).render("Hi") == "R"


def test_the_error_for_a_named_chat_template_contains_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    refusing = [{"name": "rag", "template": "{{ raise_exception('No') }}"}]
    tokenizer = save_tokenizer(tmp_path / "model", chat_template=refusing)
    with pytest.raises(UserError, match=r"^data\.template=chat/rag: .* user \(No\); choose"):
        make_template("chat/rag", tokenizer).render("Hi")


FORMATS = "%d %b %Y|%A %B %d, %Y|%Y-%m-%d|%H:%M:%S|%j %U|%c|%x|%X|%Z|%s"
FROZEN = (
    "26 Jul 2024|Friday July 26, 2024|2024-07-26|00:00:00|208 29|Fri Jul 26 00:00:00 2024|07/26/24|00:00:00||"
    "1721952000"
)


@pytest.mark.parametrize(
    "source",
    [
        f"{{{{ strftime_now('{FORMATS}') }}}}",
        f"{{{{ strftime_now(format='{FORMATS}') if strftime_now is defined else 'undefined' }}}}",
        f"{{% macro today() %}}{{{{ strftime_now('{FORMATS}') }}}}{{% endmacro %}}{{{{ today() }}}}",
    ],
)
def test_today_is_a_fixed_date_in_every_format(source, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    template = make_template("chat", make_tokenizer(source))
    assert template.render_all(["A", "B"]) == [FROZEN, FROZEN]


@pytest.mark.slow
def test_date_string_is_defined_only_by_an_argument():
    tokenizer = make_tokenizer("{{ date_string if date_string is defined else 'no date' }}")
    assert make_template("chat", tokenizer).render("Hi") == "no date"
    dated = make_template("chat", tokenizer, arguments={"date_string": "1 May"})
    assert dated.render("Hi") == "1 May"


ARGUMENTS = {
    "enable_thinking": False,
    "limits": {"low": 1.5, "names": ["é", None]},
    "eos_token": "!",
}


@pytest.mark.slow
def test_arguments_are_variables_of_the_chat_template():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if enable_thinking is false %}{{ m.content }}{% endif %}{% endfor %}"
        "{% macro show() %}{{ limits | tojson }}{{ tools }}{{ eos_token }}{% endmacro %}{{ show() }}"
    )
    template = make_template("chat", tokenizer, arguments=ARGUMENTS)
    assert template.arguments == ARGUMENTS
    assert template.render("Hi") == 'Hi{"low": 1.5, "names": ["é", null]}None!'
    theirs = tokenizer.apply_chat_template([USER._asdict()], tokenize=False, **ARGUMENTS)
    assert template.render((USER,)) == theirs
    hashes = {
        make_template("chat", tokenizer, arguments=arguments).hash
        for arguments in (None, {"enable_thinking": False}, {"enable_thinking": True}, ARGUMENTS)
    }
    assert len(hashes) == 4
    assert make_template("chat", tokenizer, arguments={}).hash in hashes
    reordered = dict(reversed(ARGUMENTS.items()))
    assert make_template("chat", tokenizer, arguments=reordered).hash == template.hash


@pytest.mark.parametrize(
    ("kind", "source", "arguments", "message"),
    [
        (
            "chat",
            "{{ enable_thinking }}",
            {"enable_thinkin": False},
            "the tokenizer's chat template takes no argument 'enable_thinkin'; "
            "did you mean enable_thinking?",
        ),
        (
            "chat",
            "{% set mode = 1 %}{% for m in messages %}{{ mode }}{% endfor %}",
            {"mode": 2},
            "the tokenizer's chat template takes no argument 'mode'; remove it",
        ),
        (
            "chat",
            CHAT,
            {"messages": []},
            "the tokenizer's chat template takes no argument 'messages'; remove it",
        ),
        (
            "chatml",
            CHAT,
            {"enable_thinking": False},
            "data.template=chatml takes no arguments; remove them, or set data.template=chat",
        ),
        (
            "json:dumps",
            CHAT,
            {"enable_thinking": False},
            "data.template=json:dumps takes no arguments; remove them, or set data.template=chat",
        ),
    ],
)
def test_an_argument_without_effect_is_rejected(kind, source, arguments, message):
    with pytest.raises(UserError) as caught:
        make_template(kind, make_tokenizer(source), arguments=arguments)
    assert str(caught.value) == f"data.template_arguments: {message}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "data.template=chat: the tokenizer's chat template cannot be read"),
        ("{{ x }}{{ 9 ** (9 ** 9) }}", "takes more than 1 s"),
    ],
)
def test_hostile_template_is_stopped_while_its_arguments_are_checked(source, message, monkeypatch):
    monkeypatch.setattr(templates, "CHAT_TIMEOUT_SECS", 1.0)
    with pytest.raises(UserError, match=message) as caught:
        make_template("chat", make_tokenizer(source), arguments={"x": 1})
    assert "\n" not in str(caught.value)


# A template with trimmed blocks and everything that transformers adds to Jinja.
ENVIRONMENT = """
  {% for message in messages %}
    {% if loop.index == 3 %}
      {% break %}
    {% elif message.role == "system" %}
      {% continue %}
    {% endif %}
{{ message | tojson }}
{{ message | tojson(indent=2, ensure_ascii=True, sort_keys=True, separators=(", ", " = ")) }}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
  {% endfor %}
{% set ns = namespace(n=1) %}
{% set ns.n = ns.n + 1 %}
{{ ns.n }} {{ dict(a=1) }} {{ tools }} {{ documents }} {{ bos_token }} {{ pad_token is defined }}
{{ missing }} {{ raise_exception is defined }} {{ add_generation_prompt }}
"""


def test_the_worker_supports_everything_that_apply_chat_template_supports():
    tokenizer = make_tokenizer(ENVIRONMENT)
    content = "<b>é & 'q'</b>\n"
    chat = (Message("system", "S"), Message("user", content), Message("assistant", "no"))
    theirs = tokenizer.apply_chat_template(
        [message._asdict() for message in chat], tokenize=False, add_generation_prompt=True
    )
    ours = make_template("chat", tokenizer).render(chat)
    assert ours == theirs
    assert '{"role": "user", "content": "<b>é & \'q\'</b>\\n"}\n' in ours
    assert "no" not in ours.replace("None", "")

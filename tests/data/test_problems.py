"""Tests encoding examples as problems: lengths, experts, ids and counts, with a real byte-level BPE tokenizer."""

import hashlib
import random

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from trapo_jax.data import (
    Example,
    Message,
    Template,
    card_shuffles_splits,
    encode_examples,
    fingerprint,
    hold_out,
    make_template,
    problem_batches,
)
from trapo_jax.data.encoding import Encoder
from trapo_jax.data.problems import MAX_TOKEN_CHARS
from trapo_jax.types import UserError

TEXT = "First we add.\n\nThen we stop.\n\n\nÜber 7 €, (so) it is 2.\n"


def train_tokenizer(*, adds_bos=False):
    """Returns a byte-level BPE tokenizer with a few hundred tokens, one of which is `.\\n\\n`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Stop.\n\n", "Go.\n\n", "No.\n\n"] * 9, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer()


def encode(examples, tokenizer, **options):
    options = {"template": Template("none"), "max_prompt_length": 100} | options
    return encode_examples(examples, tokenizer, **options)


def example(prompt="Q", answer="2", *solutions):
    return Example(prompt, answer, solutions, "s")


def test_prompts_and_experts_are_tokenized_and_experts_end_with_eos(bpe):
    (problem,), report = encode([example("What?", "2", TEXT, "It is 2.")], bpe)
    assert bpe.decode(problem.prompt_ids) == problem.prompt_text == "What?"
    assert [bpe.decode(e.token_ids) for e in problem.experts] == [TEXT + "</s>", "It is 2.</s>"]
    assert (problem.answer, problem.source) == ("2", "s")
    assert (report.num_read, report.num_kept, report.dropped, report.notes) == (1, 1, {}, {})


def test_paragraph_ends_follow_blank_lines(bpe):
    (problem,), _ = encode([example("Q", "2", TEXT)], bpe)
    (expert,) = problem.experts
    prefixes = [bpe.decode(expert.token_ids[:end]) for end in expert.paragraph_ends]
    first, second = "First we add.\n\n", "First we add.\n\nThen we stop.\n\n"
    assert prefixes == [first, second, second + "\n"]


def test_blank_line_of_two_tokens_ends_a_paragraph(byte_tokenizer):
    (problem,), _ = encode([example("Q", "2", "a\n\nb\nc\n\n\nd")], byte_tokenizer)
    assert problem.experts[0].paragraph_ends == (3, 8, 9)


@pytest.fixture
def byte_tokenizer():
    vocab = {"<s>": 0, "</s>": 1}
    vocab |= {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_the_template_is_part_of_the_prompt(bpe):
    template = make_template("qwen_math", bpe)
    (problem,), _ = encode([example("What?")], bpe, template=template, max_prompt_length=1000)
    assert problem.prompt_text == template.render("What?")
    assert bpe.decode(problem.prompt_ids) == problem.prompt_text


@pytest.mark.slow
def test_bos_occurs_exactly_once_at_the_start(bpe):
    with_bos = train_tokenizer(adds_bos=True)
    with_bos.chat_template = "{{ bos_token }}{{ messages[-1].content }}"
    for template in (Template("none"), Template("chatml"), make_template("chat", with_bos)):
        (problem,), _ = encode([example("What?", "2", "It")], with_bos, template=template)
        assert problem.prompt_ids.count(0) == 1
        assert problem.prompt_ids[0] == 0
        assert 0 not in problem.experts[0].token_ids
    (problem,), _ = encode([example("What?")], bpe)
    assert 0 not in problem.prompt_ids


LONG, SHORT = "x y z " * 20, "x y"


def test_overlong_prompts_are_dropped_and_counted(bpe):
    problems, report = encode([example(LONG), example(SHORT)], bpe, max_prompt_length=10)
    assert [problem.prompt_text for problem in problems] == [SHORT]
    assert report.dropped == {"with a prompt longer than 10 tokens": 1}


def test_truncated_prompts_keep_bos_and_their_end():
    options = {"max_prompt_length": 10, "overlong_prompts": "truncate"}
    for adds_bos in (False, True):
        tokenizer = train_tokenizer(adds_bos=adds_bos)
        problems, report = encode([example(LONG + "!"), example(SHORT)], tokenizer, **options)
        whole = tuple(tokenizer.encode(LONG + "!"))
        expected = (0, *whole[-9:]) if adds_bos else whole[-10:]
        assert problems[0].prompt_ids == expected
        assert problems[0].prompt_text == tokenizer.decode(expected)
        assert problems[1].prompt_text == SHORT
        assert report.notes["prompts truncated to 10 tokens"] == 1


@pytest.fixture
def encoded_lens(monkeypatch):
    """Returns a list that collects the lengths of all encoded strings."""
    lens = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, texts: lens.extend(map(len, texts)) or encode(self, texts)
    )
    return lens


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_with_far_too_many_characters_is_not_encoded(adds_bos, encoded_lens):
    """Encoding takes time and memory, even if the text is dropped afterwards."""
    tokenizer = train_tokenizer(adds_bos=adds_bos)
    text = "x y z " * 10_000 + "!"
    options = {"max_prompt_length": 10, "max_expert_length": 10}
    problems, report = encode([example(text), example(SHORT, "2", text)], tokenizer, **options)
    assert [problem.prompt_text for problem in problems] == [SHORT]
    assert report.dropped == {"with a prompt longer than 10 tokens": 1}
    assert report.notes["expert solutions dropped: longer than 10 tokens"] == 1
    with pytest.raises(
        UserError, match=r"the prompt 'x y z .*'\.\.\. has 60,001 characters; raise"
    ):
        encode([example(text)], tokenizer, overlong_prompts="error", **options)
    (problem,), _ = encode([example(text)], tokenizer, overlong_prompts="truncate", **options)
    whole = tuple(tokenizer.encode(text[-100:]))
    assert problem.prompt_ids == ((0, *whole[-9:]) if adds_bos else whole[-10:])
    assert max(encoded_lens) <= 10 * MAX_TOKEN_CHARS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("normalizer", "text", "message"),
    [
        (normalizers.Replace(Regex("(a+)+$"), "y"), "a" * 99 + "c", "fails .*retry-limit"),
        (normalizers.Replace("a", "aa" * 50), "a" * 300_000, "takes more than 1.25 GiB of memory"),
    ],
)
def test_a_tokenizer_that_takes_too_much_time_or_memory_is_stopped(
    normalizer, text, message, byte_tokenizer
):
    byte_tokenizer.backend_tokenizer.normalizer = normalizer
    with pytest.raises(UserError, match=f"the tokenizer {message}") as caught:
        encode([example("Q", "2", text)], byte_tokenizer)
    assert "\n" not in str(caught.value)


def test_an_overlong_prompt_raises_an_error_if_requested(bpe):
    with pytest.raises(UserError, match=r"max_prompt_length=10: the prompt 'x y z .*'\.\.\. has 1"):
        encode([example(LONG)], bpe, max_prompt_length=10, overlong_prompts="error")


def test_prompt_and_expert_of_exactly_the_maximum_length_are_kept(bpe):
    num_prompt, num_expert = len(bpe.encode(SHORT)), len(bpe.encode(LONG)) + 1
    options = {"max_prompt_length": num_prompt, "max_expert_length": num_expert}
    (problem,), report = encode([example(SHORT, "2", LONG)], bpe, **options)
    assert len(problem.experts[0].token_ids) == num_expert
    assert (report.dropped, report.notes) == ({}, {})


def test_overlong_experts_are_dropped_but_their_problems_stay(bpe):
    (problem,), report = encode([example("Q", "2", LONG, SHORT)], bpe, max_expert_length=10)
    assert [bpe.decode(e.token_ids) for e in problem.experts] == [SHORT + "</s>"]
    assert report.notes == {"expert solutions dropped: longer than 10 tokens": 1}
    (problem,), report = encode([example("Q", "2", LONG)], bpe, max_expert_length=10)
    assert problem.experts == ()
    assert report.notes["problems without an expert"] == 1


def test_expert_with_eos_inside_is_dropped_and_trailing_eos_is_not_repeated(bpe):
    inside, at_the_end = "x</s>y", "x</s></s>"
    (problem,), report = encode([example("Q", "2", inside, at_the_end)], bpe)
    assert [bpe.decode(e.token_ids) for e in problem.experts] == ["x</s>"]
    assert report.notes == {"expert solutions dropped: empty, or with EOS inside": 1}


def test_identical_problems_are_merged_with_all_their_experts(bpe):
    chat = (Message("user", "Q"),)
    rows = [example("Q", "2", "a"), example("R"), example("Q", "2", "b", "a"), example(chat)]
    problems, report = encode(rows, bpe)
    assert [problem.prompt_text for problem in problems] == ["Q", "R"]
    assert [bpe.decode(e.token_ids) for e in problems[0].experts] == ["a</s>", "b</s>"]
    assert report.dropped == {"merged into an identical problem": 2}
    assert (report.num_read, report.num_kept) == (4, 2)


def test_problem_id_depends_only_on_prompt_and_answer(bpe):
    rows = [
        example("Q", "2"),
        example("Q", "3"),
        example((Message("system", "S"), Message("user", "Q"))),
    ]
    template = Template("qwen_math")
    options = {"template": template, "max_prompt_length": 1000}
    problems, _ = encode(rows, bpe, **options)
    assert len({problem.id for problem in problems}) == 3
    again, _ = encode([example("Q", "2", "expert")._replace(source="other")], bpe)
    assert again[0].id == problems[0].id
    assert problems[0].id == hashlib.sha256(b'["Q", "2"]').hexdigest()[:16]


def test_no_usable_problem_raises_with_counts(bpe):
    with pytest.raises(
        UserError, match="no problem is usable: 0 of 1 kept; dropped: 1 with a prompt"
    ):
        encode([example(LONG)], bpe, max_prompt_length=10)
    with pytest.raises(UserError, match="no problem is usable: 0 of 0 kept"):
        encode([], bpe)


def test_encoding_does_not_depend_on_chunk_boundaries(bpe):
    rng = random.Random(0)
    rows = [example(str(i), "2", *["ab " * rng.randrange(5)] * (i % 3)) for i in range(600)]
    problems, _ = encode(rows, bpe)
    for i in (0, 255, 256, 511, 512, 599):
        (alone,), _ = encode([rows[i]], bpe)
        assert alone == problems[i]


def test_default_template_leaves_the_prompt_unchanged(tokenizer):
    examples = card_shuffles_splits(seed=0, num_train=4, num_validation=1, num_test=1)["train"]
    problems, _ = encode_examples(examples, tokenizer, max_prompt_length=16)
    assert [tokenizer.decode(p.prompt_ids) for p in problems] == [e.prompt for e in examples]
    assert fingerprint(problems) != fingerprint(problems[::-1])


def test_held_out_split_is_disjoint_by_prompt_and_reproducible():
    examples = [example(f"p{i % 10}", answer=str(i)) for i in range(30)]
    rest, taken = hold_out(examples, 4, seed=0)
    assert sorted([*rest, *taken]) == sorted(examples)
    assert len(taken) == 12
    assert not {e.prompt for e in rest} & {e.prompt for e in taken}
    assert hold_out(examples, 4, seed=0) == (rest, taken)
    assert hold_out(examples, 4, seed=1)[1] != taken
    with pytest.raises(UserError, match="10 problems cannot be held out of 10"):
        hold_out(examples, 10, seed=0)


def test_batch_larger_than_the_training_set_raises(bpe):
    problems, _ = encode([example()], bpe)
    with pytest.raises(UserError, match=r"train\.problems_per_step=2: more than the 1 training"):
        problem_batches(problems, batch_size=2, seed=0)

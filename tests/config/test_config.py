"""Tests that the defaults equal the shipped config, and that every mistake is reported in one clear line."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from support.commands import REPOSITORY, run_command
from trapo_jax.config import (
    Config,
    as_override,
    help_if_requested,
    list_fields,
    list_sections,
    load_config,
    parse_command_line,
)
from trapo_jax.config.help import COMMON_FIELDS
from trapo_jax.train import main as train
from trapo_jax.types import UserError


def load(*arguments):
    return load_config(Config, *parse_command_line(arguments))


def test_shipped_config_lists_every_default():
    file = REPOSITORY / "configs" / "smoke_cpu.yaml"
    assert load_config(Config, file, []) == Config()
    # The file sets every field explicitly, so that readers see all fields and can copy the file.
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(Config().to_yaml())


def test_overrides_can_be_written_in_three_forms():
    for arguments in (
        ["train.num_steps=7"],
        ["--train.num_steps", "7"],
        ["--train.num_steps=7"],
    ):
        assert load(*arguments).train.num_steps == 7


def test_overrides_take_precedence_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\ntrain: {num_steps: 5, warmup_steps: 1}\n")
    config = load("--config", str(file), "train.num_steps=9")
    assert (config.seed, config.train.num_steps, config.train.warmup_steps) == (3, 9, 1)


@pytest.mark.parametrize("text", ["####", "End with #### answer", "'#'", "x#y", "~"])
def test_a_number_sign_in_an_override_does_not_start_a_comment(text):
    suffix = load(f"data.prompt_suffix={text}").data.prompt_suffix
    assert suffix == {"'#'": "#", "~": None}.get(text, text)


def test_scientific_notation_is_parsed_as_a_number(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  learning_rate: 1e-6\n")
    assert load("--config", str(file)).train.learning_rate == 1e-6
    assert load("train.learning_rate=2.5E-5").train.learning_rate == 2.5e-5


def test_resolved_yaml_round_trips(tmp_path):
    config = load("method.name=luffy", "method.expert_weight=0.25", "mesh.tp=1")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(Config, file, []) == config


def help_on(*arguments):
    return help_if_requested(arguments, Config, "train", "about")


def test_help_on_all_lists_every_field_with_type_default_and_sentence():
    text = " ".join(help_on("--help", "all").split())
    fields = list(list_fields(Config))
    assert len(fields) > 35
    for name, kind, default, sentence in fields:
        assert " ".join(f"{name} ({kind}, {default}) {sentence}".split()) in text
        assert sentence.endswith("."), name


def test_help_is_short_and_lists_the_sections(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_on("seed=3", "-h", "train.num_steps=3")
    assert set(COMMON_FIELDS) <= {field.name for field in list_fields(Config)}
    assert all(f"  {name}  (" in text for name in COMMON_FIELDS)
    for name, description in list_sections(Config).items():
        assert re.search(rf"^  {name} +{re.escape(description[:50])}", text, re.MULTILINE)
        assert description.endswith(".")
    lines = text.splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("topic", ["lora", "data.columns", "method.alpha"])
def test_help_on_a_topic_lists_its_fields(topic):
    text = help_on("--help", topic)
    names = re.findall(r"^  (\S+)  \(", text, re.MULTILINE)
    assert names == [
        field.name for field in list_fields(Config) if f"{field.name}.".startswith(f"{topic}.")
    ]


def test_help_on_an_unknown_topic_suggests_a_similar_one():
    with pytest.raises(UserError, match=r"--help sampeling: no such topic; did you mean sampling"):
        help_on("--help", "sampeling")
    assert help_on("seed=3") is None


CARDS = "data.source=card_shuffles"

# Mistakes that users might make on the command line, each with a part of the expected one-line error.
COMMAND_LINES = [
    (["train.num_step=3"], "train.num_step: unknown field; did you mean train.num_steps?"),
    (["trian.num_steps=3"], "trian: unknown field; did you mean train"),
    (["train.size=1"], "train.size: unknown field; did you mean train.num_steps?"),
    (
        ["data.columns.preset=alpaca"],
        "data.columns.preset=\"alpaca\": input should be 'auto', 'trl'",
    ),
    (["learning_rate=1"], "did you mean train.learning_rate?"),
    (["zzz=1"], "zzz: unknown field; --help all lists all fields"),
    (["train..num_steps=3"], "train.: unknown field; did you mean train?"),
    (["train.num_steps=many"], 'train.num_steps="many": input should be a valid integer'),
    (["train.num_steps=1.5"], "train.num_steps=1.5: input should be a valid integer"),
    (["train.num_steps=true"], "train.num_steps=true: input should be a valid integer"),
    (["train.num_steps=[3]"], "train.num_steps=[3]: input should be a valid integer"),
    (["train.num_steps="], "train.num_steps=null: input should be a valid integer"),
    (["train.num_steps=0"], "train.num_steps=0: input should be greater than or equal to 1"),
    (["method.alpha=0"], "method.alpha=0: input should be greater than or equal to 0.000001"),
    (
        ["method.alpha=1e-40"],
        "method.alpha=1e-40: input should be greater than or equal to 0.000001",
    ),
    (["sampling.num_slots=1000000000"], "sampling.num_slots=1000000000: input should be less"),
    (["sampling.num_slots=9223372036854775808"], "sampling.num_slots=9223372036854775808: "),
    (["data.max_prompt_length=1000000000000"], "data.max_prompt_length=1000000000000: input"),
    (["sampling.max_completion_length=1000000000"], "sampling.max_completion_length=1000000000: "),
    (["train.per_device_rows=1000000000"], "train.per_device_rows=1000000000: input should be"),
    (["train.num_steps=1000000000000"], "train.num_steps=1000000000000: input should be less"),
    (["train.budget=1e-300"], "train.budget=1e-300: input should be greater than or equal to"),
    (["train.learning_rate=1e300"], "train.learning_rate=1e+300: input should be less than or"),
    (["train.learning_rate=1e-300"], "train.learning_rate=1e-300: input should be greater than"),
    (["sampling.temperature=1e-9"], "sampling.temperature=1e-09: input should be greater than"),
    (["evaluation.splits=[]"], "evaluation.splits=[]: list at least one split; to skip"),
    (["evaluation.splits=[test, test]"], "a split is listed twice; list each split once"),
    (
        ["sampling.max_completion_length=1000000"],
        "it exceeds the 256 positions of the model (max_position_embeddings)",
    ),
    (["lora.targets=[mlp]"], "lora.targets"),
    (
        ["data.task=chain_sum"],
        'data.task="chain_sum": has an effect only with data.source=reasoning',
    ),
    (["data.task_options={a: 1}"], "has an effect only with data.source=reasoning_gym"),
    (
        ["data.source=reasoning_gym", "data.difficulty=early", "model.path=m"],
        'data.difficulty="early": has an effect only with data.source=card_shuffles',
    ),
    (
        [
            "data.train_files=a.jsonl",
            "rewards.functions=math",
            "data.num_train=10",
            "model.path=m",
        ],
        "data.num_train=10: has no effect with data.source=files; set data.limit",
    ),
    (["rewards.functions=reasoning_gym"], "reasoning_gym requires data.source=reasoning_gym"),
    (
        ["data.train_files=a.jsonl", "rewards.functions=reasoning_gym", "model.path=m"],
        "or files with the tasks' metadata (data.columns.extra=metadata)",
    ),
    (["model.path=card_shuffle_tiny"], "no such model; did you mean card_shuffles_tiny?"),
    (["method.alpha=1.5"], "method.alpha=1.5: input should be less than or equal to 1"),
    (["method.name=ppo"], "method.name='ppo': no such method; choose 'trapo', 'trapo_plus'"),
    (["method.name=3"], "method.name=3: input should be a valid string"),
    (
        ["method.alhpa=0.2"],
        "method.alhpa=0.2: trapo has no such hyperparameter; did you mean alpha?",
    ),
    (["method.name=sft", "method.alpha=0.2"], "method.alpha=0.2: sft has no such hyperparameter"),
    (["model.dtype=fp16"], "model.dtype=\"fp16\": input should be 'float32' or 'bfloat16'"),
    (["train.budget_unit=flops"], "train.budget=null: train.budget_unit=flops needs an amount"),
    (["train.budget=0"], "train.budget=0: input should be greater than or equal to 0.000000001"),
    (
        ["train.learning_rate=-1e-4"],
        "train.learning_rate=-0.0001: input should be greater than or equal to",
    ),
    (["train.learning_rate=.inf"], "train.learning_rate=Infinity: "),
    (["train.learning_rate=.nan"], "train.learning_rate=NaN: input should be a finite number"),
    (["train.learning_rate=1e999"], "train.learning_rate=Infinity: "),
    (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
    (["seed=" + "9" * 5000], "9999: not a valid YAML value"),
    (["seed=" + "[" * 1000], "[[[[: not a valid YAML value"),
    (["seed=&a [*a]"], "command line: seed='&a [*a]': not a valid YAML value"),
    (["a." * 10_000 + "b=1"], ": a name with 20001 characters"),
    (['data.system_prompt="\\ud800"'], "command line: data.system_prompt: not Unicode text"),
    (["data.template=2026-02-31"], "data.template='2026-02-31': not a valid YAML value"),
    (["output_dir=3"], "output_dir=3: input should be a valid string"),
    (["train=3"], "train=3: "),
    (["train="], "train=null: "),
    (["train.num_steps.x=3"], "train.num_steps={"),
    (
        ["train=3", "train.num_steps=3"],
        "command line: train=3: not a section of fields, but the command line sets train.num_steps",
    ),
    (["data.num_train=4"], "larger than data.num_train=4"),
    (["data.source=files"], "data.train_files: not set; specify files or Hub datasets, or"),
    (["mesh.fsdp=0"], "mesh.fsdp=0: set a number of devices, or -1 for all devices that remain"),
    (["evaluation.every=1.5"], "evaluation.every=1.5: set a number of steps, or a fraction"),
    (["train.row_length=8"], "train.row_length=8: less than data.max_prompt_length"),
    (
        ["checkpoint.keep_best=1", "evaluation.every=0"],
        "with evaluation.every=0, no best checkpoint is ever found",
    ),
    (["--seed"], "--seed is not an option without a value; to set a field, write --FIELD=VALUE"),
    (["--seed", "--train.num_steps=3"], "--seed is not an option without a value"),
    (["--hlep"], "--hlep is not an option without a value"),
    (["train.num_steps=", "3"], "'3' is not FIELD=VALUE; write train.num_steps=3 without spaces"),
    (
        ["rewards.functions=[math,", "a:b]"],
        "put rewards.functions=[math, a:b] in quotation marks, because it contains spaces",
    ),
    (["method=grpo"], "it is a section: set a field of it, such as method.name (--help method"),
    (["data.train_files=a.jsonl,b.jsonl", "data.train_files=7"], "; write a list as [A, B]"),
    (
        ["evaluation.num_samples_by_source={aime*:32}"],
        "input should be a valid integer; in YAML, a colon must be followed by a space",
    ),
    (
        ["rewards.by_source=math"],
        "; write a mapping as {NAME: VALUE}, with a space after the colon",
    ),
    (["data.system_prompt=@x"], "text with special characters needs quotation marks inside the"),
    (["train.seed=3"], "train.seed: unknown field; did you mean seed or data.seed?"),
    (["train.alpha=3"], "train.alpha: unknown field; did you mean lora.alpha or method.alpha?"),
    (["seed"], "'seed' is not FIELD=VALUE"),
    (["train.num_steps", "3"], "'train.num_steps' is not FIELD=VALUE"),
    (
        ["evaluation.temperature=1e-40"],
        "evaluation.temperature=1e-40: must be 0, for greedy decoding, or at least 0.01",
    ),
    (["train.num_steps", "=", "3"], "not FIELD=VALUE; write train.num_steps=3 without spaces"),
    (["configs/smoke_cpu.yaml"], "did you mean --config configs/smoke_cpu.yaml?"),
    (["--config", "missing.yaml"], "missing.yaml: no such file in /"),
    (["--config", "configs/own_dta.yaml"], "; did you mean configs/own_data.yaml?"),
    (["--config", "smoke_cpuu"], "; did you mean the shipped config smoke_cpu?"),
    (["configs"], "'configs' is not FIELD=VALUE; did you mean model.path=configs?"),
    (["--config", "configs"], "configs: a folder, not a regular file"),
    (["--config", "a.yaml", "--config=b.yaml"], "two --config files, a.yaml and b.yaml; pass one"),
    (["=3"], "has no field name"),
    (["seed=[1"], "seed='[1': not a valid YAML value"),
    (["model.path=/nowhere", CARDS], "model.path='/nowhere': no such folder; pass a"),
    (
        ["model.path=docs/../README.md", CARDS],
        "README.md': this is a file; pass the folder that contains",
    ),
    (["model.path=./confgis", CARDS], f"no such folder in {REPOSITORY}; did you mean configs?"),
    (
        ["model.path=a/model"],
        "data.train_files: not set; specify files or Hub datasets, or set data.source",
    ),
    (
        ["model.path=Qwen/Qwen2.5-0.5B", CARDS],
        "model.path='Qwen/Qwen2.5-0.5B': no such folder, and it is not in the local Hugging Face Hub cache "
        "(HF_HUB_OFFLINE is set); with network access, run `hf download Qwen/Qwen2.5-0.5B`",
    ),
    (["data.max_prompt_length=3"], "raise data.max_prompt_length"),
    (["mesh.tp=3"], "mesh.fsdp=1 x mesh.tp=3: the number of devices, 1, is not divisible by 3"),
    (["data.train_files=no.parquet"], "model.path: not set; specify a Hugging Face model folder"),
    (
        ["data.train_files=no.parquet", "model.path=card_shuffles_tiny"],
        "rewards.functions: not set, and data.source=files has no default; use math",
    ),
    (
        ["data.train_files=x.parquet", "data.source=card_shuffles"],
        "data.source=card_shuffles: data.train_files is not read; set data.source=files",
    ),
    (
        ["data.train_files=no.parquet", "model.path=card_shuffles_tiny", "rewards.functions=math"],
        f"data.train_files: no.parquet: no such file or folder in {REPOSITORY}",
    ),
]


def nested_aliases(opening, closing, comma=", "):
    """Returns YAML in which every line repeats the previous line twice."""
    lines = [f"a{i}: &a{i} {opening}*a{i - 1}{comma}*a{i - 1}{closing}" for i in range(1, 40)]
    return "\n".join(["a0: &a0 x", *lines])


FILES = [
    ("seed: 1\ntrain: [3\n", "line 3: not valid YAML"),
    ("seed: 1\ntrain:\n\tnum_steps: 3\n", "line 3: not valid YAML (found character '\\t'"),
    ("seed: 1\nseed: 2\n", "line 2: not valid YAML (duplicate key 'seed')"),
    ("train:\n  num_steps: 1\n  num_steps: 2\n", "line 3: not valid YAML (duplicate key"),
    ("[1, 2]: 3\n", "line 1: not valid YAML ([1, 2] cannot be a field name)"),
    ("2026-11-24: 3\n", "contains something that cannot be written as JSON (keys must be str"),
    ("seed: 1\n---\nseed: 2\n", "not valid YAML (but found another document)"),
    ("seed: !!python/object/apply:os.system ['true']\n", "not valid YAML (could not determine"),
    ("seed: " + "9" * 5000, "line 1: not valid YAML (a number with 5000 characters)"),
    ("seed: 1" + ":1" * 10_000, "line 1: not valid YAML (a number with 20001 characters)"),
    ("seed: !!timestamp 3", "not valid YAML ('NoneType' object has no attribute"),
    ("seed: &a [*a]\n", "line 1: not valid YAML (an alias inside the node that it refers to)"),
    ("seed: " + "[" * 1000, "line 1: not valid YAML (nested too deeply)"),
    ("seed:" * 1000, "not valid YAML"),
    (nested_aliases("[", "]"), "not valid YAML (expands to more than 262,144 characters)"),
    (nested_aliases("{a: ", "}", ", b: "), "not valid YAML (expands to more than 262,144"),
    ("a: &a " + "x" * 2000 + "\nb: [" + "*a," * 1000 + "]", "line 2: not valid YAML (expands"),
    ("seed: [" + "1, " * 100_000 + "]", "larger than 262,144 bytes"),
    ('data: {system_prompt: "\\ud800"}', "'data.system_prompt': not Unicode text"),
    ("- 1\n", "expected fields such as 'seed: 0', found [1]"),
    ("", "expected fields such as 'seed: 0', found null"),
    ("\0", "not valid YAML"),
    ("train:\n  num_step: 3\n", "train.num_step: unknown field; did you mean train.num_steps?"),
    ("train:\nseed: 1\n", "train=null: "),
    ("seed: '3'\n", 'seed="3": input should be a valid integer'),
    ("seed: \udcff\n", "not UTF-8 text (byte 6)"),
]


def assert_refused(capsys, arguments, message, folder):
    """Checks that the command prints one error line, exits with code 2, and creates no files."""
    before = sorted(folder.rglob("*"))
    assert train([f"output_dir={folder / 'run'}", *arguments]) == 2
    output, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not output or output.startswith("problems (")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINES, ids=[x[1] for x in COMMAND_LINES])
def test_command_line_mistake_is_reported_in_one_line(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    assert_refused(capsys, arguments, message, tmp_path)


@pytest.mark.parametrize(("text", "message"), FILES, ids=[x[1] for x in FILES])
def test_mistake_in_a_file_is_reported_in_one_line_that_names_it(text, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(capsys, ["--config", str(file)], message, tmp_path)
    with pytest.raises(UserError) as caught:
        load("--config", str(file))
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("of_file", "argument", "field", "is_of_file"),
    [
        ("seed: -1", "log_samples=3", "seed=-1", True),
        ("seed: 1", "seed=-1", "seed=-1", False),
        ("train: {num_steps: 3}", "train.num_step=3", "train.num_step: unknown", False),
        ("train: {num_step: 3}", "train.num_steps=3", "train.num_step: unknown", True),
        ("train: 3", "log_samples=3", "train=3", True),
        ("train: 3", "train.num_steps=3", "train=3: not a section of fields, but the", True),
        # Mistakes that are found by checking a whole section or several fields together.
        ("method: {alpha: 7}", "method.name=trapo", "method.alpha=7", True),
        ("method: {name: trapo}", "method.alpha=7", "method.alpha=7", False),
        ("method: {name: trapo}", "method.alhpa=1", "method.alhpa=1", False),
        ("rewards: {weights: [1, 2]}", "seed=3", "rewards.weights=[1.0, 2.0]", True),
        ("seed: 3", "rewards.weights=[1,2]", "rewards.weights=[1.0, 2.0]", False),
        ("mesh: {fsdp: 0}", "mesh.tp=1", "mesh.fsdp=0", True),
        ("mesh: {tp: 1}", "mesh.fsdp=0", "mesh.fsdp=0", False),
        ("train: {budget_unit: flops}", "train.num_steps=3", "train.budget=null", True),
        ("train: {num_steps: 3}", "train.budget_unit=flops", "train.budget=null", False),
    ],
)
def test_a_mistake_is_attributed_to_the_file_or_the_command_line(
    of_file, argument, field, is_of_file, tmp_path
):
    file = tmp_path / "c.yaml"
    file.write_text(of_file + "\n")
    with pytest.raises(UserError) as caught:
        load("--config", str(file), argument)
    assert str(caught.value).startswith(f"{file if is_of_file else 'command line'}: {field}")


def test_relative_paths_are_looked_up_in_the_working_directory_then_beside_the_file(
    tmp_path, monkeypatch
):
    (tmp_path / "configs" / "base").mkdir(parents=True)
    for name in ("configs/a.jsonl", "configs/b.jsonl", "configs/c1.parquet", "b.jsonl"):
        (tmp_path / name).write_text("")
    sections = {
        "model": {"path": "base"},
        "data": {"train_files": ["a.jsonl", "b.jsonl", "c*.parquet", "base#dev", "owner/name"]},
        "rewards": {"functions": "math"},
    }
    file = tmp_path / "configs" / "c.yaml"
    file.write_text(yaml.safe_dump(sections))
    monkeypatch.chdir(tmp_path)
    for given in ("configs/c.yaml", str(file)):
        folder = given.removesuffix("/c.yaml")
        config = load("--config", given)
        assert config.model.path == f"{folder}/base"
        assert config.data.train_files == (
            *(f"{folder}/a.jsonl", "b.jsonl", f"{folder}/c*.parquet", f"{folder}/base#dev"),
            "owner/name",
        )
    absolute = load("--config", "configs/c.yaml", f"data.train_files={tmp_path}/configs/a.jsonl")
    assert absolute.data.train_files == (f"{tmp_path}/configs/a.jsonl",)


def test_each_mistake_is_reported_on_its_own_line():
    with pytest.raises(UserError) as caught:
        load("train.num_step=3", "seed=-1")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "not a directory; choose a different output_dir"),
        ("file/run", "is a file"),
        ("folder", "neither empty nor a run directory; choose a different output_dir"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        (
            "other",
            "contains a run with seed=1, not 0; choose a different output_dir, or set seed=1 to resume the run",
        ),
    ],
)
def test_unusable_output_dir_is_reported_in_one_line(name, message, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text(load("seed=1").to_yaml())
    assert_refused(capsys, [f"output_dir={json.dumps(str(tmp_path / name))}"], message, tmp_path)


def test_command_with_a_mistake_exits_with_2_and_creates_nothing(tmp_path):
    result = run_command("trapo_jax.train", f"output_dir={tmp_path}/run", "train.num_step=3")
    assert result.returncode == 2
    assert "did you mean train.num_steps?" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_tilde_in_output_dir_is_expanded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    assert train(["output_dir=~/file"]) == 2
    assert (
        f"output_dir={tmp_path}/file: not a directory; choose a different output_dir"
        in capsys.readouterr().err
    )


def test_help_command_prints_the_fields():
    result = run_command("trapo_jax.train", "--help", "train")
    assert result.returncode == 0
    assert "train.learning_rate  (float, 5.0e-06; 0.0002 for card_shuffles)" in result.stdout


@pytest.mark.parametrize(
    ("main", "code", "error"),
    [
        ("raise KeyboardInterrupt", 130, "error: stopped\n"),
        ("print('x' * 100_000, flush=True); print('x' * 100_000)", 141, ""),
        ("raise SystemExit(2)", 2, ""),
        ("return 3", 3, ""),
    ],
)
def test_a_command_never_ends_with_a_traceback(main, code, error):
    program = f"from trapo_jax.runs.command_line import run_and_exit\ndef main():\n    {main}\nrun_and_exit(main)"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()  # as in `python ... | head`
    assert process.stderr.read() == error
    assert process.wait() == code


@pytest.mark.parametrize(
    "text",
    [
        "End with a line of the form: The answer is N.",
        "- as a list",
        "a: b: c",
        "Q: x\nA: y",
        "# a",
    ],
)
def test_yaml_block_syntax_on_the_command_line_is_plain_text(text):
    assert load(f"data.prompt_suffix={text}").data.prompt_suffix == text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.prompt_suffix", 'it\'s: [N] "x" $HOME'),
        ("data.prompt_suffix", "3"),
        ("data.prompt_suffix", "null"),
        ("data.prompt_suffix", "[x"),
        ("data.prompt_suffix", "two\nlines"),
        ("data.prompt_suffix", None),
        ("data.train_files", ["a b.jsonl", "c.jsonl"]),
        ("train.learning_rate", 1e-6),
        ("limits.max_logprob_gap", 0.5),
    ],
)
def test_overrides_are_quoted_for_the_shell_and_read_back(field, value):
    (argument,) = shlex.split(as_override(field, value))
    section, name = field.split(".")
    more = ["model.path=x", "rewards.functions=math"] if name == "train_files" else []
    found = getattr(getattr(load(argument, *more), section), name)
    assert (list(found) if isinstance(found, tuple) else found) == value

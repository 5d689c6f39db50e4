"""Tests that only one run and one process use a run directory, and which settings may change when a run is resumed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from support.commands import run_command
from support.short_run import JOB
from trapo_jax.config import (
    Config,
    EvaluateConfig,
    list_fields,
    load_config,
    load_train_config,
    user_code,
)
from trapo_jax.config.changes import CHANGEABLE_FIELDS
from trapo_jax.methods import fingerprint, make_method
from trapo_jax.runs import directory
from trapo_jax.runs.directory import (
    check_shared,
    lock_folder,
    prepare_run_folder,
    record_changes,
    run_identity,
    write_atomically,
)
from trapo_jax.runs.manifests import read_manifest, write_manifest
from trapo_jax.runs.resuming import check_run_folder, unfinished_beside
from trapo_jax.types import UserError


def text(**overrides):
    return load_config(
        Config, None, [(k.replace("__", "."), v) for k, v in overrides.items()]
    ).to_yaml()


@pytest.fixture
def folder(tmp_path):
    prepare_run_folder(tmp_path / "run", text(train__decay_start="1"))
    return tmp_path / "run"


def test_a_run_may_change_its_mesh_and_limits(folder):
    ours = text(
        train__decay_start="1", mesh__fsdp="-1", checkpoint__keep="5", sampling__num_slots="8"
    )
    changes = check_run_folder(folder, ours)
    assert changes == {
        "checkpoint.keep": (2, 5),
        "mesh.fsdp": (1, -1),
        "sampling.num_slots": (32, 8),
    }
    assert check_run_folder(folder, text(train__decay_start="1", output_dir="x")) == {}
    record_changes(folder, ours, changes, after_step=3)
    assert check_run_folder(folder, ours) == {}
    (line,) = (folder / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["after_step"] == 3
    assert json.loads(line)["changed"]["mesh.fsdp"] == {"was": 1, "is": -1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "1"),
        ("method.alpha", "0.2"),
        ("train.learning_rate", "0.001"),
        ("train.problems_per_step", "4"),
        ("rewards.timeout_secs", "9.0"),
        ("evaluation.num_samples", "4"),
    ],
)
def test_settings_that_affect_results_must_not_change(folder, field, value):
    ours = load_config(Config, None, [("train.decay_start", "1"), (field, value)]).to_yaml()
    with pytest.raises(
        UserError, match=f"contains a run with {field}=.*, not {value}; choose a different"
    ):
        check_run_folder(folder, ours)


@pytest.mark.parametrize("num_steps", [400, 20])
def test_the_length_of_a_run_may_change_if_its_learning_rate_does_not_depend_on_it(
    num_steps, folder, tmp_path
):
    (folder / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
    other = text(train__decay_start="1", train__num_steps=str(num_steps))
    assert check_run_folder(folder, other) == {"train.num_steps": (375, num_steps)}
    prepare_run_folder(tmp_path / "decaying", text())
    with pytest.raises(
        UserError,
        match=rf"not {num_steps}; with train.decay_start=0.5, the learning rate depends on the length",
    ):
        check_run_folder(tmp_path / "decaying", text(train__num_steps=str(num_steps)))


def test_a_run_must_not_become_shorter_than_its_completed_steps(folder):
    (folder / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "3").mkdir()
    with pytest.raises(
        UserError, match=r"train.num_steps=19, but the run has completed 20 steps; set train.num_s"
    ):
        check_run_folder(folder, text(train__decay_start="1", train__num_steps="19"))


def test_a_run_must_not_become_longer_if_its_method_depends_on_its_length(tmp_path):
    staged = {"method__name": "sft_then_grpo", "train__decay_start": "1"}
    prepare_run_folder(tmp_path / "staged", text(**staged))
    with pytest.raises(
        UserError, match=r"not 400; method.name=sft_then_grpo depends on the length"
    ):
        check_run_folder(
            tmp_path / "staged", text(**staged, train__num_steps="400"), depends_on_length=True
        )


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "null"])
def test_a_run_without_a_readable_method_causes_a_one_line_error(tmp_path, content):
    folder, trapo = tmp_path / "run", fingerprint(make_method("trapo"))
    prepare_run_folder(folder, text(), method=trapo)
    (folder / "method.json").unlink()
    if content is not None:
        (folder / "method.json").write_text(content)
    with pytest.raises(UserError, match=r"method\.json: missing or damaged") as error:
        check_run_folder(folder, text(), method=trapo)
    assert "\n" not in str(error.value)


def module_of(tmp_path, monkeypatch, name):
    """Writes a module with a user-defined reward function and method, and returns the module's path."""
    file = tmp_path / f"{name}.py"
    file.write_text(
        "from trapo_jax.methods import Hyperparameters, make_method\n"
        "def exact(response, problem): return response == problem.answer\n"
        "class Half(Hyperparameters):\n"
        "    def make(self): return make_method('grpo')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rewards.functions", "{}:exact"),
        ("rewards.by_source", "{{x: {}:exact}}"),
        ("method.name", "{}:Half"),
    ],
)
def test_a_run_is_not_resumed_if_user_code_has_changed(tmp_path, monkeypatch, field, value):
    name = f"code_of_{field.replace('.', '_')}"
    file = module_of(tmp_path, monkeypatch, name)
    config = load_config(Config, None, [(field, value.format(name))])
    folder, content = tmp_path / "run", file.read_text()
    written = {"method": fingerprint(make_method("grpo")), "code": user_code(config)}
    prepare_run_folder(folder, config.to_yaml(), **written)

    def check():
        check_run_folder(folder, config.to_yaml(), **{**written, "code": user_code(config)})

    file.write_text(content + "# edited\n")
    check()  # Without a checkpoint, the run starts from the beginning, so the code may change.
    (folder / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="changed since the run started") as caught:
        check()
    message = str(caught.value)
    assert str(file) in message
    assert f"delete {folder / 'user_code.json'} to continue" in message
    assert "\n" not in message
    file.write_text(content)
    check()
    file.write_text(content + "# edited\n")
    (folder / "user_code.json").unlink()
    check()


def test_user_code_includes_the_module_that_defines_a_function(tmp_path, monkeypatch):
    module_of(tmp_path, monkeypatch, "defines_exact")
    (tmp_path / "offers_exact.py").write_text("from defines_exact import exact\n")
    functions = ["offers_exact:exact", "trapo_jax.rewards:grade_math", "builtins:len"]
    config = load_config(Config, None, [("rewards.functions", json.dumps(functions))])
    assert [source.module for source in user_code(config)] == ["offers_exact", "defines_exact"]
    assert user_code(load_config(Config)) == []


def test_an_evaluation_is_not_resumed_with_another_reward_function(tmp_path, monkeypatch):
    file = module_of(tmp_path, monkeypatch, "code_of_an_evaluation")
    fields = [("model.path", "card_shuffles_tiny"), ("rewards.functions", f"{file.stem}:exact")]
    config = load_config(EvaluateConfig, None, fields)
    prepare_run_folder(tmp_path / "scores", "{}\n", code=user_code(config))
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(UserError, match="changed since the run started"):
        check_run_folder(tmp_path / "scores", "{}\n", code=user_code(config))


def test_a_refusal_to_resume_names_every_field_that_differs(tmp_path):
    folder = tmp_path / "run"
    prepare_run_folder(folder, load_config(Config).to_yaml())
    changes = [("seed", "3"), ("train.learning_rate", "1e-3"), ("method.alpha", "0.2")]
    changes += [("data.prompt_suffix", "boxed")]
    changed = load_config(Config, None, [*changes, ("mesh.tp", "2")]).to_yaml()
    with pytest.raises(UserError) as caught:
        check_run_folder(folder, changed)
    message = str(caught.value)
    assert (
        "data.prompt_suffix=null, not boxed, method.alpha=0.1, not 0.2, seed=0, not 3, train.learning_rate=0.0002, not 0.001"
        in message
    )
    assert (
        "set data.prompt_suffix=null method.alpha=0.1 seed=0 train.learning_rate=0.0002 to resume"
        in message
    )
    assert "mesh" not in message
    assert "\n" not in message


def test_different_spellings_of_the_path_of_a_file_are_not_a_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    prepare_run_folder(
        tmp_path / "run",
        text(data__train_files="[a.jsonl]", model__path="x", rewards__functions="math"),
    )
    same = text(
        data__train_files=f"[{tmp_path}/a.jsonl]", model__path="x", rewards__functions="math"
    )
    assert check_run_folder(tmp_path / "run", same) == {}
    other = text(data__train_files="[b.jsonl]", model__path="x", rewards__functions="math")
    with pytest.raises(UserError, match=r"contains a run with data\.train_files="):
        check_run_folder(tmp_path / "run", other)


def test_an_unfinished_run_with_other_settings_is_found(tmp_path):
    names = ("a_grpo-0123abcd", "a_grpo-00000000", "a_grpo2-0123abcd", "b_grpo-0123abcd", "a_grpo")
    for i, name in enumerate(names):
        prepare_run_folder(tmp_path / name, text())
        os.utime(tmp_path / name / "config.yaml", (i, i))
    (tmp_path / "a_grpo" / "summary.json").touch()
    assert unfinished_beside(tmp_path / "a_grpo-ffffffff") == tmp_path / "a_grpo-00000000"
    assert unfinished_beside(tmp_path / "a_grpo2-0123abcd") is None


def test_a_run_of_another_method_is_rejected_and_the_error_names_the_method(tmp_path):
    """The config does not contain the definitions of user-defined methods, so fingerprints identify them."""
    folder, trapo = tmp_path / "run", fingerprint(make_method("trapo"))
    prepare_run_folder(folder, text(), method=trapo)
    assert check_run_folder(folder, text(), method=trapo) == {}
    mine = dataclasses.replace(make_method("trapo"), name="mine")
    with pytest.raises(UserError, match="a run of method trapo, not mine; choose a different"):
        check_run_folder(folder, text(), method=fingerprint(mine))
    changed = dataclasses.replace(make_method("trapo"), second_expert_last=False)
    with pytest.raises(
        UserError, match=r"a different version of method trapo \(differs in second_expert_last"
    ):
        check_run_folder(folder, text(), method=fingerprint(changed))
    with pytest.raises(UserError, match=r"contains a run with method\.name=trapo, not grpo"):
        check_run_folder(folder, text(method__name="grpo"))


def test_a_run_of_another_version_may_lack_only_changeable_fields(folder):
    config = folder / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("  stuck_after_secs: 3600.0\n", ""))
    ours = text(train__decay_start="1")
    assert check_run_folder(folder, ours) == {"limits.stuck_after_secs": ("absent", 3600.0)}
    config.write_text(whole.replace("  adam_b1: 0.9\n", ""))
    with pytest.raises(
        UserError,
        match=r"a different version of trapo_jax \(its config lacks the field train.adam_b1\)",
    ):
        check_run_folder(folder, ours)


def test_a_different_entry_of_a_mapping_is_a_different_setting_not_another_version(tmp_path):
    problems = {"data.source": "reasoning_gym", "data.task": "chain_sum", "model.path": "m"}
    made, changed = (
        load_train_config(overrides={**problems, "data.task_options": options})
        for options in ({}, {"min_terms": 5})
    )
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    message = r'contains a run with data\.task_options={}, not {"min_terms": 5};'
    with pytest.raises(UserError, match=message):
        check_run_folder(tmp_path, changed.to_yaml())


def test_changeable_fields_exist():
    names = [name for name, *_ in list_fields(Config)]
    for field in CHANGEABLE_FIELDS:
        assert any(
            name.startswith(field) if field.endswith(".") else name == field for name in names
        )


@pytest.mark.parametrize("content", ["", "- 1\n", "seed: [", "\0", "a: &a [*a]", "[" * 999])
def test_a_damaged_config_causes_a_one_line_error(folder, content):
    (folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config.yaml"):
        check_run_folder(folder, text())


NAMES = (
    "evaluations",
    "checkpoints",
    "tb",
    "model",
    "hf",
    "summary.json",
    "metrics.jsonl",
    ".lock",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_pipe_in_place_of_a_file_or_folder_of_a_run_is_rejected(folder, name):
    """Without the check, the run would wait forever or fail only after training."""
    shutil.rmtree(folder / name, ignore_errors=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"/{name}: .*not a (folder|regular file)"):
        check_run_folder(folder, text(train__decay_start="1"))


def test_a_file_in_place_of_a_folder_of_a_run_is_rejected(folder):
    (folder / "evaluations").write_text("")
    with pytest.raises(
        UserError, match="evaluations: not a folder, but a run needs a folder there"
    ):
        check_run_folder(folder, text(train__decay_start="1"))


def test_an_invalid_folder_is_rejected_before_anything_is_created(tmp_path):
    (tmp_path / "file").write_text("")
    for name, message in (
        ("file", "not a directory; choose"),
        ("file/run", "file is a file"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=message) as error:
            check_run_folder(tmp_path / name, text())
        assert "output_dir=" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def read_only_folder(tmp_path):
    """Mounts a folder to which not even root can write, and yields its path."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs requires root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_is_not_writable_is_rejected(read_only_folder):
    for folder in (read_only_folder, read_only_folder / "a" / "run"):
        with pytest.raises(
            UserError, match=f"output_dir={folder}: {read_only_folder} is not writable"
        ):
            check_run_folder(folder, text())


def test_a_run_that_was_killed_before_it_wrote_anything_can_be_restarted(tmp_path):
    with lock_folder(tmp_path / "a" / "run"):
        pass
    assert check_run_folder(tmp_path / "a" / "run", text()) == {}


HOLDER = """
import sys, time
from pathlib import Path
from trapo_jax.runs.directory import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_rejected_until_the_first_exits_or_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match="another process is writing to it"),
        lock_folder(tmp_path),
    ):
        raise AssertionError("two processes in one folder")
    holder.kill()
    holder.wait()
    # The same process can acquire the lock again, even though `error` keeps the frame of the first attempt alive.
    for _ in range(2):
        with pytest.raises(KeyError) as error, lock_folder(tmp_path):
            raise KeyError
        assert error.tb


WRITER = """
import sys
from pathlib import Path
from trapo_jax.runs.directory import write_atomically
print("started", flush=True)
for _ in range(300):
    write_atomically(Path(sys.argv[1]), "other" * 10_000)
"""


@pytest.mark.slow
def test_two_processes_may_write_the_same_file(tmp_path):
    """A run may end and write its report while the report command is writing the same file."""
    file = tmp_path / "report.html"
    command = [sys.executable, "-c", WRITER, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "started\n"
        while other.poll() is None:
            write_atomically(file, "this" * 10_000)
            assert file.read_text() in ("this" * 10_000, "other" * 10_000)
    assert other.returncode == 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_that_another_host_does_not_see_is_rejected(tmp_path, monkeypatch):
    """On the other host, the directory is missing or belongs to another run, for example if the path is relative."""
    monkeypatch.setattr(directory, "SHARED_AFTER_SECS", 0)
    prepare_run_folder(tmp_path / "run", text(), method=fingerprint(make_method("trapo")))
    run_id = run_identity(tmp_path / "run", text())["id"]
    check_shared(tmp_path / "run", run_id)
    for folder, name in ((tmp_path / "run", "another id"), (tmp_path / "absent", run_id)):
        with pytest.raises(UserError, match=f"output_dir={folder}: not the same directory"):
            check_shared(folder, name)


def pretend_length(folder, num_steps):
    """Edits a run of 12 steps as if it had been started with a different length and a constant learning rate."""
    config = folder / "config.yaml"
    text = config.read_text().replace("num_steps: 12", f"num_steps: {num_steps}")
    config.write_text(text.replace("decay_start: 0.5", "decay_start: 1.0"))
    for checkpoint in (folder / "checkpoints").iterdir():
        about = {**read_manifest(checkpoint), "run": run_identity(folder, config.read_text())}
        about.pop("files")
        write_manifest(checkpoint, about)


@pytest.mark.slow
def test_an_unfinished_run_ends_after_its_completed_steps_if_it_is_made_shorter(
    finished_run, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    pretend_length(folder, 500)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hf")
    result = run_command("trapo_jax.train", f"output_dir={folder}", *JOB, "train.decay_start=1")
    assert result.returncode == 0, result.stderr
    assert f"resuming {folder} after step 12, train.num_steps=12 (was 500)" in result.stdout
    assert (folder / "hf" / "model.safetensors").is_file()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["split"], last["step"]) == ("eval", "test", 12)
    assert "test" in json.loads((folder / "summary.json").read_text())


def test_a_complete_run_continues_if_it_is_made_longer(finished_run, tmp_path):
    """Edits the folder as if the run had been one step shorter, so that no additional steps are needed."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run[0], folder)
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    pretend_length(folder, 11)
    job = (*JOB, "train.decay_start=1", "checkpoint.keep=1")
    result = run_command("trapo_jax.train", f"output_dir={folder}", *job)
    assert result.returncode == 0, result.stderr
    assert f"resuming {folder} after step 12, checkpoint.keep=1 (was 2)" in result.stdout
    assert json.loads((folder / "changes.jsonl").read_text()) == {
        "after_step": 12,
        "changed": {
            "checkpoint.keep": {"was": 2, "is": 1},
            "train.num_steps": {"was": 11, "is": 12},
        },
    }
    assert "num_steps: 12" in config.read_text()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 5, 10, 12]
    after = json.loads((folder / "summary.json").read_text())["test"]["after"]
    assert after == {name: records[-1][name] for name in after}

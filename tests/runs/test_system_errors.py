"""Checks that system failures are reported in one line with a remedy, and that other errors keep their tracebacks."""

import asyncio
import errno
import io
import os
import resource
import sys
from types import SimpleNamespace

import pytest

from support.commands import run_process, run_python
from trapo_jax.runs.command_line import command, exit_code_of
from trapo_jax.runs.system_errors import (
    explain,
    named_in_errors,
    report_in_native_thread,
    report_unraisable,
)
from trapo_jax.types import UserError

TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/run/checkpoints/3.writing/state/_sharding": Failed to write 8368 bytes '
    "to file 4: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(
    ("error", "start", "end"),
    [
        (OSError(errno.ENOSPC, "No space left", "a.json"), "a.json: No space left", "df -i)"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; ", "(ulimit -n)"),
        (OSError(errno.ENOENT, "No such file", "/run"), "/run: No such file", "restore it"),
        (ValueError(TENSORSTORE), "/run/checkpoints/3.writing/state/_sharding: No space", "df -i)"),
        (RuntimeError("can't start new thread"), "no more threads", "ulimit -v)"),
        (BlockingIOError(errno.EAGAIN, "try again", "a process"), "a process: try again", "-v)"),
    ],
)
def test_the_message_for_a_system_failure_names_the_location_and_a_remedy(error, start, end):
    line, code = explain(error)
    assert line.startswith(start)
    assert line.removesuffix(", then run the same command again").endswith(end)
    assert code == 1


def test_the_message_for_a_lack_of_memory_names_fields_that_reduce_memory_use():
    line, _ = explain(MemoryError())
    assert "sampling.num_slots" in line


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x"), KeyError("x")])
def test_other_errors_keep_their_traceback(error):
    assert explain(error) is None


def test_a_path_is_added_to_an_error_without_one(tmp_path):
    with pytest.raises(OSError, match="No space") as error, named_in_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left")
    assert error.value.filename == str(tmp_path)


def test_a_user_error_that_a_full_disk_caused_has_the_exit_code_of_a_failed_run(capsys):
    @command
    def main(arguments):
        del arguments
        try:
            raise OSError(errno.ENOSPC, "No space left")
        except OSError as error:
            raise UserError(f"output_dir=x: {error.strerror}") from error

    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: output_dir=x: No space left; free some disk")


def test_characters_that_a_terminal_cannot_encode_are_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert exit_code_of(lambda: print("│ 5 é")) is None
    assert output.buffer.getvalue() == b"\\u2502 5 \\xe9\n"


def limited(limit, value, *arguments):
    """Runs the train command under a system resource limit and returns its exit code and error lines."""
    code = f"import resource, runpy, sys; resource.setrlimit({limit}, ({value}, {value})); "
    code += f"sys.argv = ['-m', *{arguments!r}]; import trapo_jax; "
    code += "runpy.run_module('trapo_jax.train', run_name='__main__')"
    result = run_python("-c", code)
    return result.returncode, result.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("num_files", [5, 20])
def test_a_low_limit_on_open_files_causes_a_one_line_error(num_files):
    code, (line,) = limited(int(resource.RLIMIT_NOFILE), num_files, "--print-method")
    assert code == 1
    assert line.startswith("error: ")
    assert "Too many open files; raise the limit on open files (ulimit -n)" in line


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="the address space can be limited only on Linux"
)
@pytest.mark.parametrize(("mebibytes", "expected"), [(250, 1), (2500, 2)])
def test_too_little_memory_for_libraries_causes_a_one_line_error(mebibytes, expected):
    code, (line,) = limited(int(resource.RLIMIT_AS), mebibytes * 2**20, "--print-method")
    assert code == expected
    assert line.startswith("error: ")
    assert "ulimit -v" in line


@pytest.mark.parametrize(
    ("name", "value"), [("JAX_ENABLE_X64", "maybe"), ("JAX_DEFAULT_MATMUL_PRECISION", "zz")]
)
def test_an_environment_variable_that_jax_rejects_causes_a_one_line_error(name, value):
    result = run_process("trapo_jax.train", "--print-method", **{name: value})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {name}='{value}': JAX does not accept this value")


def test_standard_output_on_a_full_disk_causes_a_one_line_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    code = "import sys; sys.stdout = open('/dev/full', 'w'); from trapo_jax.__main__ import main; "
    result = run_python("-c", code + "sys.argv = ['trapo']; main()")
    assert result.returncode == 1
    assert result.stderr.startswith("error: standard output: No space left on device; free some")
    assert len(result.stderr.splitlines()) == 1


def test_threads_that_outlive_a_failed_save_print_nothing(capsys):
    closed = asyncio.new_event_loop()
    closed.close()
    for function in (lambda: closed.call_soon_threadsafe(print), lambda: 1 / 0):
        try:
            function()
        except (RuntimeError, ZeroDivisionError) as error:
            report_in_native_thread(type(error), error, None)
    printed = capsys.readouterr().err
    assert "ZeroDivisionError" in printed
    assert "Event loop" not in printed
    closed_loop = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    report_unraisable(closed_loop)
    assert capsys.readouterr().err == ""

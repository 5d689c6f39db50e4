"""A run folder belongs to one process at a time."""

import subprocess
import sys

import pytest

from trapo_jax.run_folder import only_process_in
from trapo_jax.types import UserError

HOLDER = """
import sys, time
from pathlib import Path
from trapo_jax.run_folder import only_process_in
with only_process_in(Path(sys.argv[1])):
    print("at work", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "at work\n"
    with (
        pytest.raises(UserError, match="another process is training there"),
        only_process_in(tmp_path),
    ):
        raise AssertionError("two processes in one folder")
    holder.kill()
    holder.wait()
    for _ in range(
        2
    ):  # and again in the same process, though something still holds on to the error
        with pytest.raises(KeyError) as error, only_process_in(tmp_path):
            raise KeyError
        assert error.tb

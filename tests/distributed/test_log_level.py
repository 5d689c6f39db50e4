"""Tests that native code logs nothing when nothing is wrong."""

import importlib.util
import os
import subprocess
import sys

import pytest

from trapo_jax.distributed.log_level import LIBTPU_ENVIRONMENT

START = "import trapo_jax.runs.command_line, jax; jax.devices()"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_command_on_a_machine_without_a_tpu_starts_silently():
    """This must hold even if other processes use libtpu at the same time."""
    environment = {k: v for k, v in os.environ.items() if k not in LIBTPU_ENVIRONMENT}
    result = subprocess.run(
        [sys.executable, "-c", START], env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

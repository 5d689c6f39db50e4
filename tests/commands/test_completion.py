"""Tests the script that completes command lines in the shell."""

import shutil
import subprocess

import pytest

from trapo_jax.completion import main

COMPLETE = """
source {script}
compopt() {{ :; }}  # only available while the shell completes a line
COMP_WORDS=({words}) COMP_CWORD={last} COMPREPLY=()
_trapo
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="requires bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trapo pre", "preview"),
        ("trapo train sampling.n", "sampling.num_slots= sampling.num_contexts="),
        ("trapo evaluate train.", ""),
        ("trapo evaluate evaluation.temp", "evaluation.temperature="),
        ("trapo train --config own", "own_data"),
        ("trapo train model.path =", ""),  # The shell completes the name of a file.
        ("trapo train model.path = own", ""),
        ("trapo report mod", ""),
    ],
)
def test_words_are_completed(line, expected, tmp_path, capsys):
    assert main([]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    words = line.split()
    code = COMPLETE.format(script=script, words=" ".join(words), last=len(words) - 1)
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == (expected, "")

"""A short run of the default job, for tests that stop, damage, resume or repeat it."""

import shutil

JOB = (
    "train.num_steps=12",
    "train.warmup_steps=2",
    "checkpoint.every=3",
    "checkpoint.keep_best=1",
    "evaluation.every=5",
    "evaluation.num_samples=2",
    "data.num_validation=16",
    "data.num_test=24",
)


def checkpoint_steps(folder):
    """Steps of the complete checkpoints of a run, ascending."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def copy_unfinished(run, folder):
    """Copies a finished run as it was before its last checkpoint; returns the step it resumes after."""
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "checkpoints" / "12")
    return checkpoint_steps(folder)[-1]

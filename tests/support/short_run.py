"""Defines a short version of the default job, for tests that stop, damage, resume or repeat runs."""

import shutil

JOB = (
    "train.num_steps=12",
    "train.problems_per_step=4",
    "train.warmup_steps=2",
    "checkpoint.every=3",
    "checkpoint.keep_best=1",
    "evaluation.every=5",
    "evaluation.num_samples=2",
    "data.num_validation=16",
    "data.num_test=24",
)


# The shortest run that trains, evaluates, saves and exports. It compiles the same programs as `JOB`.
TINY_JOB = (
    "data.source=card_shuffles",
    "train.num_steps=2",
    "train.problems_per_step=4",
    "train.warmup_steps=0",
    "checkpoint.every=1",
    "evaluation.every=0",
    "evaluation.num_samples=1",
    "data.num_train=16",
    "data.num_validation=4",
    "data.num_test=4",
)


def checkpoint_steps(folder):
    """Returns the steps of the complete checkpoints of a run, in ascending order."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def copy_unfinished(run, folder):
    """Copies a finished run without its last checkpoint, its export and its summary.

    Returns:
      The step after which the copy resumes.
    """
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "checkpoints" / "12")
    return checkpoint_steps(folder)[-1]

"""Mounts small in-memory file systems, which fill up quickly. Mounting requires root."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def can_mount(folder: Path) -> bool:
    """Returns whether this process can mount small disks."""
    try:
        with small_disk(folder / "probe"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(folder: Path, options: str = "size=48m") -> Iterator[Path]:
    """Mounts an in-memory file system at a folder, and unmounts it on exit."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        raise FileNotFoundError("mount")
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

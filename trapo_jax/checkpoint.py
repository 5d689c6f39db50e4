"""Checkpoints: device state and host state in one atomic commit.

`<directory>/<step>/` appears by a rename once it is complete; what a killed save left behind is ignored and
cleaned up by the next one.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

STATE, HOST = "state", "host"


class CheckpointStore:
    """The checkpoints of a run.

    Args:
      directory: created on the first save.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, *, keep: int):
        self._directory = directory.absolute()
        self._keep = keep
        # A dict of plain values would be saved as a pytree of arrays: the host's name takes JSON.
        self._registry = ocp.handlers.local_registry()
        self._registry.add(ocp.handlers.JsonHandler, checkpointable_name=HOST)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; each is complete, as it got its name by a rename."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    def save(self, step: int, state: Any, host: dict[str, Any]) -> None:
        """Commits both, then removes leftovers and all but the newest `keep` checkpoints."""
        with self._context():
            ocp.save_checkpointables(
                str(self._directory / str(step)), {STATE: state, HOST: host}, overwrite=True
            )
        for expired in self.steps()[: -self._keep]:
            # Renamed first: a deletion cut short must not leave half a checkpoint under its number.
            path = self._directory / str(expired)
            path.rename(path.with_suffix(".expired"))
        for path in self._directory.iterdir():
            if not path.name.isdecimal():
                shutil.rmtree(path)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The state, placed as the shardings of `abstract_state` say, and the host's dict."""
        with self._context():
            loaded = ocp.load_checkpointables(
                str(self._directory / str(step)), {STATE: abstract_state, HOST: None}
            )
        return loaded[STATE], loaded[HOST]

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, placed as the shardings of `abstract_params` say."""
        context = self._context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(
                str(self._directory / str(step)), {STATE: {"params": abstract_params}}
            )
        return loaded[STATE]["params"]

    def _context(self) -> ocp.Context:
        context = ocp.Context()
        context.checkpointables.registry = self._registry
        return context


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of `tree` (arrays or shapes), for `CheckpointStore.restore`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )

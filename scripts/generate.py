"""Continue text with an H-Net, byte by byte, its chunks coloured by stage.

    python scripts/generate.py RUN --prompt "The quick brown"
        one text, from a run of train.py
    python scripts/generate.py model.pt --prompt-file story.txt
        from a file; `-` is standard input
    python scripts/generate.py hf:cartesia-ai/hnet_1stage_L
        one prompt per line, until Ctrl-D; on a terminal with line editing and history

On a terminal the chunks have colours. With fewer than 256 colours, or with NO_COLOR set, there are bars instead. In a
pipe or a file the output is the plain text, or with --show chunks the text with bars. The speed is on standard error.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import BOM, importing, parse, run, warn_of_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from hnet_decoder import Decoder
    from hnet_simple import Sampling


@dataclass
class Options:
    """Continue text with an H-Net. Without --prompt or --prompt-file: one prompt per line of standard input."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
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
    """Allow bytes that are not UTF-8."""
    past_eos: bool = False
    """Continue after the model has ended its text."""
    show: Literal["auto", "chunks", "text"] = "auto"
    """What to print; auto: chunks on a terminal, the text elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision; auto: bfloat16 on CUDA, float32 on the CPU."""
    compile: bool = False
    """On a CPU, compile the steps to C++ first, in 10 to 40 seconds. A byte then takes less than half the time."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    if options.prompt is not None and options.prompt_file is not None:
        raise UserError("--prompt-file: given with --prompt; give one of them")
    if options.samples < 1:
        raise UserError(f"--samples: {options.samples}; expected 1 or more")
    for name, most in (("max_bytes", 2**24), ("samples", 4096), ("top_k", 256)):
        if (value := getattr(options, name)) > most:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at most {most}")
    if not -(2**63) <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: expected less than 2**63")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    prompt = read_prompt(options)
    with importing():
        import torch
        from rich.console import Console

        from hnet_decoder import Decoder
        from hnet_kernels.capture import why_no_compiler
        from hnet_runtime.checks import agreement
        from hnet_runtime.pages.chunks import has_colours, legend
        from hnet_runtime.runs.weights import load_inference
        from hnet_runtime.steps import compile_ahead
        from hnet_simple import GenerationError, Sampling, why_no_generation

    compiler = compile_ahead.prepare(options.device)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    if options.compile and device == "cuda":
        raise UserError("--compile: it is for a CPU, as a GPU runs steps as CUDA graphs; expected --device cpu")
    if options.compile and (reason := why_no_compiler()):
        raise UserError(f"--compile: torch.compile needs a C++ compiler, such as g++, and has none here ({reason})")
    sampling = as_flags(lambda: Sampling(options.temperature, options.top_k, options.top_p, options.min_p))
    dtype = ("bfloat16" if device == "cuda" else "float32") if options.dtype == "auto" else options.dtype
    if dtype == "bfloat16":  # as in training; it concerns residual_proj alone
        torch.set_float32_matmul_precision("high")
    model = load_inference(options.checkpoint, options.config or None, device, getattr(torch, dtype))
    work = compile_ahead.Work(model.config, getattr(torch, dtype), texts=options.samples)
    compile_ahead.begin(compiler, work, torch.device(device))
    agreement.choose_implementations(torch.device(device), getattr(torch, dtype), model.config)
    if reason := why_no_generation(model.config):
        raise UserError(f"{options.checkpoint}: {reason}")
    if difference := agreement.generation(model.config):
        raise UserError(difference)
    console = Console(highlight=False)
    if shows_chunks(options, console) and console.is_terminal:
        console.print(legend(model.config.num_stages, has_colours(console)), style="dim")
    decoder = Decoder(model, options.samples, compiles=options.compile)
    if prompt is not None:
        try:
            answer(decoder, prompt, sampling, options, console)
        except GenerationError as error:
            raise UserError(f"--samples {options.samples}: {error}") from None
        return
    for line in lines():
        try:
            answer(decoder, line, sampling, options, console)
        except (KeyboardInterrupt, UserError, GenerationError) as error:
            print(f"\nerror: {error}" if str(error) else "", file=sys.stderr)


def read_prompt(options: Options) -> bytes | None:
    """The bytes to continue; None where prompts come a line each."""
    if options.prompt is not None:
        return os.fsencode(options.prompt)  # what the shell gave, though it be no UTF-8
    if options.prompt_file is None:
        return None
    name = "standard input" if options.prompt_file == "-" else options.prompt_file
    try:
        data = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
    except OSError as error:
        raise UserError(f"--prompt-file {name}: can't be read ({error.strerror})") from None
    warn_of_bytes(name, data)
    return data


def lines() -> Iterator[bytes]:
    """Prompts from standard input, a line each, without its end (of Unix or Windows) or a byte order mark."""
    ask = asks()
    first = True
    while True:
        try:
            line = ask()
        except KeyboardInterrupt:
            line = b""
        if not line:
            print(file=sys.stderr) if sys.stdin.isatty() else None
            return
        if first:
            line, first = line.removeprefix(BOM), False
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def asks():
    """A function that returns the next line of standard input with its end, nothing at the end of it.

    Where a person types it, there are a prompt and, where Python has the module readline, editing and history.
    """
    asking = sys.stdin.isatty()
    if asking and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() uses it once it is imported)

            sys.stdin.reconfigure(errors="surrogateescape")

            def edited() -> bytes:
                try:
                    return input("prompt> ").encode("utf-8", "surrogateescape") + b"\n"
                except EOFError:
                    return b""

            return edited

    def plain() -> bytes:
        if asking:
            print("prompt> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.buffer.readline()

    return plain


def shows_chunks(options: Options, console: "Console") -> bool:
    return options.show == "chunks" or (options.show == "auto" and console.is_terminal)


def answer(decoder: "Decoder", prompt: bytes, sampling: "Sampling", options: Options, console: "Console") -> None:
    """Print the prompt with its continuation (or --samples of them), and to stderr how long that took."""
    from hnet_decoder import generate, stream
    from hnet_runtime.pages.chunks import Printer, print_chunks

    settings = {"max_bytes": options.max_bytes, "sampling": sampling, "seed": options.seed}
    settings |= {"valid_utf8": not options.any_bytes, "stop_at_eos": not options.past_eos, "decoder": decoder}
    with_chunks, compiled_s = shows_chunks(options, console), decoder.captured.seconds
    decoder.first_step = None
    if options.samples > 1:
        texts = as_flags(lambda: generate(decoder.model, [prompt] * options.samples, **settings))
        seconds = decoder.clock() - decoder.first_step
        for n, made in enumerate(texts):
            print(f"--- seed {options.seed + n}", flush=True)
            if with_chunks:
                print_chunks(made.data, made.starts, console)
            else:
                write(made.data + b"\n")
        if options.compile:
            tell_compilation(decoder, compiled_s)
        tell_speed(sum(len(made.continuation) for made in texts), seconds)
        return
    printer, emitted_bytes = Printer(console), 0
    for emitted in as_flags(lambda: stream(decoder.model, [prompt], echo=True, **settings)):
        emitted_bytes += 1
        printer.feed(emitted.byte, emitted.starts) if with_chunks else write(bytes([emitted.byte]))
    seconds = decoder.clock() - decoder.first_step
    printer.close() if with_chunks else write(b"\n")
    if options.compile:
        tell_compilation(decoder, compiled_s)
    tell_speed(emitted_bytes - len(prompt), seconds)


def tell_compilation(decoder: "Decoder", before: float) -> None:
    """How many seconds compiling took, beside the `before` that it had taken already; or why it failed."""
    seconds = decoder.captured.seconds - before
    if failure := decoder.captured.failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        warnings.warn(f"--compile: the steps run uncompiled, because compiling them failed: {reason}", stacklevel=2)
    elif seconds >= 0.1:
        print(f"steps compiled in {seconds:.1f} s", file=sys.stderr)


def tell_speed(size: int, seconds: float) -> None:
    """The speed of `size` bytes in the `seconds` since their first step: without reading the prompt or compiling."""
    size_in_words = f"{size:,} byte{'s' * (size != 1)}"
    print(f"{size_in_words} in {seconds:.2f} s, {size / max(seconds, 1e-9):,.0f} bytes/s", file=sys.stderr)


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
    run(main, smaller="--samples or --max-bytes")

"""Bytes per second of generation, and how far that is from what memory allows.

    python benchmarks/bench_decode.py --config configs/hnet_1stage_L.json --rows 1 --rates 0.2
    python benchmarks/bench_decode.py --config configs/hnet_2stage_XL.json --rows 64 --rates 0.33,0.33 --plain

Boundaries are forced: bits are drawn beforehand, with a seed, for each row, stage and token of the stage; the router
runs, and its decision is replaced on the device. `--rates learned` keeps the router's own. Weights are random unless
--checkpoint is given, no text ends early, and the time is that of the steps: prefill and capture are reported apart.
Without a GPU the same is timed on the CPU, with --compile after its steps have been compiled to C++.

Prints one JSON object (and writes it with --out): bytes/s and ms a byte; the same with no inner step and with an inner
step for every byte; the share of the floor, which is the bytes that a step must move (weights of the stages that are
entered, states of Mamba-2 read and written, keys and values read) over the memory's speed; nodes of the graphs; memory.
"""

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from ledger import append

from hnet_decoder import Decoder
from hnet_kernels.capture import CapturedFunctions, why_no_compiler
from hnet_kernels.dispatch import forcing
from hnet_runtime import UserError
from hnet_runtime.commands import parse, run
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs import weights
from hnet_simple import HNetInference, Noise, Sampling
from hnet_trainable import BOS, HNetConfig

GB_PER_S = {"NVIDIA H200": 4300}  # measured with a copy, bytes read and written


@dataclass
class Benchmark:
    """What to time."""

    config: str = "configs/hnet_1stage_small.json"
    """Model config."""
    checkpoint: str = ""
    """Weights as scripts/generate.py takes them; empty: random ones."""
    rows: int = 1
    """Texts at once."""
    rates: str = "0.2"
    """How often a chunk begins, stage by stage, or learned."""
    prompt_bytes: int = 256
    """Length of each prompt."""
    mixed: bool = False
    """Prompts of lengths from an eighth of --prompt-bytes to all of it."""
    max_bytes: int = 512
    """Bytes written to each text."""
    prefill: int = 0
    """Time so many prefills as well, and the training model's forward of the same prompts, without gradients."""
    plain: int = 0
    """Time so many plain steps as well: prefill and step, without graphs."""
    definitions: bool = False
    """The plain steps run the definitions of hnet_kernels, without its kernels."""
    parts: bool = True
    """Time steps that never, and always, enter the inner stages as well."""
    compile: bool = False
    """On a CPU, compile the steps to C++ first."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32 or bfloat16."""
    out: str = ""
    """File for the result."""
    ledger: str = ""
    """Record of measurements to add the result to: benchmarks/ledger.jsonl."""


def build(args: Benchmark) -> HNetInference:
    on_gpu = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if args.compile and (on_gpu or why_no_compiler()):
        raise UserError("--compile: expected --device cpu and a C++ compiler")
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, ("bfloat16" if on_gpu else "float32") if args.dtype == "auto" else args.dtype)
    if args.checkpoint:
        return weights.load_inference(args.checkpoint, None, device, dtype)
    config = HNetConfig.load(args.config)
    with torch.device("meta"):
        model = HNetInference(config)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if leaf == "D" or "norm" in module:
                parameter.fill_(1.0)
            elif leaf == "A_log":
                parameter.uniform_(0, 2.7, generator=generator)
            elif leaf == "dt_bias":
                parameter.uniform_(-6.9, -2.3, generator=generator)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    model.load_state_dict(weights.cast(model.state_dict(), dtype), assign=True)
    return model


def force_boundaries(model: HNetInference, rows: int, tokens: int, rates: list[float]) -> None:
    """Tokens open chunks where bits say so that are drawn here, whatever the routers compute."""
    device = model.embeddings.weight.device
    for s, (stage, rate) in enumerate(zip(model.stages, rates)):
        generator = torch.Generator(device).manual_seed(s)
        bits_BM = torch.rand(rows, tokens, generator=generator, device=device) < rate
        bits_BM[:, 0] = True

        def opens(p_BL, bits_BM=bits_BM, s=s):
            if p_BL.shape[1] > 1:  # a prefill, from the beginning
                return bits_BM[: len(p_BL), : p_BL.shape[1]]
            return bits_BM.gather(1, model.forced_positions[s][:, None].clamp_max(tokens - 1))

        stage.routing_module.opens = opens


def floor_bytes(model: HNetInference, rows: int, rates: list[float], tokens: list[float]) -> float:
    """What a step of all rows moves at least: see above. tokens: mean of each stage's tokens while it runs."""
    from hnet_kernels.generation import KVState, MambaState

    total, reach = 0.0, 1.0
    for s, stage in enumerate(model.stages):
        if s:
            reach *= rates[s - 1]
        entered = 1 - (1 - reach) ** rows  # the chance that some row enters, which reads the weights
        own = (
            [stage]
            if stage.is_innermost
            else [module for name, module in stage.named_children() if name != "main_network"]
        )
        total += entered * sum(p.nbytes for module in own for p in module.parameters())
        for stack in (m for m in stage.children() if hasattr(m, "layers")):
            for layer in stack.layers:
                state = layer.mixer.new_state(1)
                if isinstance(state, MambaState):
                    total += rows * reach * 2 * (state.conv_BWC.nbytes + state.ssm_BHPN.nbytes)
                elif isinstance(state, KVState):
                    seen = tokens[s] if state.window < 0 else min(tokens[s], state.window + 1)
                    width = layer.mixer.out_proj.in_features
                    total += rows * reach * 2 * seen * width * state.k_BWHP.dtype.itemsize
    return total + sum(p.nbytes for p in (model.embeddings.weight[:rows], model.lm_head.weight))


def graph_nodes(decoder: Decoder) -> dict[str, int]:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return {}
    counts = {}
    for name, graph in decoder.captured.graphs.items():
        _, _, n = runtime.cudaGraphGetNodes(graph.raw_cuda_graph(), 0)
        counts["_".join(map(str, name))] = int(n)
    return counts


def synchronize(model: HNetInference) -> None:
    if model.embeddings.weight.is_cuda:
        torch.cuda.synchronize()


def prompts(args: Benchmark) -> list[bytes]:
    generator, n = torch.Generator().manual_seed(0), args.prompt_bytes
    lengths = [n - n * 7 * row // (8 * args.rows) if args.mixed else n for row in range(args.rows)]
    return [bytes(torch.randint(97, 123, (length,), generator=generator).tolist()) for length in lengths]


def decode(model: HNetInference, args: Benchmark) -> dict:
    """One run of the decoder: every row writes its bytes."""
    decoder = Decoder(model, args.rows, compiles=args.compile)
    model.forced_positions = [state.position_B for _, state in decoder.stages]
    for n, prompt in enumerate(prompts(args)):
        decoder.add(prompt, seed=n, max_bytes=args.max_bytes, stop_at_eos=False)
    synchronize(model)
    began = time.perf_counter()
    first = len(decoder.drain())
    synchronize(model)
    first_s, began, seconds = time.perf_counter() - began, time.perf_counter(), decoder.captured.seconds
    written, starts = 0, torch.zeros(decoder.S)
    while decoder.busy:
        events = decoder.drain()
        written += len(events)
        starts += torch.tensor([event.starts for event in events], dtype=torch.float).sum(0)
    synchronize(model)
    elapsed = time.perf_counter() - began
    captured = decoder.captured.seconds - seconds  # again, as rings have grown
    assert first + written == args.rows * args.max_bytes, (first, written)
    return {
        "bytes_per_s": written / (elapsed - captured),
        "ms_per_step": 1000 * (elapsed - captured) / (written / args.rows),
        "first_drain_s": first_s,
        "capture_s": decoder.captured.seconds,
        "captured": decoder.captured.captured,
        "failure": str(decoder.captured.failure or ""),
        "rates": [round(n / max(total, 1), 4) for n, total in zip(starts.tolist(), [written, *starts.tolist()])],
        "cache_mb": decoder.cache.cache_bytes() / 1e6,
        "nodes": graph_nodes(decoder),
        "tokens": [max(state.tokens) for _, state in decoder.stages],
    }


def plain_steps(model: HNetInference, args: Benchmark) -> dict:
    """Prefill and step, with the draw between them, as before there was a decoder."""
    with forcing(False) if args.definitions else contextlib.nullcontext():
        began = time.perf_counter()
        first = model.prefill([bytes([BOS]) + prompt for prompt in prompts(args)])
        model.forced_positions = [state.position_B for state in first.cache.stages]
        logits_BV, noise, sampling = first.last_logits(), Noise(range(args.rows), first.logits_BLV.device), Sampling()
        synchronize(model)
        prefill_s = time.perf_counter() - began
        for n in range(args.plain + 3):
            if n == 3:
                synchronize(model)
                began = time.perf_counter()
            logits_BV = model.step(sampling.draw(logits_BV, noise.next()), first.cache).logits_BV
        synchronize(model)
    per_step = (time.perf_counter() - began) / args.plain
    return {"plain_bytes_per_s": args.rows / per_step, "plain_ms_per_step": 1000 * per_step, "prefill_s": prefill_s}


def timed(call: Callable[[], object], times: int) -> tuple[float, float]:
    """Medians in milliseconds, after three calls: by the clock, and from first to last kernel on a GPU."""
    clock, gpu = [], []
    for _ in range(times + 3):
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
        began = time.perf_counter()
        for end in ends[:1]:
            end.record()
        call()
        for end in ends[1:]:
            end.record()
            end.synchronize()
        clock.append(1000 * (time.perf_counter() - began))
        gpu.append(ends[0].elapsed_time(ends[1]) if ends else clock[-1])
    return statistics.median(clock[3:]), statistics.median(gpu[3:])


@torch.no_grad()
def prefills(model: HNetInference, args: Benchmark) -> dict:
    """A decoder's prefill of all prompts, and the training model's forward of them, by the learned boundaries."""
    rows = [bytes([BOS]) + prompt for prompt in prompts(args)]
    documents = torch.nested.nested_tensor([torch.tensor(list(row)) for row in rows], layout=torch.jagged)
    documents = documents.to(model.embeddings.weight.device)
    decoder = Decoder(model, args.rows)
    ours, training = (timed(call, args.prefill) for call in (lambda: decoder.prefill(rows), lambda: model(documents)))
    result = {"prefill_ms": ours[0], "prefill_gpu_ms": ours[1]}
    return result | {"training_forward_ms": training[0], "training_forward_gpu_ms": training[1]}


def main(args: Benchmark) -> dict:
    model, CapturedFunctions.keeps = build(args), True
    S, forced = model.config.num_stages, args.rates != "learned"
    rates = [float(rate) for rate in args.rates.split(",")] if forced else []
    if forced and len(rates) != S:
        raise UserError(f"--rates: {len(rates)} rates for {S} stages; expected one for each")
    tokens = 1 + args.prompt_bytes + args.max_bytes
    timings = prefills(model, args) if args.prefill else {}
    if forced:
        force_boundaries(model, args.rows, tokens, rates)
    device = torch.cuda.get_device_name() if model.embeddings.weight.is_cuda else platform.processor() or "CPU"
    result = {**vars(args), "device": device, "torch": torch.__version__}
    result |= timings
    del result["out"], result["ledger"]
    decode(model, args)  # compiles kernels
    result |= decode(model, args)
    rates = rates if forced else result["rates"]
    if device in GB_PER_S:
        counts, count = [], float(tokens)
        for rate in [1.0, *rates]:
            count *= rate
            counts.append(count * (1 - args.max_bytes / tokens / 2))  # in the middle of the run
        moved = floor_bytes(model, args.rows, rates, counts)
        floor_s = moved / GB_PER_S[device] / 1e9
        result |= {"moved_mb": moved / 1e6, "floor_bytes_per_s": args.rows / floor_s}
        result["share_of_floor"] = result["bytes_per_s"] / result["floor_bytes_per_s"]
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    result["weights_mb"] = sum(p.nbytes for p in model.parameters()) / 1e6
    if args.plain:
        plain_steps(model, args)
        result |= plain_steps(model, args)
    if args.parts and forced:
        for name, rate in (("without_inner", 0.0), ("with_inner", 1.0)):
            force_boundaries(model, args.rows, tokens, [rate] * S)
            for _ in range(1 + args.compile):  # the first run compiles the steps for longer caches
                result[f"ms_per_step_{name}"] = decode(model, args)["ms_per_step"]
    print(json.dumps(result))
    if args.out:
        write_atomically(Path(args.out), lambda scratch: scratch.write_text(json.dumps(result) + "\n"))
    if args.ledger:
        record_in(args.ledger, result)
    return result


def record_in(file: str, result: dict) -> None:
    """Add a result to the record of measurements."""
    config, rows = Path(result["checkpoint"] or result["config"]).stem, result["rows"]
    compile_ = "graph" if result["nodes"] else "compiled" if result["compile"] else "uncaptured"
    numbers = {
        "batch_count": rows, "chunks_percent": [100 * rate for rate in result["rates"]],
        "decoded_bytes_per_s": result["bytes_per_s"], "step_ms": result["ms_per_step"],
        "step_without_inner_ms": result.get("ms_per_step_without_inner"),
        "step_with_inner_ms": result.get("ms_per_step_with_inner"),
        "floor_bytes_per_s": result.get("floor_bytes_per_s"),
        "floor_percent": 100 * result["share_of_floor"] if "share_of_floor" in result else None,
        "first_byte_ms": 1000 * result["first_drain_s"], "capture_ms": 1000 * result["capture_s"],
        "nodes_count": sum(result["nodes"].values()), "cache_gib": result["cache_mb"] * 1e6 / 2**30,
        "weights_gib": result["weights_mb"] * 1e6 / 2**30, "allocated_gib": result.get("peak_gib"),
        "prefill_ms": result.get("prefill_ms"), "prefill_gpu_ms": result.get("prefill_gpu_ms"),
        "training_forward_gpu_ms": result.get("training_forward_gpu_ms"),
    }  # fmt: skip
    what = ("weights of a checkpoint" if result["checkpoint"] else "random weights") + ", Decoder"
    append(file, f"decode/{config}/{compile_}/batch-{rows}", numbers, what=what, config=config, compile=compile_)


if __name__ == "__main__":

    def program(argv: list[str]) -> None:
        main(parse(Benchmark, argv, __doc__))

    run(program)

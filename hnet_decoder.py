"""Continuing texts with an H-Net: many in one batch, and on a GPU as CUDA graphs.

`generate` and `stream` are what most callers need. Both are written on `Decoder`, which repeats the steps of
hnet_simple.py: it draws a byte for each row of a batch, reads it, and replaces texts that have ended by others. On a
GPU the parts of a step are captured as CUDA graphs, which need no host: rows draw, stop and record what they did on the
device, and the host looks at the record every few steps.

Shape legend, as suffixes of names: B rows of the batch, E steps between two looks, D width, V vocabulary, S number of
chunking stages, X values of an event.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hnet_kernels.capture import CapturedFunctions, CompiledFunctions
from hnet_kernels.dispatch import one_after_the_other, one_thread
from hnet_kernels.generation import take
from hnet_kernels.sampling import (
    ANY_BYTES,
    UTF8_MISSING,
    Events,
    SamplingRows,
    draw_rows,
    note_starts,
    record,
    utf8_state,
)
from hnet_simple import (
    TRAINED_LENGTH,
    Cache,
    GenerationError,
    HNetInference,
    Noise,
    Reading,
    Sampling,
    Token,
    at_least_float32,
    chunk_starts,
    enter_prefill,
    enter_step,
    inner_prefill,
    inner_step,
    leave_prefill,
    leave_step,
    smooth_step,
)
from hnet_trainable import BOS, EOS

logger = logging.getLogger("hnet")
GRAPH_TOLERANCE = 1e-3  # of logits: the same kernels compute both, on the same inputs
CHECKED_STEPS = 16  # enough to enter the inner stages: at one chunk in five bytes, 97 of 100 checks do


# ------------------------------------------------------------------------------------------------------------- prefill


def relative_gap(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where something is not a number."""
    gap = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
    return gap.nan_to_num(nan=math.inf).item()


def padded_size(n: int) -> int:
    """The least size that is n or more: multiples of 16 up to 128, then eight sizes between two powers of two."""
    step = max(16, (1 << (n - 1).bit_length()) // 16)
    return -(-n // step) * step


class PaddedPrefill:
    """`HNetInference.prefill` of at most B prompts of at most L bytes, of which each part that comes again is a graph.

    Prompts, caches and what passes between parts have fixed places. After each stage the host looks how many chunks
    there are, and goes on with the parts for that size; `sizes` are those of the stages so far.
    """

    def __init__(self, model: HNetInference, B: int, L: int, captures: bool):
        self.model, self.device = model, next(model.parameters()).device
        self.cache = model.new_cache(B, L)
        self.stages, self.S = list(zip(model.stages, self.cache.stages)), model.config.num_stages
        self.byte_BL = torch.zeros(B, L, dtype=torch.int64, device=self.device)
        self.tokens_SB = torch.zeros(self.S + 1, B, dtype=torch.int64, device=self.device)  # of each stage
        host = "meta" if self.device.type == "meta" else "cpu"
        self.host_SB = torch.zeros_like(self.tokens_SB, device=host, pin_memory=self.device.type == "cuda")
        self.readings: dict[tuple[int, ...], Reading] = {}
        self.outputs: dict[tuple[int, ...], Tensor] = {}  # by sizes and stage; of stage 0: the logits
        self.captured = CapturedFunctions(self.device, captures)

    @torch.no_grad()
    def read(self, prompts: Sequence[bytes]) -> tuple[Tensor, list[list[int]], list[Reading]]:
        """The next byte's logits (B, V), the tokens of each prompt at each stage, and what each stage read."""
        B, L = self.byte_BL.shape
        given_BL = torch.zeros(B, L, dtype=torch.int64)
        self.host_SB.zero_()
        for b, prompt in enumerate(prompts):
            given_BL[b, : len(prompt)] = torch.frombuffer(bytearray(prompt), dtype=torch.uint8)
            self.host_SB[0, b] = len(prompt)
        self.byte_BL.copy_(given_BL)
        self.tokens_SB.copy_(self.host_SB)
        before = self.captured.captured
        found = self._run(L)
        if self.captured.captured > before and self.captured.captures:  # what is used is checked first
            left, made = [t.clone() for t in self._results(found[0])], (dict(self.readings), dict(self.outputs))
            self.captured.captures = False
            with one_after_the_other():
                found = self._run(L)
            gap = max(map(relative_gap, left, self._results(found[0])))
            if gap <= GRAPH_TOLERANCE:
                self.captured.captures, (self.readings, self.outputs) = True, made
            else:
                self.captured.give_up(RuntimeError(f"graphs of a prefill are off by {gap:.1e}"))
                logger.warning("prompts are read without graphs: %s", self.captured.failure)
        logits_BV, readings = found
        return logits_BV[: len(prompts)], self.host_SB[:, : len(prompts)].tolist(), readings

    @torch.no_grad()
    def foresee(self) -> None:
        """Runs all parts on the meta device, which computes nothing. For `compile_ahead`, which notes the kernels."""
        sizes = self.byte_BL.shape[1:] * (self.S + 1)
        for s in range(self.S):
            self._enter(s, sizes[: s + 1])
        self._inner(sizes)
        for s in reversed(range(self.S)):
            self._leave(s, sizes)

    def _results(self, logits_BV: Tensor) -> list[Tensor]:
        """All that steps go on from."""
        return [logits_BV, *(t for _, state in self.stages for t in state.tensors())]

    def _run(self, L: int) -> tuple[Tensor, list[Reading]]:
        sizes, run = (L,), self.captured.run
        for s in range(self.S):
            run(("enter", sizes), functools.partial(self._enter, s, sizes))
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the wait for a stage
            if not (most := int(self.host_SB[s + 1].max())):
                break
            sizes = *sizes, min(padded_size(most), sizes[-1])
        if len(sizes) > self.S:
            run(("inner", sizes), functools.partial(self._inner, sizes))
        entered = min(len(sizes), self.S)
        for s in reversed(range(entered)):
            run(("leave", s, sizes), functools.partial(self._leave, s, sizes))
        return self.outputs[*sizes, 0], [self.readings[sizes[: s + 1]] for s in range(entered)]

    def _take_in(self, s: int, sizes: tuple[int, ...]) -> Tensor:
        """What stage s gets."""
        if s:
            return self.readings[sizes[:-1]].chunks(sizes[-1])
        for _, state in self.stages:
            state.reset()
        return self.model.embed(self.byte_BL.flatten())

    def _enter(self, s: int, sizes: tuple[int, ...]) -> None:
        inputs = self._take_in(s, sizes), self.tokens_SB[s], self.byte_BL
        self.readings[sizes] = reading = enter_prefill(*self.stages[s], *inputs)
        torch.sum(reading.b_BL, 1, out=self.tokens_SB[s + 1])
        self.host_SB[s + 1].copy_(self.tokens_SB[s + 1], non_blocking=True)

    def _inner(self, sizes: tuple[int, ...]) -> None:
        S = self.S
        self._go_out(S, sizes, inner_prefill(*self.stages[S], self._take_in(S, sizes), self.tokens_SB[S]))

    def _leave(self, s: int, sizes: tuple[int, ...]) -> None:
        y_TD = self.outputs.get((*sizes, s + 1))
        self._go_out(s, sizes, leave_prefill(self.stages[s][0], self.readings[sizes[: s + 1]], y_TD))

    def _go_out(self, s: int, sizes: tuple[int, ...], y_TD: Tensor) -> None:
        if not s:
            last_B1 = (self.tokens_SB[0] - 1).clamp_min(0)[:, None]
            y_TD = self.model.head(take(y_TD.unflatten(0, self.byte_BL.shape), last_B1)[:, 0])
        self.outputs[*sizes, s] = y_TD


# ------------------------------------------------------------------------------------------------------------- Decoder


class Event(NamedTuple):
    """One byte of a text, and what the model thought of it."""

    text: int  # what `Decoder.add` returned
    byte: int | None  # None: the model has ended the text, with EOS
    starts: tuple[bool, ...]  # does the byte open a chunk of stage 0, 1, ...
    probabilities: tuple[float, ...]  # p of each chunking stage; zero in a stage that the byte did not reach
    log_probability: float  # of the byte among all 256, in nats, before temperature and filters
    is_last: bool  # no event of this text follows


@dataclasses.dataclass
class Text:
    """What the host knows of a text that is being continued."""

    number: int
    prompt: bytes  # BOS and the prompt
    sampling: Sampling
    left: int  # bytes that it may still get
    utf8: int
    stop_at_eos: bool
    echo: bool
    generator: torch.Generator
    drawn: int = 0  # random numbers used
    filled: int = 0  # random numbers on the device


class Running(NamedTuple):
    """Steps that have been started."""

    steps: int
    texts: list[Text | None]  # of each row
    end: torch.cuda.Event | None


class Decoder:
    """Continues many texts at once. Each has a row of a batch, which the next text takes when it has ended.

        decoder = Decoder(model, rows=64)
        for prompt in prompts:
            decoder.add(prompt, seed=1, max_bytes=500)
        while decoder.busy:
            for event in decoder.drain():
                ...

    `add` and `cancel` can be called at any time: between two drains texts enter and leave without touching the others.
    A text's bytes depend on its prompt, its options and its seed, but for rounding not on what runs beside it.

    On a GPU the parts of a step are CUDA graphs, captured at the first drain and again where a buffer or a weight has
    moved. With few rows the host looks after each stage whether a chunk begins, and leaves out the stages inside where
    none does. With more rows, where nearly always one does, whole steps run without the host. On other devices the same
    functions are called, and the host always looks. `captures` and `host_decides` choose otherwise. A mixer whose step
    cannot be captured runs uncaptured; `captured.failure` says why.

    `compiles`: on a CPU, torch.compile makes C++ of the parts of a step at the first drain, for 10 to 30 seconds.
    """

    runs_ahead = True  # False: between drains nothing runs
    STEPS, SECONDS = 16, 0.02  # a drain returns after so many steps, or that time
    FEW_ROWS = 4
    PREFILL_BYTES = 1 << 17  # of prompts that are read together, padding included
    GRAPH_BYTES = 1 << 14  # the same, where the parts of a prefill are graphs; more keep a GPU busy without
    NUMBERS = 2 * Noise.BLOCK  # random numbers of a row on the device
    RESERVED = 256  # tokens of an inner stage for which there is room from the beginning

    def __init__(
        self, model: HNetInference, rows: int = 1, captures: bool | None = None, host_decides: bool | None = None,
        compiles: bool = False,
    ):  # fmt: skip
        self.model, self.device = model, next(model.parameters()).device
        self.cache = model.new_cache(rows)
        self.stages = list(zip(model.stages, self.cache.stages))
        self.S, looks = len(self.stages) - 1, self.device.type != "cuda" or rows <= self.FEW_ROWS
        self.host_decides = looks if host_decides is None else host_decides
        self.texts: list[Text | None] = [None] * rows
        self.waiting: list[Text] = []
        self.numbers, self.early = itertools.count(), []
        # on the device, at fixed places
        zeros, dtype = torch.zeros, next(model.parameters()).dtype
        self.logits_BV = zeros(rows, model.config.vocab_size, dtype=dtype, device=self.device)
        self.rows = SamplingRows.new(rows, self.NUMBERS, self.device)
        wide = at_least_float32(dtype)
        self.events = Events.new(self.STEPS, rows, self.S, wide, self.device)
        # what the host reads: after a stage, does a chunk begin in any row; after some steps, what they did
        pinned = {"pin_memory": self.device.type == "cuda"}
        self.begins_S = zeros(self.S, dtype=torch.bool, **pinned)
        self.past_EBX = torch.zeros_like(self.events.past_EBX, device="cpu", **pinned)
        self.running: Running | None = None
        self.overlaps, self.is_checked = True, False
        self.first_step: float | None = None  # by `clock`; set to None, it becomes that of the next step
        self.tokens: list[Token | None] = [None] * self.S
        self.captured = CapturedFunctions(self.device, self.device.type == "cuda" if captures is None else captures)
        self.compiles = compiles
        if compiles:
            if self.device.type != "cpu" or captures is not None:
                raise ValueError(f"compiles: expected a model on the CPU, not {self.device}, and no `captures`")
            self.captured = CompiledFunctions()
        self.prefills: dict[tuple[int, int], PaddedPrefill] = {}  # by sizes, those used last at the end
        self.prefill_places: list[int] = []

    def clock(self) -> float:
        """Seconds since some moment, without those that captures took."""
        return time.perf_counter() - self.captured.seconds

    @property
    def busy(self) -> bool:
        """Is there a text that has not ended, or an event that was not drained?"""
        return bool(self.waiting or self.early or any(self.texts))

    def add(
        self, prompt: str | bytes, seed: int = 0, sampling: Sampling = Sampling(), max_bytes: int = 256,
        valid_utf8: bool = False, stop_at_eos: bool = True, echo: bool = False,
    ) -> int:  # fmt: skip
        """Continue a prompt, with BOS before it, by up to `max_bytes` bytes, when a row is free. Returns its number.

        With `valid_utf8` prompt and continuation together are UTF-8, also where `max_bytes` ends it (if the prompt is,
        but for a character cut off at its end, which is completed). EOS ends the text unless `stop_at_eos` is False.
        `echo`: the prompt's bytes are events as well, without probabilities.

        Raises ValueError for max_bytes < 1, or too few to complete a character.
        """
        prompt = as_bytes(prompt)
        utf8 = utf8_state(prompt) if valid_utf8 else ANY_BYTES
        least = max(1, int(UTF8_MISSING[utf8]) if valid_utf8 else 0)
        if max_bytes < least:
            why = "expected 1 or more" if least == 1 else f"a prompt ends in a character that needs {least} more"
            raise ValueError(f"max_bytes: {max_bytes}; {why}")
        generator = torch.Generator().manual_seed(seed)
        text = Text(next(self.numbers), bytes([BOS]) + prompt, sampling, max_bytes, utf8, stop_at_eos, echo, generator)
        self.waiting.append(text)
        return text.number

    def cancel(self, number: int) -> None:
        """End a text: no event of it follows. Its row is free for the next one."""
        self.waiting = [text for text in self.waiting if text.number != number]
        self.early = [event for event in self.early if event.text != number]
        for row, text in enumerate(self.texts):
            if text and text.number == number:
                self.rows.active_B[row] = False
                self.texts[row] = None

    def drain(self) -> list[Event]:
        """Run up to `STEPS` steps of all texts. Returns what has been written, in the order of the steps.

        Raises GenerationError where the GPU's memory runs out, with the number of rows that would fit.
        """
        self.model._check_weights()
        try:
            with torch.no_grad() if self.device.type == "cuda" else torch.inference_mode():  # calls cost less
                return self._drain()
        except torch.OutOfMemoryError as error:
            raise GenerationError(self._why_out_of_memory()) from error

    def _why_out_of_memory(self) -> str:
        texts = [text for text in (*self.texts, *self.waiting) if text]
        longest = max((len(text.prompt) + text.drawn + text.left for text in texts), default=1)
        most = [longest, *(max(self.RESERVED, *state.tokens) for _, state in self.stages[1:])]
        each = sum(state.bytes_of(tokens) for (_, state), tokens in zip(self.stages, most))
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        free -= torch.cuda.memory_allocated(self.device) - self.cache.cache_bytes()
        rows, fit = len(self.texts), int(0.8 * free / each)  # a fifth for what is computed with them
        return (
            f"the GPU's memory ran out with {rows} texts at once, each of up to {longest:,} bytes and "
            f"{each / 1e6:,.0f} MB; about {max(0, min(fit, rows - 1))} would fit"
        )

    def _drain(self) -> list[Event]:
        events, self.early = self.early, []
        if self.running is None:
            self._start()
            events, self.early = events + self.early, []
        if self.running is None:
            return events
        done, self.running = self.running, None
        past_EBX = self._wait(done)
        texts = [text if text is self.texts[row] else None for row, text in enumerate(done.texts)]  # not cancelled
        ended = self._keep_account(texts, past_EBX)
        if self.runs_ahead and not self.host_decides and not ended and not (self.waiting and None in self.texts):
            self._start()  # the GPU computes while the host makes and handles events
        return events + self._events(texts, ended, past_EBX)

    # ------------------------------------------------------------------------------------------------ parts of a step

    def _parts(self) -> list[tuple[str, int]]:
        """What the host runs, by method and stage: whole steps, or else what it can leave out."""
        if not self.host_decides:
            return [("step", 0)]
        way_in, way_out = ([(name, s) for s in range(self.S)] for name in ("enter", "leave"))
        return [*way_in, ("inner", self.S), *reversed(way_out)]

    def _run(self, name: str, s: int) -> None:
        if not self.captured.replay((name, s)):
            getattr(self, f"_{name}")(s)

    def _run_step(self) -> None:
        """One step of all rows."""
        if not self.host_decides:
            self._run("step", 0)
            return
        reached = 0
        while reached < self.S:
            self._run("enter", reached)
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the wait for a stage
            if not self.begins_S[reached]:
                break
            reached += 1
        if reached == self.S:
            self._run("inner", self.S)
        for s in reversed(range(min(reached + 1, self.S))):
            self._run("leave", s)

    @torch.no_grad()
    def foresee(self) -> None:
        """Runs a step on the meta device, which computes nothing. For `compile_ahead`, which notes the kernels."""
        self._step(0)

    def _step(self, _: int) -> None:
        for s in range(self.S):
            self._enter(s)
        self._inner(self.S)
        for s in reversed(range(self.S)):
            self._leave(s)

    def _draw(self) -> Tensor:
        """The embeddings of the next bytes."""
        sampling = {text.sampling for text in self.texts if text}
        shared = dataclasses.astuple(*sampling) if len(sampling) == 1 and not self.captured.captures else None
        draw_rows(self.logits_BV, self.rows, shared)
        return self.model.embed(self.rows.byte_B)

    def _enter(self, s: int) -> None:
        x_BD, new_B1 = self.tokens[s - 1][::2] if s else (self._draw(), self.rows.active_B[:, None])
        self.tokens[s] = token = enter_step(*self.stages[s], x_BD, new_B1, self.rows.byte_B)
        note_starts(self.events, s, token.p_B1, token.opens_B1, new_B1, self.rows)
        if self.host_decides:
            self.begins_S[s].copy_(self.events.begins_S[s], non_blocking=True)

    def _inner(self, S: int) -> None:
        x_BD, new_B1 = self.tokens[-1][::2] if self.S else (self._draw(), self.rows.active_B[:, None])
        stage, state = self.stages[-1]
        self._go_out(S, inner_step(stage, state, x_BD, new_B1), new_B1)

    def _leave(self, s: int) -> None:
        token = self.tokens[s]
        self._go_out(s, leave_step(self.stages[s][0], token), token.how.span.valid_BL)

    def _go_out(self, s: int, y_BD: Tensor, new_B1: Tensor) -> None:
        """What stage s gives goes to the stage around it, or becomes logits; then the step is done."""
        self.stages[s][1].position_B += new_B1[:, 0]
        if s:
            smooth_step(y_BD, self.tokens[s - 1])
            return
        self.logits_BV.copy_(self.model.head(y_BD))
        record(self.events, self.rows)

    # -------------------------------------------------------------------------------------------------------- the host

    def _idle(self) -> Callable[[], None]:
        """Lets steps change nothing, until the function that is returned is called."""
        active_B, logits_BV = self.rows.active_B.clone(), self.logits_BV.clone()
        self.rows.active_B.zero_()
        self.events.written.zero_()

        def undo() -> None:
            self.rows.active_B.copy_(active_B)
            self.logits_BV.copy_(logits_BV)

        return undo

    def _capture(self) -> None:
        """Capture the parts of a step, if need be. What is used is checked once, or something slower is used."""
        if not self.captured.captures:
            return
        functions = {(name, s): functools.partial(getattr(self, f"_{name}"), s) for name, s in self._parts()}
        for overlaps in (True, False) if self.overlaps else (False,):
            self.overlaps = overlaps
            with contextlib.nullcontext() if overlaps else one_after_the_other():
                self.captured.prepare((overlaps, *self._places()), functions, self._idle)
            if self.is_checked or not self.captured.captures:
                return
            gap = self._error_of_graphs()
            if gap <= GRAPH_TOLERANCE:
                self.is_checked = True
                return
        kind = "compiled steps" if self.compiles else "graphs of a step"
        self.captured.give_up(RuntimeError(f"{kind} are off by {gap:.1e}"))
        logger.warning("generation runs one operation after the other: %s", self.captured.failure)

    def _error_of_graphs(self) -> float:
        """How far the logits are, after some steps as graphs, from those of the functions that were captured."""
        rows, events = (vars(x).values() for x in (self.rows, self.events))
        changed = [self.logits_BV, *rows, *events, *(t for _, state in self.stages for t in state.tensors())]
        before, active_B = [t.clone() for t in changed], self.rows.active_B.clone()

        def logits() -> Tensor:
            self.events.written.zero_()  # the record has room for `STEPS` steps
            for _ in range(min(CHECKED_STEPS, self.STEPS)):
                self._run_step()
            logits_BV = self.logits_BV[active_B]
            for t, value in zip(changed, before):
                t.copy_(value)
            return logits_BV

        found = logits()
        self.captured.captures = False
        with one_after_the_other():
            wanted = logits()
        self.captured.captures = True
        return relative_gap(found, wanted)

    def _places(self) -> tuple[int, ...]:
        """The addresses that graphs read and write."""
        tensors = [*self.parameters]
        for _, state in self.stages:
            tensors += [*state.tensors(), *state.tables]
        return tuple(t.data_ptr() for t in tensors)

    def _admit(self) -> None:
        """Waiting texts get the free rows. A prefill takes as long as some steps, so a few are read together."""
        free = [row for row, text in enumerate(self.texts) if text is None]
        enough = min(len(self.waiting), max(1, len(self.texts) // 8))
        if not self.waiting or (len(free) < enough and any(self.texts)):
            return
        while free and self.waiting:
            longest, texts = 0, []
            for text in self.waiting[: len(free)]:
                longest = max(longest, len(text.prompt))
                if texts and longest * (len(texts) + 1) > self.PREFILL_BYTES:
                    break
                texts.append(text)
            self._read(texts, free[: len(texts)])
            self.waiting, free = self.waiting[len(texts) :], free[len(texts) :]

    def _read(self, texts: list[Text], rows: list[int]) -> None:
        """Prefill some texts into rows."""
        logits_BV, cache, tokens_SB, starts_BLS = self.prefill([text.prompt for text in texts])
        bytes_ = max(len(text.prompt) + text.left for text in texts)
        for s, ((stage, state), read, tokens) in enumerate(zip(self.stages, cache.stages, tokens_SB)):
            state.reserve(max(bytes_ if s == 0 else min(bytes_, self.RESERVED), *tokens), stage)
            state.replace(rows, read, tokens)
        rows_B = torch.tensor(rows).to(self.device, non_blocking=True)
        self.logits_BV[rows_B] = logits_BV
        values = {
            "temperature_B": [text.sampling.temperature for text in texts],
            "top_k_B": [text.sampling.top_k for text in texts],
            "top_p_B": [text.sampling.top_p for text in texts],
            "min_p_B": [text.sampling.min_p for text in texts],
            "drawn_B": [0] * len(texts),
            "left_B": [text.left for text in texts],
            "utf8_B": [text.utf8 for text in texts],
            "stops_B": [text.stop_at_eos for text in texts],
            "active_B": [True] * len(texts),
        }
        for name, value in values.items():
            buffer = getattr(self.rows, name)
            buffer[rows_B] = torch.tensor(value, dtype=buffer.dtype).to(self.device, non_blocking=True)
        for i, (row, text) in enumerate(zip(rows, texts)):
            self.texts[row] = text
            if text.echo:
                for byte, starts in zip(text.prompt[1:], starts_BLS[i, 1:].tolist()):
                    self.early.append(Event(text.number, byte, tuple(starts), (), math.nan, False))

    def prefill(self, prompts: list[bytes]) -> tuple[Tensor, Cache, list[list[int]], Tensor]:
        """Read prompts, BOS included, from their beginnings.

        Returns the next byte's logits, a cache, the tokens at each stage, and chunk starts (B, L, S). Another prefill
        may change all of them.
        """
        self.parameters = list(self.model.parameters())  # training may have replaced some since the last text
        B, L = 1 << (len(prompts) - 1).bit_length(), padded_size(max(map(len, prompts)))
        if self.compiles or not self.captured.captures or B * L > self.GRAPH_BYTES:
            first = self.model.prefill(prompts)
            return first.last_logits(), first.cache, [state.tokens for state in first.cache.stages], first.starts_BLS
        if self.prefill_places != (places := [parameter.data_ptr() for parameter in self.parameters]):
            self.prefills, self.prefill_places = {}, places
        padded = self.prefills.pop((B, L), None) or PaddedPrefill(self.model, B, L, captures=True)
        while self.prefills and B * L + sum(map(math.prod, self.prefills)) > 2 * self.GRAPH_BYTES:
            del self.prefills[next(iter(self.prefills))]
        self.prefills[B, L] = padded
        logits_BV, tokens_SB, readings = padded.read(prompts)
        return logits_BV, padded.cache, tokens_SB, chunk_starts(readings, padded.byte_BL, self.S)

    def _fill_noise(self, steps: int) -> None:
        """Each row needs a random number a step."""
        for first in (0, Noise.BLOCK):
            rows = [
                row
                for row, text in enumerate(self.texts)
                if text and text.filled < text.drawn + steps and text.filled % self.NUMBERS == first
            ]
            if not rows:
                continue
            block_BX = torch.stack([Noise.block(self.texts[row].generator) for row in rows])
            rows_B = torch.tensor(rows).to(self.device, non_blocking=True)
            place = slice(first, first + Noise.BLOCK)
            self.rows.noise_BN[rows_B, place] = block_BX.to(self.device, non_blocking=True)
            for row in rows:
                self.texts[row].filled += Noise.BLOCK

    def _start(self) -> None:
        """Give free rows to waiting texts and run some steps."""
        self._admit()
        if not any(self.texts):
            return
        steps = min(self.STEPS, max(text.left for text in self.texts if text))
        for stage, state in self.stages:
            state.reserve(max(state.tokens) + max(steps, CHECKED_STEPS), stage)
        self._fill_noise(steps)
        is_one_row = self.device.type == "cpu" and len(self.texts) == 1  # MKL's product with one row takes one thread
        with one_thread() if is_one_row else contextlib.nullcontext():
            self._capture()
            self.events.written.zero_()
            self.first_step = self.clock() if self.first_step is None else self.first_step
            began, done = time.perf_counter(), 0
            while done < steps and (done == 0 or not self.host_decides or time.perf_counter() - began < self.SECONDS):
                self._run_step()
                done += 1
        self.past_EBX.copy_(self.events.past_EBX, non_blocking=True)
        self.running = Running(done, list(self.texts), torch.cuda.Event() if self.device.type == "cuda" else None)
        if self.running.end:
            self.running.end.record()

    def _wait(self, running: Running) -> np.ndarray:
        if running.end:
            running.end.synchronize()
        return self.past_EBX[: running.steps].numpy().copy()

    def _keep_account(self, texts: list[Text | None], past_EBX: np.ndarray) -> set[int]:
        """Bring the host's numbers up to date. Returns the rows whose text has ended, which are free."""
        steps_B = (past_EBX[..., 0] >= 0).sum(0).tolist()
        last_B = past_EBX[-1, :, 0].tolist()
        tokens_SB = past_EBX[..., 2 : 2 + self.S].sum(0).astype(int).T.tolist()
        ended = set()
        for row, text in enumerate(texts):
            if text is None:
                continue
            text.left, text.drawn = text.left - steps_B[row], text.drawn + steps_B[row]
            for (_, state), tokens_B in zip(self.stages, (steps_B, *tokens_SB)):
                state.tokens[row] += tokens_B[row]
            if text.left == 0 or last_B[row] < 0 or (text.stop_at_eos and last_B[row] == EOS):
                ended.add(row)
                self.texts[row] = None
        return ended

    def _events(self, texts: list[Text | None], ended: set[int], past_EBX: np.ndarray) -> list[Event]:
        events: list[Event] = []
        last: dict[int, int] = {}  # where a row's last event is
        for of_step in past_EBX.tolist():
            for row, (byte, log_probability, *more) in enumerate(of_step):
                if byte < 0 or (text := texts[row]) is None:
                    continue
                starts, p = tuple(map(bool, more[: self.S])), tuple(more[self.S :])
                is_end = text.stop_at_eos and byte == EOS
                last[row] = len(events)
                events.append(Event(text.number, None if is_end else int(byte), starts, p, log_probability, False))
        for row in ended & last.keys():
            events[last[row]] = events[last[row]]._replace(is_last=True)
        return events


# ----------------------------------------------------------------------------------------------------------- generate


class Emitted(NamedTuple):
    """One byte of a stream, with whether it opens a chunk of each chunking stage, outermost first."""

    sequence: int
    byte: int
    starts: tuple[bool, ...]


@dataclasses.dataclass
class Generation:
    """A finished text: `starts` has one entry for each byte of prompt and continuation (see Emitted)."""

    prompt: bytes
    continuation: bytes = b""
    starts: list[tuple[bool, ...]] = dataclasses.field(default_factory=list)

    @property
    def data(self) -> bytes:
        return self.prompt + self.continuation

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


def as_bytes(prompt: str | bytes) -> bytes:
    """A prompt's bytes. ValueError for a str that UTF-8 cannot hold (lone surrogates)."""
    if isinstance(prompt, bytes):
        return prompt
    try:
        return prompt.encode()
    except UnicodeEncodeError as error:
        found = prompt[error.start]
        raise ValueError(f"prompt: character {error.start} ({found!r}) is no text; pass raw bytes as bytes") from None


MOST_ROWS = 256  # of a batch; further prompts wait for a row


def stream(
    model: HNetInference,
    prompts: Sequence[str | bytes],
    max_bytes: int = 256,
    sampling: Sampling = Sampling(),
    seed: int | Sequence[int] = 0,
    valid_utf8: bool = False,
    stop_at_eos: bool = True,
    echo: bool = False,
    decoder: Decoder | None = None,
) -> Iterator[Emitted]:
    """Continue each prompt by up to `max_bytes` bytes; yields them as they are decided, of all sequences in turn.

    Sequence b draws from its own generator, seeded with seed[b] (seed + b for a single number), so it gets the same
    bytes in any batch. A sequence ends at EOS, which is not yielded, unless `stop_at_eos` is False. `echo` yields the
    prompts' bytes first. For the other options see `Decoder.add`. `decoder`: one of this model that is not busy, whose
    graphs are captured already.

    Raises ValueError for no prompt, a wrong number of seeds, or what `Decoder.add` refuses; warns of lengths beyond
    TRAINED_LENGTH.
    """
    data = [as_bytes(prompt) for prompt in prompts]
    seeds = [seed + b for b in range(len(data))] if isinstance(seed, int) else list(seed)
    if not data or len(seeds) != len(data):
        raise ValueError(
            f"prompts: {len(data)} with {len(seeds)} seeds; expected at least one prompt and a seed for each"
        )
    longest = max(map(len, data))
    if longest + max_bytes > TRAINED_LENGTH:
        warnings.warn(
            f"a prompt of {longest} byte{'s' * (longest != 1)} and {max_bytes} more exceed the {TRAINED_LENGTH} that "
            "H-Nets are trained on; expect worse text",
            stacklevel=2,
        )
    decoder = decoder or Decoder(model, min(len(data), MOST_ROWS))
    options = {"sampling": sampling, "max_bytes": max_bytes, "valid_utf8": valid_utf8, "stop_at_eos": stop_at_eos}
    numbers = [decoder.add(prompt, seed, echo=echo, **options) for prompt, seed in zip(data, seeds)]
    return _stream(decoder, {number: b for b, number in enumerate(numbers)})


def _stream(decoder: Decoder, sequence: dict[int, int]) -> Iterator[Emitted]:
    try:
        while decoder.busy:
            for event in decoder.drain():
                if event.byte is not None:
                    yield Emitted(sequence[event.text], event.byte, event.starts)
    finally:
        for number in sequence:  # where the caller has stopped listening
            decoder.cancel(number)


def generate(model: HNetInference, prompts: Sequence[str | bytes], **options) -> list[Generation]:
    """`stream` with the same options, collected: a Generation per prompt, with the chunk starts of prompt and rest."""
    done = [Generation(as_bytes(prompt)) for prompt in prompts]
    for emitted in stream(model, prompts, **{**options, "echo": True}):
        generation = done[emitted.sequence]
        if len(generation.starts) >= len(generation.prompt):
            generation.continuation += bytes([emitted.byte])
        generation.starts.append(emitted.starts)
    return done

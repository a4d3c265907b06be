"""An H-Net as a model of transformers: the modules of hnet_trainable.py, the caches of hnet_simple.py.

`HNetForCausalLM.forward` takes rectangular batches with an attention mask, as transformers makes them. It drops the
padding and packs what is left: then `HNetLM.forward` runs, as in training, or with a cache `prefill` and `step`.

Shape legend, as suffixes of names: B sequences, L tokens of each with padding, T real tokens of all sequences together,
K logits of a sequence that are returned, V vocabulary, S chunking stages.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged
from torch.utils.checkpoint import checkpoint
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from hnet_config import ConfigError
from hnet_kernels import Residual, cross_entropy
from hnet_kernels.recompute import recomputing
from hnet_kernels.sampling import UTF8_NEXT, guard_tables
from hnet_simple import Cache, HNetInference
from hnet_trainable import Block, Embedding, Linear, flat, initial_weight, training_loss
from hnet_transformers.configuration_hnet import HNetTransformersConfig

try:
    if __name__ != "hnet_transformers.modeling_hnet":  # a copy in an exported folder
        raise ImportError
    from hnet_transformers.hub import HubMixin
except ImportError:

    class HubMixin:
        """Loading and saving as transformers does it."""

        def check_edits(self, generates: bool) -> None:
            """Nothing: exported code is not for editing."""


CACHE = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)  # as in transformers 5.17
PRECISE = ["residual_proj", "A_log", "dt_bias", "D"]  # weights that stay in float32
IGNORED = -100  # the label of what is not predicted
MODES = ("greedy_search", "sample", "beam_search", "beam_sample")  # of generation


# -------------------------------------------------------------------------------------------------------------- cache


class HNetCache:
    """The states of a batch of texts, for `forward` and `generate`. Changed in place by each call.

    Padding is not read. `copy.deepcopy` gives a cache with which the same texts can go on in another way.
    """

    is_compileable = is_croppable = False
    is_linear = [False]

    def __init__(self, states: Cache, owner: nn.Module):
        """owner: the backbone to whose mixers the states belong."""
        self.states, self.owner, self.columns = states, owner, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that were read, with padding."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b continues what sequence beam_idx[b] has read."""
        for stage in self.states.stages:
            for tensor in stage.tensors():
                tensor.copy_(tensor[beam_idx.to(tensor.device)])
            stage.tokens = [stage.tokens[b] for b in beam_idx.tolist()]

    def __deepcopy__(self, memo: dict[int, Any]) -> HNetCache:
        stages = [_cloned(stage) for stage in self.states.stages]
        for stage in stages:
            stage.tokens = list(stage.tokens)
            stage.layers = {mixer: _cloned(state) for mixer, state in stage.layers.items()}
        other = HNetCache(Cache(stages), self.owner)
        other.columns = self.columns
        return other


def _cloned(state: Any) -> Any:
    """A copy of an object with copies of its tensors."""
    other = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(other, name, value.clone())
    return other


# --------------------------------------------------------------------------------------------------------- generation


class Utf8LogitsProcessor(LogitsProcessor):
    """Allows only bytes that keep a text valid UTF-8, also where it ends at its longest length. EOS comes between
    characters alone.

    `generate` says how long texts may get. Elsewhere set `max_length`, or the last character may be cut off.
    """

    def __init__(self, max_length: int | None = None):
        self.max_length = max_length
        self.allowed_LXV, _ = guard_tables()
        self.next_XV = UTF8_NEXT

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.allowed_LXV, self.next_XV = self.allowed_LXV.to(scores.device), self.next_XV.to(scores.device)
        state_B = input_ids.new_zeros(len(input_ids))
        for byte_B in input_ids[:, -3:].clamp(0, 255).unbind(1):  # a character that is cut off has at most three
            then_B = self.next_XV[state_B, byte_B]
            state_B = torch.where(then_B < 0, self.next_XV[0, byte_B].clamp_min(0), then_B)
        left = 4 if self.max_length is None else min(max(self.max_length - input_ids.shape[1], 1), 4)
        allowed_BV = self.allowed_LXV[left, state_B]
        scores = scores.clone()
        scores[:, : allowed_BV.shape[1]] = scores[:, : allowed_BV.shape[1]].masked_fill(~allowed_BV, -torch.inf)
        scores[:, allowed_BV.shape[1] :] = -torch.inf
        return scores


class StopAtBytes(StoppingCriteria):
    """Ends a text that ends with one of some strings, whatever their characters."""

    def __init__(self, strings: str | Sequence[str]):
        self.stops = [list(string.encode()) for string in ([strings] if isinstance(strings, str) else strings)]
        if not all(self.stops):
            raise ValueError("stop_strings: an empty string; expected at least one character")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            if len(stop) <= input_ids.shape[1]:
                ended_B |= (input_ids[:, -len(stop) :] == input_ids.new_tensor(stop)).all(1)
        return ended_B


class Ended(StoppingCriteriaList):
    """Stopping criteria that remember which texts had ended before their newest token, which is padding then."""

    def __init__(self, criteria: StoppingCriteriaList, batch: int, device: torch.device):
        super().__init__(criteria)
        self.now_B = self.before_B = torch.zeros(batch, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended_B = super().__call__(input_ids, scores, **kwargs)
        self.before_B, self.now_B = self.now_B, self.now_B | ended_B
        return ended_B


# -------------------------------------------------------------------------------------------------------------- model


@dataclasses.dataclass
class HNetCausalLMOutput(CausalLMOutputWithPast):
    """What `forward` returns.

    loss: with labels, what training minimises: `ce` and the weighted ratio losses. logits: (B, K, V), zero on padding.
    ce: nats, mean over labels. ratio_losses: (S,). boundaries: (B, L, S) bool, which bytes open a chunk of each stage.
    """

    ce: Tensor | None = None
    ratio_losses: Tensor | None = None
    boundaries: Tensor | None = None


class Recomputing:
    """A block's forward whose backward recomputes what it needs."""

    def __init__(self, block: Block):
        self.block = block

    def __call__(self, residual_TD: Tensor | Residual, packing: Any) -> Tensor | Residual:
        forward = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, residual_TD, packing)
        if isinstance(residual_TD, Residual):  # fast operations recompute themselves
            with recomputing("block"):
                return forward(self.block, residual_TD, packing)
        return checkpoint(forward, self.block, residual_TD, packing, use_reentrant=False)


class HNetForCausalLM(HubMixin, PreTrainedModel, GenerationMixin):
    """An H-Net for transformers. Its parameters have the official names; `hnet` is the same model without transformers.

    Built from a config, its weights are drawn with torch's global generator: `torch.manual_seed` repeats them.
    """

    config_class = HNetTransformersConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _is_stateful = True
    _no_split_modules = ["HNet"]
    _keep_in_fp32_modules_strict = PRECISE

    def __init__(self, config: HNetTransformersConfig):
        super().__init__(config)
        if by_cuts := config.hnet_config.stages_by_cuts:
            router = config.hnet_config.routers[by_cuts[0]]
            raise ConfigError(f"routers: {router} is told where chunks begin, which batches of transformers don't say")
        model = HNetInference(config.hnet_config)
        # what one of the two sets, the other has: an adapter, a loaded weight
        for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            setattr(self, kind, getattr(model, kind))
        first: dict[nn.Parameter, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        self._tied_weights_keys = {name: first[p] for name, p in named if first.setdefault(p, name) != name}
        self._inner = (model,)  # in a tuple, so that it is no submodule
        self._has_values = not self.embeddings.weight.is_meta  # `from_pretrained` builds on the meta device
        for name, parameter in self.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and set(name.split(".")) & set(PRECISE):
                parameter.data = parameter.data.float()
        self.post_init()

    @property
    def hnet(self) -> HNetInference:
        """The model of hnet_simple.py with the weights and modules of this one, adapters included."""
        (model,) = self._inner
        if model.config.tie_embeddings and not (
            isinstance(self.embeddings, Embedding) and isinstance(self.lm_head, Linear)
        ):
            raise ValueError(
                "embeddings and lm_head share one weight (tie_embeddings), so neither can have an adapter of its own: "
                "leave both out of the adapter's modules"
            )
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HNetCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_boundaries: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: HNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> HNetCausalLMOutput | tuple[Any, ...]:
        """Logits of the next byte, for a batch with padding anywhere, which is dropped.

        input_ids: int64 (B, L). attention_mask: (B, L), or with a cache also what was read before; 0 on padding.
        cache: what was read before; it is changed. use_cache: return one. Neither has gradients.
        labels: (B, L), those of input_ids; each token predicts the next one's, except IGNORED and padding. The loss is
            that of `HNetLM.forward`. The last byte of a text is then a label alone: its logits are 0, as on padding.
        logits_to_keep: 1 for the last real token of each sequence, else the last columns or an index of columns.
        num_items_in_batch: the labels of all micro-batches of a step; the loss is then this one's share of the sum.
        past_key_values: another name of `cache`. Raises ValueError for what it can't do or read.
        """
        cache = past_key_values if cache is None else cache
        for name, value in (
            ("inputs_embeds", inputs_embeds),
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value is not None and value is not False:
                raise ValueError(f"{name}: not supported; an H-Net reads bytes (input_ids) and returns logits")
        if getattr(self, "_is_replica", False):
            raise ValueError("DataParallel is not supported; start one process per GPU (torchrun), or show it one GPU")
        real_BL = self._real(input_ids, attention_mask, cache)
        self.check_edits(generates=cache is not None or bool(use_cache))
        if cache is not None or use_cache:
            if labels is not None:
                raise ValueError("labels: given with a cache, which has no gradients; leave out cache and use_cache")
            output = self._continue(input_ids, real_BL, cache, output_boundaries, logits_to_keep)
        else:
            output = self._run(input_ids, real_BL, labels, num_items_in_batch, output_boundaries, logits_to_keep)
        return output.to_tuple() if return_dict is False else output

    def _real(self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: HNetCache | None) -> Tensor:
        """bool (B, L): which tokens are no padding. Raises ValueError for a batch that cannot be read."""
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.ndim != 2
            or input_ids.dtype not in (torch.int64, torch.int32)
        ):
            kind = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids)
            raise ValueError(f"input_ids: {kind}; expected whole numbers (batch, length)")
        if cache is not None and not (isinstance(cache, HNetCache) and cache.owner is self.backbone):
            raise ValueError(f"cache: {type(cache).__name__} of something else; expected one that this model returned")
        (B, L), read = input_ids.shape, cache.columns if cache else 0
        if not B or not L:
            raise ValueError("input_ids: empty; expected at least one byte a text, such as BOS (254)")
        if cache is not None and cache.states.batch != B:
            raise ValueError(f"input_ids: {B} texts; expected {cache.states.batch}, as many as the cache holds")
        if attention_mask is None:
            real_BL = torch.ones_like(input_ids, dtype=torch.bool)
        elif attention_mask.ndim != 2 or len(attention_mask) != B or attention_mask.shape[1] not in (L, read + L):
            raise ValueError(f"attention_mask: {tuple(attention_mask.shape)}; expected {(B, L)}, as input_ids")
        else:
            real_BL = attention_mask[:, -L:].to(input_ids.device) != 0
        if not read and not (some_B := real_BL.any(1)).all():
            row = int(some_B.int().argmin())
            raise ValueError(
                f"attention_mask: text {row} is all padding; expected at least one byte, such as BOS (254)"
            )
        least, most = (int(bound) for bound in torch.where(real_BL, input_ids, 0).aminmax())
        if least < 0 or most >= self.config.vocab_size:
            raise ValueError(
                f"input_ids: holds {least if least < 0 else most}; expected 0 to {self.config.vocab_size - 1}, since "
                "this model reads bytes: use its byte tokenizer"
            )
        return real_BL

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """The model of a folder or a name on the Hub, and what HubMixin adds; see docs/TRANSFORMERS.md.

        Raises ValueError where the weights are not those of the config, or `device_map` names several devices.
        """
        wants_info, takes_any = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        with _without_report():
            model, info = super().from_pretrained(source, *args, config=config, **options)
        mismatched = () if takes_any else [name for name, *_ in info["mismatched_keys"]]
        found = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"], "of another shape": mismatched}
        if details := [
            f"{len(names)} {what} ({', '.join(sorted(names)[:2])}{', ...' if len(names) > 2 else ''})"
            for what, names in found.items()
            if names
        ]:
            raise ValueError(f"{source}: the weights don't fit the config: {'; '.join(details)}")
        if len(devices := {str(parameter.device) for parameter in model.parameters()}) > 1:
            raise ValueError(f"device_map: puts the model on {', '.join(sorted(devices))}; expected one device")
        return (model, info) if wants_info else model

    # ------------------------------------------------------------------------------------------------ without a cache

    def _run(
        self, input_ids: Tensor, real_BL: Tensor, labels: Tensor | None, num_items_in_batch: int | Tensor | None,
        output_boundaries: bool, logits_to_keep: int | Tensor,
    ) -> HNetCausalLMOutput:  # fmt: skip
        read_BL, next_T = real_BL, None
        if labels is not None:  # as in training, the last byte of a text is a label alone
            read_BL = real_BL & (real_BL.flip(1).cumsum(1).flip(1) > 1)
            next_BL = real_BL & (real_BL.cumsum(1) > 1)
            label_T = _next_labels(labels, next_BL, self.config.vocab_size)
            is_label_T = label_T != IGNORED
            next_T = torch.where(is_label_T, label_T, input_ids[next_BL])
        ids_T, lengths = input_ids[read_BL].to(torch.int64), [n for n in read_BL.sum(1).tolist() if n]
        if not lengths:
            raise ValueError("labels: no text has two bytes, so there is no next byte to predict")
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=input_ids.device)
        documents = {"offsets": offsets, "min_seqlen": min(lengths), "max_seqlen": max(lengths)}
        nest = functools.partial(nested_tensor_from_jagged, **documents)
        out = self.hnet(nest(ids_T), None if next_T is None else nest(next_T))
        logits_TV = flat(out.logits)
        output = HNetCausalLMOutput(logits=_keep(_spread(logits_TV, read_BL), read_BL, logits_to_keep))
        if labels is not None:
            output.ratio_losses = out.ratio_losses
            output.ce = out.ce if is_label_T.all() else _ce_of_some(out.ce, logits_TV, next_T, is_label_T)
            output.loss = training_loss(output.ce, output.ratio_losses, self.config.ratio_weight)
            if num_items_in_batch is not None:  # counted like this by Trainer, padding on the left or not
                output.loss = output.loss * (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
        if output_boundaries:
            output.boundaries = _spread(_starts(out.stages, len(ids_T), ids_T.device), read_BL)
        return output

    # --------------------------------------------------------------------------------------------------- with a cache

    def _continue(
        self, input_ids: Tensor, real_BL: Tensor, cache: HNetCache | None, output_boundaries: bool,
        logits_to_keep: int | Tensor,
    ) -> HNetCausalLMOutput:  # fmt: skip
        model, (B, L), S = self.hnet, input_ids.shape, self.hnet.config.num_stages
        cache = cache or HNetCache(model.new_cache(B), self.backbone)
        is_first = not cache.columns
        cache.columns += L
        boundaries_BLS = torch.zeros(B, L, S, dtype=torch.bool, device=input_ids.device)
        if not real_BL.any():  # padding after what was read
            logits_BLV = torch.zeros(B, L, self.config.vocab_size, dtype=self.dtype, device=input_ids.device)
        elif L == 1 and not is_first:
            step = model.step(input_ids[:, 0].to(torch.int64), cache.states, real_BL[:, 0].tolist())
            logits_BLV = step.logits_BV[:, None]
            boundaries_BLS[:, 0] = torch.tensor(step.starts, dtype=torch.bool).view(B, S)
        else:
            rows = [ids_L[real_L].to(torch.int64) for ids_L, real_L in zip(input_ids, real_BL)]
            read = model.prefill(rows, cache.states)
            read_BL = torch.arange(max(read.lengths), device=input_ids.device) < real_BL.sum(1, keepdim=True)
            logits_BLV = _spread(read.logits_BLV[read_BL], real_BL)
            boundaries_BLS = _spread(read.starts_BLS[read_BL], real_BL)
        logits_BKV = _keep(logits_BLV, real_BL, logits_to_keep)
        boundaries = {"boundaries": boundaries_BLS} if output_boundaries else {}
        return HNetCausalLMOutput(logits=logits_BKV, **{CACHE: cache}, **boundaries)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`generate` of transformers: greedy, sampling and beams, on the caches of hnet_simple.py.

        stop_strings: found by their bytes, so no tokenizer is needed. Assisted decoding is not supported.
        """
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(ids, Tensor) and not ids.numel():
            raise ValueError("input_ids: empty; expected at least one byte a text, such as BOS (254)")
        if kwargs.get("cache_implementation") is not None:
            raise ValueError(
                f"cache_implementation: {kwargs['cache_implementation']!r}; an H-Net has a cache of its own"
            )
        if kwargs.get("cache") is not None:
            kwargs[CACHE] = kwargs.pop("cache")
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it pages the cache of attention."""
        raise ValueError("generate_batch: not supported; an H-Net has a cache of its own: use generate")

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        if generation_mode.value not in MODES:
            raise ValueError(
                f"{generation_mode.value}: not supported, since the states of an H-Net cannot be taken back by some "
                "bytes; expected greedy search, sampling or beams"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False, ended: Ended | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What `forward` gets for the next byte: with a cache the columns that it has not read, else all."""
        cache = kwargs.get(CACHE)
        known = inspect.signature(self.forward).parameters  # generate's own options, such as tokenizer, are not
        inputs = {name: value for name, value in kwargs.items() if name in known and value is not None}
        if cache is None:
            return {**inputs, "input_ids": input_ids, "attention_mask": attention_mask}
        new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        if new < 1:
            raise ValueError(
                f"input_ids: no more columns than the cache has read, {cache.columns}; add what comes next"
            )
        input_ids = input_ids[:, -new:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, -new:]
        if ended is not None and not is_first_iteration and ended.before_B.any():
            attention_mask = (~ended.before_B[:, None]).expand_as(input_ids)
        return {**inputs, "input_ids": input_ids, "attention_mask": attention_mask}

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        ended = Ended(stopping_criteria, len(input_ids), input_ids.device)
        return super()._sample(
            input_ids, logits_processor=logits_processor, stopping_criteria=ended, generation_config=generation_config,
            ended=ended, **kwargs,
        )  # fmt: skip

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int,
    ) -> None:  # fmt: skip
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation: {generation_config.cache_implementation!r}; an H-Net has a cache of its own"
            )
        mask_BL = model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size and mask_BL is not None and not mask_BL.all():
            raise ValueError("prefill_chunk_size: given with padded texts; expected a batch without padding")
        if model_kwargs.get(CACHE) is None and generation_config.use_cache:
            batch = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = HNetCache(self.hnet.new_cache(batch), self.backbone)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.config.vocab_size > 256:  # what is no byte is never drawn
            processors.insert(0, SuppressTokensLogitsProcessor(range(256, self.config.vocab_size), self.device))
        for processor in processors:
            if isinstance(processor, Utf8LogitsProcessor):
                processor.max_length = generation_config.max_length
        return processors

    def _get_stopping_criteria(self, generation_config: Any, stopping_criteria: Any, tokenizer: Any = None) -> Any:
        strings, generation_config.stop_strings = generation_config.stop_strings, None
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer)
        generation_config.stop_strings = strings
        if strings is not None:
            criteria.append(StopAtBytes(strings))
        return criteria

    # ------------------------------------------------------------------------------------------- what transformers asks

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused, but for the size that the model has: its vocabulary is the bytes."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings: {new_num_tokens} tokens; the vocabulary of an H-Net is its "
                f"{self.config.vocab_size} bytes: use its byte tokenizer"
            )
        return self.embeddings

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The ties of the modules, whether or not they are those of `tie_embeddings`."""
        return dict(self._tied_weights_keys)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that were not loaded, as train.py does, from a seed of torch's global generator.

        Those that `initial_weight` does not know, and tensors that no file holds, have the value of `__init__`.
        """
        new = [(n, p) for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
        seed = int(torch.randint(2**62, ())) if new else 0
        for name, parameter in new:
            if (value := initial_weight(name, parameter.shape, self.config.hnet_config, seed)) is not None:
                parameter.copy_(value)
        if not self._has_values:
            _fill_other_tensors(self.hnet)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any):
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError("use_reentrant: True; expected False, since the reentrant form does not pack documents")
        for module in self.modules():
            if isinstance(module, Block):
                if enable:
                    module.forward = Recomputing(module)
                else:
                    vars(module).pop("forward", None)
        self.gradient_checkpointing = enable


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that don't fit, of which one sentence follows."""
    logger = logging.getLogger("transformers.modeling_utils")
    is_no_report = lambda record: "LOAD REPORT" not in record.getMessage()  # noqa: E731
    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


def _fill_other_tensors(model: HNetInference) -> None:
    """Gives tensors that are in no state dict the values of `__init__`, which the meta device does not have.

    Our modules have no such tensors; those of a changed model may: buffers that are not persistent, and attributes.
    Raises ValueError for one that is drawn at random, since the weights were trained with other values.
    """
    places = [
        (name, key)
        for name, module in model.named_modules()
        for key in (*module._non_persistent_buffers_set, *vars(module))
        if isinstance(getattr(module, key), Tensor)
    ]
    if not places:
        return
    given = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            given.append(HNetInference(model.config))
    for name, key in places:
        value, other = (getattr(one.get_submodule(name), key) for one in given)
        if not value.equal(other):
            raise ValueError(
                f"{f'{name}.{key}'.lstrip('.')}: __init__ draws it at random and the saved weights do not have it; "
                "make it a persistent buffer (register_buffer)"
            )
        setattr(model.get_submodule(name), key, value.to(model.embeddings.weight.device))


def _spread(x_TX: Tensor, real_BL: Tensor) -> Tensor:
    """(B, L, ...): the rows of real tokens at their places, zeros on padding."""
    x_BLX = x_TX.new_zeros(*real_BL.shape, *x_TX.shape[1:])
    return x_BLX.index_put((real_BL,), x_TX)


def _keep(logits_BLV: Tensor, real_BL: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """(B, K, V): see `HNetForCausalLM.forward`."""
    if isinstance(logits_to_keep, Tensor):
        return logits_BLV[:, logits_to_keep]
    if logits_to_keep != 1:
        return logits_BLV[:, -logits_to_keep:]
    L = real_BL.shape[1]
    last_B = (real_BL * torch.arange(L, device=real_BL.device)).argmax(1)
    return logits_BLV[torch.arange(len(last_B), device=last_B.device), last_B][:, None]


def _next_labels(labels: Tensor, next_BL: Tensor, vocab_size: int) -> Tensor:
    """(T,) int64: the labels of the tokens that have one before them. Raises ValueError where one is no byte."""
    if labels.shape != next_BL.shape:
        raise ValueError(f"labels: {tuple(labels.shape)}; expected {tuple(next_BL.shape)}, as input_ids")
    label_T = labels[next_BL].to(torch.int64)
    given_T = label_T[label_T != IGNORED]
    if len(given_T):
        least, most = (int(bound) for bound in given_T.aminmax())
        if least < 0 or most >= vocab_size:
            value = least if least < 0 else most
            raise ValueError(f"labels: holds {value}; expected 0 to {vocab_size - 1}, or {IGNORED} for no label")
    return label_T


def _ce_of_some(ce: Tensor, logits_TV: Tensor, next_T: Tensor, is_label_T: Tensor) -> Tensor:
    """The cross entropy over those tokens alone that have a label; `ce` is the model's own, over all tokens."""
    if not torch.isclose(ce, cross_entropy(logits_TV, next_T), rtol=1e-6, atol=0, equal_nan=True):
        raise ValueError(
            f"labels: some are {IGNORED}, which the edited cross entropy of HNetLM.forward cannot leave out; put its "
            "formula into the definition of cross_entropy (docs/CHANGING.md), or give every byte a label"
        )
    if not is_label_T.any():
        return logits_TV.sum() * 0
    return cross_entropy(logits_TV[is_label_T], next_T[is_label_T])


def _starts(stages: list[Any], T: int, device: torch.device) -> Tensor:
    """bool (T, S): which tokens open a chunk of each stage."""
    starts_TS = torch.zeros(T, len(stages), dtype=torch.bool, device=device)
    at_T = torch.arange(T, device=device)
    for s, stage in enumerate(stages):
        at_T = at_T[stage.b_T]
        starts_TS[at_T, s] = True
    return starts_TS

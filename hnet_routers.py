"""Rules: routers that do not learn. The config's key `routers` names one for each chunking stage.

The router `learned` is RoutingModule of hnet_trainable.py. A rule has the same two methods, `forward` to the boundary
probability p and `opens` to the decision b, but no weights and no ratio loss: p is 0 or 1, so that c of eq. 6 is 1 and
only the positions of chunks differ from a learned router.

To add a router, write a class and register it: see docs/CHANGING.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nested._internal.nested_tensor import NestedTensor

from hnet_config import BOS, ROUTERS, HNetConfig


class Router(nn.Module):
    """The base class of routers. Its attributes are what configs, training and generation ask a router for."""

    usage = ""  # how a config writes it, for messages
    pattern = ""  # regular expression of the argument: what follows the name and a colon
    is_learned = False
    is_causal = True  # whether b_t depends on no byte after t
    reads_bytes = False  # whether it reads packing.byte_T, which only stage 0 has
    reads_cuts = False  # whether it reads packing.cuts_T
    reads_file = False  # the argument is the name of a file
    fixes_rate = False  # the argument is the number of tokens in a chunk


class Rule(Router):
    """A router that does not learn. A subclass says in `starts` where chunks begin."""

    def __init__(self, width: int, argument: str = ""):
        super().__init__()
        self.value = argument

    def starts(self, packing: Any) -> Tensor:
        """bool (T,): the tokens that open a chunk. The first token of a document always opens one.

        packing: a `Packing` of hnet_trainable.py or, in generation, `Rows` of hnet_simple.py.
        """
        raise NotImplementedError

    def forward(self, x_TD: Tensor, packing: Any) -> Tensor:
        """p_T: 1 where a chunk begins and 0 elsewhere, in at least float32."""
        opens_T = self.starts(packing) | (packing.position_T == 0)
        return opens_T.to(torch.promote_types(x_TD.dtype, torch.float32))

    def opens(self, p_T: Tensor) -> Tensor:
        """b_T (bool)."""
        return p_T > 0.5


class Space(Rule):
    """SpaceByte's rule (arXiv 2404.14408, github.com/kjslag/spacebyte): the first of several spacelike bytes, and BOS.

    All bytes are spacelike except ASCII letters, ASCII digits and the bytes inside a UTF-8 character.
    """

    usage, reads_bytes = "space", True

    def starts(self, packing: Any) -> Tensor:
        byte_T = packing.byte_T
        ranges = (ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF)
        spacelike_T = torch.stack([(byte_T < first) | (byte_T > last) for first, last in ranges]).all(0)
        return (spacelike_T & ~spacelike_T.roll(1)) | (byte_T == BOS)


class Stride(Rule):
    """Every K-th token of a document, beginning with its first."""

    usage, pattern, fixes_rate = "stride:K with K from 2 to 9999", "[2-9]|[1-9][0-9]{1,3}", True

    def starts(self, packing: Any) -> Tensor:
        return packing.position_T % int(self.value) == 0


class Given(Rule):
    """The tokens that the caller names: see `cuts` of `HNetLM.forward`."""

    usage, is_causal, reads_cuts = "given", False, True

    def starts(self, packing: Any) -> Tensor:
        return packing.cuts_T > 0


class GivenCausal(Given):
    """`given` by a caller who vouches that no decision depends on a later byte."""

    usage, is_causal = "given_causal", True


class Tokens(Given):
    """The first bytes of a tokenizer's tokens. hnet_runtime/data/cuts.py computes them and passes them as `cuts`."""

    usage, pattern, reads_file = "tokens:FILE", ".+", True


def check_cuts(cuts: Tensor | None, iids: Tensor, config: HNetConfig) -> None:
    """Raises ValueError unless `cuts` are what the routers of the config need: see `HNetLM.forward`."""
    stages = config.stages_by_cuts
    if not stages and cuts is not None:
        raise ValueError(f"cuts: given, but the routers {', '.join(config.routers)} do not read them")
    if not stages:
        return
    if cuts is None:
        raise ValueError(f"cuts: missing; the router {config.routers[stages[0]]} needs to know where chunks begin")
    kinds = (torch.bool,) if len(stages) == 1 else (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    kind = "bool" if len(stages) == 1 else f"whole numbers from 0 to {len(stages)}"
    if not (isinstance(cuts, NestedTensor) and cuts.dim() == 2 and cuts._values.dtype in kinds):
        raise ValueError(f"cuts: expected a nested tensor (B, j) of jagged layout, of {kind}")
    if cuts.lengths() is not None or not (cuts.offsets() is iids.offsets() or cuts.offsets().equal(iids.offsets())):
        raise ValueError("cuts: expected documents as long as those of iids, without gaps between them")
    if cuts.device.type == "cpu" and not 0 <= int(cuts._values.min()) <= int(cuts._values.max()) <= len(stages):
        raise ValueError(f"cuts: holds values from {cuts._values.min()} to {cuts._values.max()}; expected {kind}")


def inner_cuts(cuts_T: Tensor, start_C: Tensor) -> Tensor:
    """`cuts_T` of the stage inside, at each chunk's first token. It counts stages, so it is one less than outside."""
    return cuts_T[start_C].to(torch.int8) - 1


ROUTERS |= {"space": Space, "stride": Stride, "tokens": Tokens, "given": Given, "given_causal": GivenCausal}

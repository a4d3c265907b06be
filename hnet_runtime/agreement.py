"""Does what runs compute what hnet_trainable.py says? Small models that answer before a run begins.

Steps as graphs (graphs.py) and generation (hnet_simple.py) compute the model in other ways than `HNetLM.forward`. An
edit of hnet_trainable.py that they do not follow must not be ignored in silence. So a toy with the config's stages,
letters and options runs both ways before step 1, and what differs first is named.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from hnet_runtime import equivalence
from hnet_runtime.graphs import GraphedModel
from hnet_simple import HNetInference
from hnet_trainable import BOS, HNetConfig, HNetLM, nested_like

ALPHA = 0.3  # weight of the ratio losses in the toy's loss; any value would do that lets both parts matter
EXACT = 1e-9  # float64: sums in another order, over some hundred tokens, differ by 1e-12; a wrong formula by far more

# Two batches of as many bytes and other document lengths: rows of one byte, and inner stages that need padding
BATCHES = ([37, 1, 58], [2] * 8 + [80])


def toy_config(config: HNetConfig, width: int | None = 64) -> HNetConfig:
    """A config with the same stages, letters and options, but few layers; each stage `width` wide (None: as wide as
    config has it), or twice, three times ... as wide where the config's stages widen."""
    raw = config.to_dict()
    raw["arch_layout"] = _few_layers(raw["arch_layout"])
    if width is None:
        return HNetConfig.load(raw)
    growths = [0]
    for outer, inner in zip(config.d_model, config.d_model[1:]):
        growths.append(growths[-1] + (inner > outer))
    raw["d_model"] = [width * (1 + growth) for growth in growths]
    raw["d_intermediate"] = [128 * (n > 0) for n in config.d_intermediate]
    raw["ssm_cfg"]["d_state"] = 16
    attn = config.attn_cfg
    raw["attn_cfg"] = {
        "num_heads": [2 * (n > 0) for n in attn.num_heads],
        "rotary_emb_dim": [min(n, 16) for n in attn.rotary_emb_dim],
        "window_size": [min(n, 7) for n in attn.window_size],
    }
    return HNetConfig.load(raw)


def _few_layers(layout: Any) -> Any:
    if isinstance(layout, str):
        return re.sub("[0-9]+", lambda count: str(min(int(count[0]), 2)), layout)
    return [_few_layers(part) for part in layout]


def _batch(lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    ids = torch.randint(97, 109, (sum(lengths),), generator=generator)  # few letters, so that they repeat as in text
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids[ends[:-1]] = BOS
    iids = nested_tensor_from_jagged(ids.to(device), ends.to(device), min_seqlen=min(lengths), max_seqlen=max(lengths))
    return iids, nested_like(iids.values().roll(-1), iids)


def _plain_step(model: HNetLM, pair: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients by autograd."""
    out = model(*pair)
    loss = out.ce + ALPHA * out.ratio_losses.sum()
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    losses = {"the cross entropy": out.ce.detach()}
    losses |= {f"the ratio loss of stage {s}": x for s, x in enumerate(out.ratio_losses.detach())}
    losses |= {f"F of stage {s}": stage.F.detach() for s, stage in enumerate(out.stages)}
    losses |= {f"G of stage {s}": stage.G.detach() for s, stage in enumerate(out.stages)}
    return losses, dict(zip(weights, gradients))


def _graph_step(graphed: GraphedModel, pair: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    for gradient in graphed.optimizer.gradients:
        gradient.fill_(torch.nan)  # so that one that nobody writes is found
    found = graphed.forward_backward([pair])
    losses = {"the cross entropy": found.ce.clone()}
    losses |= {f"the ratio loss of stage {s}": x.clone() for s, x in enumerate(found.ratio)}
    losses |= {f"F of stage {s}": x.clone() for s, x in enumerate(found.F)}
    losses |= {f"G of stage {s}": x.clone() for s, x in enumerate(found.G)}
    return losses, {name: p.grad.clone() for name, p in graphed.masters.named_parameters()}


def _gap(found: Tensor, wanted: Tensor) -> float:
    """The distance of two tensors in units of the second's size; infinite where one is not finite."""
    gap = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
    return gap.nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def _randomness(call: Callable[[], Any]) -> bool:
    """Whether `call` draws random numbers."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    call()
    after = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return any(not torch.equal(a, b) for a, b in zip(states, after))


def steps_as_graphs(config: HNetConfig, ac: str = "none") -> str | None:
    """What a toy's steps as graphs do that its plain forward under autograd does not, in float64 on the CPU; or None.

    Compared are losses, F and G, and the gradient of every weight, to 1e-9, over two batches of other lengths.
    """
    pairs = [_batch(lengths, torch.device("cpu")) for lengths in BATCHES]
    try:
        model = equivalence.random_model(toy_config(config), 0, "cpu", torch.float64).train()
        plain = [_plain_step(model, pair) for pair in pairs]
        if _randomness(lambda: model(*pairs[0])):
            return "the model draws random numbers, which a graph would draw but once"
        again, _ = _plain_step(model, pairs[0])
        if changed := [name for name, x in again.items() if not torch.equal(x, plain[0][0][name])]:
            return f"{changed[0]} is another when a batch comes again, and a graph repeats what was captured"
        graphed = GraphedModel(model, torch.float64, ALPHA, ac=ac)
        for (losses, gradients), pair in zip(plain, pairs):
            if difference := _difference(*_graph_step(graphed, pair), losses, gradients):
                return difference
    except Exception as error:  # of code that somebody has changed: anything
        return _failure(error)
    return None


def _failure(error: Exception) -> str:
    return f"a toy of the config fails with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _difference(losses, gradients, wanted_losses, wanted_gradients) -> str | None:
    for name, wanted in wanted_losses.items():
        if name not in losses or _gap(losses[name], wanted) > EXACT:
            found = f"{losses[name].item():.6g}" if name in losses else "missing"
            return f"{name} is {found} in graphs and {wanted.item():.6g} by hnet_trainable.py"
    for name, wanted in wanted_gradients.items():
        if name not in gradients:
            return f"the weight {name} is not in the graphs' model"
        if (gap := _gap(gradients[name], wanted)) > EXACT:
            return f"the gradient of {name} differs by {gap:.1e} of its size"
    return None


def generation(config: HNetConfig) -> str | None:
    """The first layer in which a toy's prefill or steps differ from its forward, in float64 on the CPU; or None."""
    try:
        training = equivalence.random_model(toy_config(config), 0, "cpu", torch.float64).eval()
        inference = HNetInference.from_training(training)
        report = equivalence.check(training, inference, (b"", b"one, two", b"a longer line\n"), new_bytes=2)
    except Exception as error:
        return _failure(error)
    return report.first_disagreement

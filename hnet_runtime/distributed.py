"""Processes, devices and sharding: one path for one process on a CPU and for many GPUs (torchrun, FSDP2)."""

import functools
import hashlib
import inspect
import logging
import math
import os
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hnet_kernels import cards
from hnet_routers import Router
from hnet_runtime import UserError
from hnet_runtime.sharded import is_sharded, local_shard
from hnet_runtime.steps.flat_adamw import FlatAdamW
from hnet_trainable import HNetConfig, HNetLM, Isotropic, WideLinear, initial_weight

logger = logging.getLogger("hnet")
# It warns of in-place operations on results of a sharded module; there are none
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

PLAIN_FLOAT32 = ("A_log", "dt_bias", "D")  # a few elements per layer, which the recurrence needs in float32


class World(NamedTuple):
    """The processes of a run, and the rank of this one.

    mesh: one dimension, "shard", or two, ("replicate", "shard"): weights are sharded over the second and replicated
    over the first (HSDP). The ranks of a shard group are consecutive, so a group of the size of a node is a node.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """The number of ranks over which a weight is sharded."""
        return self.mesh.size(self.mesh.ndim - 1)


def start(device: str = "auto", replicate: int = 1, timeout: float = 600) -> World:
    """Joins the process group of torchrun, or creates one of this process alone, and chooses the device.

    device: `auto` (CUDA if torch has it), `cpu` or `cuda`. replicate: replicas of the weights (HSDP).
    timeout: seconds after which a collective operation fails.
    Raises UserError if the device does not exist or `replicate` does not divide the number of processes.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if size % replicate:
        raise UserError(f"--replicate {replicate}: expected a divisor of the number of processes, which is {size}")
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # sizes vary between steps, which would fragment fixed segments
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    require_device(device)
    if device == "auto" and not torch.cuda.is_available() and shutil.which("nvidia-smi") and rank == 0:
        logger.warning(
            "a GPU seems to be present, but this torch (%s) can't use it; continuing on the CPU", torch.__version__
        )
    cards.imitated()  # a wrong name ends the run before anything is started
    kind = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK {local_rank}: this machine has {torch.cuda.device_count()} GPUs; start fewer processes"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # After a restart by torchrun the agent's store still has the addresses of dead processes, which gloo would
            # try to reach (seen with torch 2.13). So each attempt has its own prefix in the store
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout))
            part = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            where = {"store": dist.PrefixStore(part, store), "rank": rank, "world_size": size}
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder; watchdog.py writes it out
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **where)
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    cards.start(place)
    return World(rank, size, place, make_mesh(kind, size, replicate))


def require_device(device: str) -> None:
    """Raises UserError if --device names a device that does not exist."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda: {'this torch is built without CUDA' if not torch.version.cuda else 'torch finds no GPU'}"
        )


def make_mesh(kind: str, size: int, replicate: int = 1) -> DeviceMesh:
    """The mesh of `World` for `size` processes on devices of a kind, `cpu` or `cuda`."""
    if replicate == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicate, size // replicate), mesh_dim_names=("replicate", "shard"))


def too_large_to_replicate(config: HNetConfig, world: World) -> str | None:
    """Why a model should be sharded instead of replicated on each process, or None; the same on every rank.

    A replica takes 8 bytes per parameter, for weights (see `FlatAdamW`) and float32 gradients, and its shard of 8 bytes
    for the moments. Half of a GPU's memory is left for activations.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in HNetLM(config).parameters())
    takes = (8 + 8 / world.size) * parameters
    has = cards.memory(world.device)[1] if world.device.type == "cuda" else math.inf
    (large,) = anywhere(world, takes > has / 2)
    return f"unsharded weights take {takes / 1e9:.0f} GB, more than half of a GPU's memory" if large else None


def check_same(about: Mapping[str, object], world: World) -> None:
    """Raises UserError on every rank, with rank and entry, unless all ranks were started with the same `about`."""
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, dict(about))
    for rank, theirs in enumerate(everyone):
        for key in about:
            if theirs.get(key) != everyone[0][key]:
                raise UserError(
                    f"rank {rank} was started with another {key} than rank 0: {theirs.get(key)}, not {everyone[0][key]}"
                )


def stop() -> None:
    """Leaves the process group. The barrier comes first: without it torch 2.13 sometimes aborts (after DCP saves)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def build_model(
    config: HNetConfig,
    world: World,
    compute_dtype: torch.dtype,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    reshard: bool = True,
    drawn: "Future[InitialWeights] | None" = None,
) -> HNetLM:
    """An HNetLM with float32 master weights that computes in `compute_dtype`, sharded (`shard_model`) if useful.

    It is built on the meta device. A weight depends only on (seed, name), so it is the same at any world size, or comes
    from `weights`, unsharded tensors by official name. A weight that `initial_weight` does not know has the value that
    `__init__` gave it, with torch's random numbers of `seed`. drawn: of `draw_ahead`, for one model.
    Raises UserError if the weights alone take more than the machine's memory.
    """
    if world.device.type == "cpu":
        _require_memory(config, world)
    with torch.device("meta"):
        model = HNetLM(config)
    _require_plain(model)
    if world.shards > 1 or compute_dtype != torch.float32:  # else nothing is gathered or cast
        _require_no_ties(model)
        shard_model(model, world.mesh, compute_dtype, reshard)
    tied = ties(model)
    model.to_empty(device=world.device)
    for name, first in tied.items():  # leaving the meta device makes new parameters, which must stay one
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(first))
    given = Given(config, seed)
    fill_other_tensors(model, given, world.device, weights or ())
    if weights:
        for name, tensor in model.state_dict().items():  # weights and persistent buffers
            assign(tensor, weights[name])
        return model
    ahead, unknown = drawn.result() if drawn else {}, []
    for name, value in ahead.items() or _draw(_shapes(model), config, seed):
        if value is None:
            unknown.append(name)
        else:
            assign(model.get_parameter(name), value)
    ahead.clear()  # frees their memory
    for name in unknown:
        assign(model.get_parameter(name), given.model.get_parameter(name).detach())
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        logger.info("%s%s: not in initial_weight; __init__ gives the first value", unknown[0], more)
    return model


def ties(model: nn.Module) -> dict[str, str]:
    """Each further name of a weight that has several -> its first name."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _require_no_ties(model: HNetLM) -> None:
    """Raises UserError for a weight in two places, of which FSDP2 makes two; but the embedding may be the head."""
    for name, first in ties(model).items():
        if (first, name) != ("embeddings.weight", "lm_head.weight"):
            raise UserError(
                f"{first} and {name} are one weight, of which FSDP2 would make two: train with unsharded weights "
                "(--replicate), and on a CPU in float32"
            )


def _require_plain(model: HNetLM) -> None:
    """Raises UserError for a parameter that is not float32, or has a hook: gradients are those of other tensors."""
    for name, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise UserError(f"{name}: is {p.dtype}; expected parameters in float32, from which a run makes the others")
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"{name}: a hook of a parameter does not run in training; change the gradient in an autograd function, "
                "or with a hook of its module"
            )


class Given:
    """What `__init__` of the model's modules gives their tensors, on the CPU. Built when it is first asked for."""

    def __init__(self, config: HNetConfig, seed: int):
        self.config, self.seed = config, seed

    @functools.cached_property
    def model(self) -> HNetLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return HNetLM(self.config)


InitialWeights = dict[str, Tensor | None]  # of each parameter; None where `initial_weight` has none


def draw_ahead(config: HNetConfig, world: World, seed: int) -> "Future[InitialWeights] | None":
    """Begins to draw the weights of `build_model` and to copy them to the GPU, while this process does something else.

    None where that would not help: on a CPU, and for sharded weights, as a GPU may not hold all of them.
    """
    if world.device.type == "cpu" or world.shards > 1:
        return None
    with torch.device("meta"):
        shapes = _shapes(HNetLM(config))

    def draw() -> InitialWeights:
        return {name: None if x is None else x.to(world.device) for name, x in _draw(shapes, config, seed)}

    return ThreadPoolExecutor(1, "draw").submit(draw)


def _shapes(model: HNetLM) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _draw(shapes: Mapping[str, torch.Size], config: HNetConfig, seed: int) -> Iterator[tuple[str, Tensor | None]]:
    """The name of each parameter with its initial value, drawn in threads. Each has its own generator, so the bits are
    the same.

    A few are drawn before they are asked for, so that not all are in the machine's memory at once.
    """
    threads = min(16, os.cpu_count() or 1)
    waiting: deque[tuple[str, Future[Tensor | None]]] = deque()
    with ThreadPoolExecutor(threads, "draw") as pool:
        for name, shape in shapes.items():
            waiting.append((name, pool.submit(initial_weight, name, shape, config, seed)))
            if len(waiting) > 2 * threads:
                name, value = waiting.popleft()
                yield name, value.result()
        for name, value in waiting:
            yield name, value.result()


def _require_memory(config: HNetConfig, world: World) -> None:
    count = config.count_parameters()
    needed, memory = 4 * count / world.shards, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"the model has {count:,} parameters, whose weights alone take {needed / 1e9:,.0f} GB per process; this "
            f"machine has {memory / 1e9:,.0f} GB of memory: choose a smaller config"
        )


def fill_other_tensors(model: HNetLM, given: Given, device: torch.device, weights: Container[str] = ()) -> None:
    """Gives buffers, and tensors that are attributes of modules, the values that `__init__` of their modules gave them.

    The meta device has no values. Our modules have no such tensors; those of a changed model may. weights: the names of
    those whose values come from a checkpoint. Raises UserError for others that `__init__` draws at random, if there is
    a checkpoint: it was trained with other values.
    """
    found = [
        (name, kind, key)
        for name, module in model.named_modules()
        for kind, tensors in (("_buffers", module._buffers), ("__dict__", vars(module)))
        for key, value in tensors.items()
        if isinstance(value, Tensor) and f"{name}.{key}".lstrip(".") not in weights
    ]
    if not found:
        return
    modules = dict(given.model.named_modules())
    drawn_again = dict(Given(given.config, given.seed + 1).model.named_modules()) if weights else modules
    for name, kind, key in found:
        value, again = (getattr(given_by[name], kind)[key] for given_by in (modules, drawn_again))
        if weights and not value.nan_to_num().equal(again.nan_to_num()):
            raise UserError(
                f"{f'{name}.{key}'.lstrip('.')}: __init__ draws it at random and the checkpoint does not have it; make "
                "it a persistent buffer (register_buffer)"
            )
        getattr(model.get_submodule(name), kind)[key] = value.to(device)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copies an unsharded `value` into a weight or buffer, sharded or not. All ranks have it, so nothing is sent."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # not above: see sharded.py

        value = distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(value)


def unsharded(parameter: Tensor) -> Tensor:
    """A parameter's full value, gathered from all ranks if it is sharded: then every rank must call this."""
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def shard_model(model: HNetLM, mesh: DeviceMesh, compute_dtype: torch.dtype, reshard: bool = True) -> None:
    """Applies FSDP2. Groups: BLOCKS_PER_GROUP blocks of a stack, a router, a float32 residual projection, the rest.

    Master weights, gradients and their reduction are float32; weights are gathered in `compute_dtype`. Inputs are not
    cast: the residual stream stays float32 across blocks. A_log, dt_bias and D, a few elements per layer, and scalars
    stay unsharded and float32 on every rank; `reduce_plain_gradients` averages their gradients.

    reshard: free a group's gathered weights after its forward and gather them again for its backward.

    A single process has nothing to gather. There a group is a full stack of blocks, which saves most of the hooks'
    time, and weights stay in `compute_dtype` until the backward has used them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # not above: see sharded.py

    plain = {p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in PLAIN_FLOAT32 or not p.ndim}
    alone = mesh.size() == 1

    def wrap(module: nn.Module | list[nn.Module], dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        keep = {"reshard_after_forward": False} if alone or not reshard else {}
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=plain, **keep)

    order = list(groups_in_order(model, alone))
    for group in order:
        wrap(group, torch.float32 if isinstance(group[0], WideLinear) else compute_dtype)
    wrap(model, compute_dtype)
    if alone:
        # all casts at once, before the first stage waits for its boundaries, while the device is busy
        stacks = [group[0] for group in order if isinstance(group[0], Isotropic)]

        def unshard_all(*_) -> None:
            for stack in stacks:
                stack.unshard()

        model.register_forward_pre_hook(unshard_all)
        return
    # Each group prefetches the next one's weights before it computes. FSDP does so only in the backward. In the forward
    # it relies on the CPU running ahead, which is impossible where a stage waits for its number of chunks.
    for group, following in zip(order, order[1:]):
        group[0].set_modules_to_forward_prefetch([following[0]])


BLOCKS_PER_GROUP = 4  # 0.4 GB in bfloat16 for XL's main network; with smaller groups the CPU is the limit


def block_groups(stack: Isotropic) -> list[list[nn.Module]]:
    """The blocks of a stack, by group."""
    layers = list(stack.layers)
    return [layers[i : i + BLOCKS_PER_GROUP] for i in range(0, len(layers), BLOCKS_PER_GROUP)]


def groups_in_order(model: nn.Module, whole_stacks: bool = False) -> Iterator[list[nn.Module]]:
    """The groups of modules of `shard_model` without the root, in the order of the forward, in which HNet makes them.

    whole_stacks: a group is a full stack of blocks, and routers belong to the root.
    """
    for module in model.modules():
        if isinstance(module, Isotropic):
            yield from [[module]] if whole_stacks else block_groups(module)
        elif isinstance(module, WideLinear) or (isinstance(module, Router) and module.is_learned and not whole_stacks):
            yield [module]


class Traffic(NamedTuple):
    """Bytes that each rank sends per step with ring algorithms."""

    gathers: float  # weights, within a shard group
    scatters: float  # gradients, within a shard group
    replicas: float  # gradients of shards, between replicas


def traffic(config: HNetConfig, shards: int, replicate: int = 1, slices: int = 1, weight_bytes: int = 2) -> Traffic:
    """The traffic of `shard_model` for `slices` micro-batches per rank, computed from the sizes of the weights.

    A ring over n ranks sends (n - 1) / n of what is gathered or scattered, and twice that for an all-reduce. Weights
    are gathered in `weight_bytes` (residual projections in 4) for the forward and for the backward of every slice; the
    root group stays gathered. Gradients are sent once per step in float32. A_log, dt_bias and D are left out.
    """
    with torch.device("meta"):
        model = HNetLM(config)
    groups = {id(p) for group in groups_in_order(model) for module in group for p in module.parameters()}
    gathered, total = 0, 0
    for name, p in model.named_parameters():
        if name.rsplit(".", 1)[-1] not in PLAIN_FLOAT32:
            total += p.numel()
            times = slices * (2 if id(p) in groups else 1)
            gathered += times * p.numel() * (4 if "residual_proj" in name else weight_bytes)
    part, across = (shards - 1) / shards, 2 * (replicate - 1) / replicate
    return Traffic(part * gathered, part * 4 * total, across * 4 * total / shards)


def reduce_plain_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Averages the gradients of unsharded parameters over all ranks, as FSDP does for sharded ones."""
    grads = [p.grad for p in parameters if not is_sharded(p) and p.grad is not None]
    if world.size == 1 or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads]) / world.size
    dist.all_reduce(flat)
    for grad, piece in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(piece.view_as(grad))


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """The seed of what a model draws in a step, such as dropout: another one in each step and process of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little") >> 1


def check_groups(groups: list[dict], model: nn.Module, source: str = "parameter_groups") -> None:
    """Raises UserError unless each weight of `model` that trains is in one group, and each group has a stage."""
    counts = Counter(p for group in groups for p in group["params"])
    for name, p in model.named_parameters():
        if p.requires_grad and counts[p] != 1:
            raise UserError(
                f"{source}: {name} is in {counts[p]} groups; expected one; requires_grad_(False) freezes it"
            )
    if any(group.get("stage") is None for group in groups):
        raise UserError(f"{source}: a group has no `stage`; expected the stage to whose statistics it belongs")


def check_optimizer(made: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises UserError unless `make_optimizer` returned an optimizer of all weights, whose arguments take effect."""
    kind = type(made).__name__
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"make_optimizer returns a {kind}; expected one torch.optim.Optimizer")
    check_groups(made.param_groups, model, "make_optimizer")
    if any("lr" not in group for group in made.param_groups):
        raise UserError("make_optimizer: a group has no `lr`; expected its peak, which train.py multiplies")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise UserError(f"make_optimizer: {kind} needs a closure; expected an optimizer that needs gradients alone")
    arguments = inspect.signature(type(made)).parameters
    for key in ("lr", "weight_decay"):
        given = made.defaults.get(key)
        if key not in arguments or given is None or given == arguments[key].default:
            continue
        if all(group.get(key) != given for group in made.param_groups):
            raise UserError(
                f"make_optimizer: {key}={given} of {kind} has no effect, because each group has its own; expected it "
                f"as --{key.replace('_', '-')} or in the groups"
            )


def optimizer_groups(groups: list[dict]) -> list[dict]:
    """The groups of `parameter_groups`, with sharded and unsharded parameters apart: no fused kernel takes both."""
    apart = []
    for group in groups:
        for sharded in (True, False):
            chosen = [i for i, p in enumerate(group["params"]) if is_sharded(p) == sharded]
            if chosen:
                lists = {key: [group[key][i] for i in chosen] for key in ("params", "names") if key in group}
                apart.append(group | lists)
    return apart


@torch.no_grad()
def grad_norm(parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """The global norm of all gradients, on the device, without waiting for it."""
    grads = [p.grad for p in parameters if p.grad is not None]
    shards = _squares([local_shard(g) for g in grads if is_sharded(g)], world)
    if world.shards > 1:  # over one replica: with HSDP, other ranks have the same shards
        dist.all_reduce(shards, group=world.mesh.get_group("shard"))
    return (shards + _squares([g for g in grads if not is_sharded(g)], world)).sqrt()


def _squares(tensors: list[Tensor], world: World) -> Tensor:
    if not tensors:
        return torch.zeros((), device=world.device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


@torch.no_grad()
def clip_in_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    world: World,
    loss: Tensor | float = 0.0,
) -> Tensor:
    """Makes the next `clipped_step` of an optimizer clip the gradients to a global norm of `max_norm` (0: no clipping).

    Returns the norm before clipping, on the device. A step whose norm or loss is not finite changes no weight and no
    state, so the host need not wait for them first.
    """
    norm = optimizer.grad_norm() if isinstance(optimizer, FlatAdamW) else grad_norm(parameters, world)
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else torch.ones_like(norm)
    optimizer.found_inf = (~(norm + loss).isfinite()).float()
    return norm


class Fetched:
    """A small tensor that is being copied to the host, which does not wait."""

    def __init__(self, values: Tensor):
        self._arrived = None
        if values.device.type != "cuda":
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def numbers(self) -> Tensor:
        """Waits for the tensor and returns it, on the host."""
        if self._arrived:
            self._arrived.synchronize()
        return self._values


def anywhere(world: World, *flags: bool) -> list[bool]:
    """For each flag, whether it is true on any rank; the same on every rank."""
    if world.size == 1:
        return list(flags)
    asked = torch.tensor(flags, dtype=torch.float32)  # on the host, so that nothing waits for a GPU
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    return asked.bool().tolist()


def first_answer(world: World, answer: str | None) -> str | None:
    """The answer of the lowest rank that has one; every rank gets the same."""
    if world.size == 1:
        return answer
    answers: list[str | None] = [None] * world.size
    dist.all_gather_object(answers, answer)
    return next((found for found in answers if found), None)


def gather_slices(values: Tensor, world: World) -> Tensor:
    """Values of this rank's n slices, (n, K) -> those of all slices of the step, (n * size, K), in their order.

    Rank r of W has slices r, r + W, ... Results computed from them are the same for any number of processes.
    """
    if world.size == 1:
        return values
    everyone = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(everyone, values)
    return torch.stack(everyone, dim=1).flatten(0, 1)


def imbalance(per_slice: Tensor, world: World) -> Tensor:
    """How unevenly work is divided between ranks that wait for each other: (G, S) from `gather_slices` -> (S,).

    Slices W i to W i + W - 1 run at the same time, one per rank: the largest count over their mean, averaged over i.
    1: even; 1.2: ranks wait for one with a fifth more than the mean.
    """
    side_by_side = per_slice.unflatten(0, (-1, world.size))
    return (side_by_side.amax(1) / side_by_side.mean(1)).mean(0)

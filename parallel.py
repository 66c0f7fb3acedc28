"""Many ranks: FSDP2, which divides weights, gradients and optimizer state among them; and how much memory a rank needs.

Sharded are all parameters but those that route: a routing decision is a comparison, so routers stay whole on every rank,
in float32, and their few gradients are averaged here. That is also what lets them be scalars, which cannot be sharded.
"""

import itertools
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from blocks import Kept
from kernels import loss_memory
from optimizer import OPTIMIZER_BYTES

STARTS = itertools.count()  # of groups, in this process


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this rank on its machine, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start_ranks(backend: str | None = None):
    """Joins the other ranks where torchrun has started this program, and does nothing elsewhere."""
    if "RANK" not in os.environ:
        return
    # torchrun's store still holds the addresses of the ranks before a restart, and of an earlier group of these ranks.
    prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(STARTS)}"
    store = dist.PrefixStore(prefix, next(dist.rendezvous("env://"))[0])
    backend = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    number, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=number, world_size=ranks)


def say(text: str):
    """A line on stderr, once for all ranks, above a progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def from_main(value):
    """What the main rank holds, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def of_all(value) -> list:
    """What each rank holds, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def all_reduce(tensor: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or another reduction) over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def shard(model, device, dtype, offload):
    """Divide a model on the meta device among the ranks, and give each its part, empty: weights are yet to be read.

    Blocks are gathered one at a time where they run, in `dtype`; the weights themselves, the gradients' sums
    and the optimizer stay in float32. offload: these live in CPU memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    # A layer's scores are views, in Notes; nobody writes to them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    options = {
        "mesh": dist.init_device_mesh(device.type, (world(),)),
        "ignored_params": {p for name, p in model.named_parameters() if model.is_router(name)},
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # it would round positions and surprises too
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)  # embedding, last norm and head: whole from forward to backward
    model.to_empty(device="cpu" if offload else device)
    if offload:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if model.is_router(name):  # what is not sharded stays with the computation
                tensor.data = tensor.data.to(device)


def reshard(model):
    """After a forward pass that no backward pass follows: FSDP has left embedding and head whole, in tensors that it will throw
    away, and an optimizer that is made now would train those.
    """
    if hasattr(model, "reshard"):
        model.reshard()


def is_sharded(tensor):
    return hasattr(tensor, "to_local")


def average_whole(model):
    """The mean over the ranks of the gradients that FSDP does not exchange, those of the routers."""
    grads = [p.grad for p in model.parameters() if p.grad is not None and not is_sharded(p)]
    if grads:
        mean = all_reduce(parameters_to_vector(grads)) / world()  # one exchange for all
        vector_to_parameters(mean, grads)


def clip_grad_norm(parameters, max_norm, device):
    """torch's clip_grad_norm_ where some parameters are sharded and some are not. Returns the norm of all, on `device`."""
    parameters = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in parameters if is_sharded(p) == kind] for kind in (True, False)]
    norms = [get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
    norms = torch.stack([(norm.full_tensor() if is_sharded(norm) else norm).to(device) for norm in norms])
    norm = norms[0] if len(norms) == 1 else norms.norm()
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def activations(model, cfg, dtype: torch.dtype, device: str) -> float:
    """Bytes that the backward pass of a micro-batch keeps, without the loss: what autograd saves of each layer."""
    residual = dtype.itemsize if cfg.parallel == "fsdp" else 4  # autocast leaves the residual stream alone
    layers = [layer.activations(Kept(dtype, residual, cfg.seq_len, device)) for layer in model.model.layers]
    kept = sum(layers)
    if cfg.gradient_checkpointing:
        kept = len(layers) * residual * model.config.hidden_size + max(layers)
    return cfg.batch_size * cfg.seq_len * kept


def memory(model, cfg, ranks: int, micro_steps: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Estimated bytes that one rank holds at the peak of a training step, by what holds them. device: its type."""
    n = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.itemsize for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_layers = sum(p.numel() for p in model.model.layers.parameters())
    sharded, share = cfg.parallel == "fsdp", 1.0
    working = held - 2 * n if dtype.itemsize == 2 else 0  # autocast's copies, of what is in float32
    if sharded:
        share = 0.0 if cfg.offload else 1 / ranks
        ends, block = n - in_layers, in_layers / len(model.model.layers)  # embedding, head, last norm
        working = dtype.itemsize * (ends + 2 * block)  # gathered: the one that runs and the next
    # Between two exchanges of gradients a sharded model's are whole on every rank.
    gradients = 4 * trained * (1 if sharded and micro_steps > 1 else share)
    return {
        "weights": held * share + working,
        "gradients": gradients,
        "optimizer": OPTIMIZER_BYTES * trained * share,
        "activations": activations(model, cfg, dtype, device),
        "loss": loss_memory(cfg.batch_size * cfg.seq_len, model.head_weight, dtype, device, bool(cfg.distill_from)),
    }

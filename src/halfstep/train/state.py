"""What training moves: a network, its fp32 weights, their moving average, the optimizer and the loss scale.

Nothing here waits for the device; numbers that tell how it went stay there until someone reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import get_ema_multi_avg_fn

from halfstep.errors import InputError, some
from halfstep.models.family import Network, StateDict
from halfstep.precision import LossScale, PrecisionPolicy, prepare, tf32, torch_dtype
from halfstep.precision.health import own_part

_DDP_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters


@dataclass(frozen=True)
class Updates:
    """How weights are moved. learning_rate: after `warmup_steps` of a linear rise. clip_norm: of gradients, infinite
    for none. ema_decay: of the moving average. sharded: over processes, by FSDP. compiled: by torch.compile.
    recomputed: the share of blocks whose activations are computed again in the backward pass."""

    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0
    clip_norm: float = float("inf")
    ema_decay: float = 0.9999
    sharded: bool = False
    compiled: bool = False
    recomputed: float = 0.0


class TrainState:
    """Made from a network with fp32 weights, which it prepares for `policy` in place.

    network: computes, in the policy's types. model: the same with what stands before it between processes. weights:
    fp32 by name, what the optimizer moves; the network's own parameters, or copies where those are half (Micikevicius
    et al. 2018, "Mixed Precision Training"). ema: fp32, as are the moments of the optimizer. With `updates.sharded`
    all of them are sharded.
    """

    def __init__(self, network: Network, policy: PrecisionPolicy, updates: Updates, device: torch.device) -> None:
        self.device, self.policy, self._rule = device, policy, updates
        self.network = network.to(device).train()
        keep_all = policy.params != "fp32"
        full = {n: p.detach().clone() for n, p in network.named_parameters() if keep_all or not p.requires_grad}
        blocks = list(network.blocks)
        network.recomputed_blocks = round(updates.recomputed * len(blocks))
        # One memory format for weights, moments and average: the fused optimizer goes through them side by side.
        prepare(network, policy, channels_last=False)
        self.model: nn.Module = network
        if dist.is_initialized() and updates.sharded:
            self._shard(blocks)
        elif dist.is_initialized():
            self.model = _data_parallel(network, policy, device)
        if updates.compiled:
            self.model.compile()
        self._own = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.weights: dict[str, torch.Tensor] = {
            name: p if p.dtype == torch.float32 else _like(full[name], p).requires_grad_()
            for name, p in self._own.items()
        }
        self._copied = [name for name, weight in self.weights.items() if weight is not self._own[name]]
        self.fixed = {name: value for name, value in full.items() if name not in self._own}
        self.ema = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._average = get_ema_multi_avg_fn(updates.ema_decay)  # type: ignore[no-untyped-call]
        # In one kernel, and the only one that can leave an update out without asking the host.
        self.optimizer = AdamW(
            self.weights.values(), lr=updates.learning_rate, weight_decay=updates.weight_decay, fused=True
        )
        self.scale = LossScale(policy, device)

    @property
    def step(self) -> int:
        """How many steps were made."""
        return self.scale.steps

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch: gradients travel between processes with a step's last."""
        synced: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            synced = self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with synced, tf32(self.policy.compute == "tf32"):  # the backward pass is outside the network's own call
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients."""
        self.scale.backward(loss)

    def update(self) -> None:
        """Move the weights by the gradients, and the average by the weights.

        A gradient that is not finite moves nothing: see `LossScale`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._rule.learning_rate * min(1.0, (self.step + 1) / max(1, self._rule.warmup_steps))
        for name in self._copied:
            gradient, self._own[name].grad = self._own[name].grad, None
            self.weights[name].grad = None if gradient is None else gradient.float()
        self.scale.step(self.optimizer, self._rule.clip_norm)
        self.optimizer.zero_grad()
        self._write_copies()
        self._average(list(self.ema.values()), list(self.weights.values()), 0)

    def switch_to_bf16(self) -> None:
        """Go on with products in bf16, which need no loss scale."""
        self.policy = self.scale.to_bf16(self.network)

    def full_weights(self) -> StateDict:
        """fp32 weights by the published names, on the CPU; every process must ask, process 0 gets them."""
        return {**_gathered(self.weights), **_gathered(self.fixed)}

    def full_ema(self) -> StateDict:
        """The moving average, likewise."""
        return {**_gathered(self.ema), **_gathered(self.fixed)}

    def full_moments(self) -> StateDict:
        """The optimizer's moments, likewise, as `exp_avg.NAME` and `exp_avg_sq.NAME`; none before the first update."""
        moments: StateDict = {}
        for name, weight in self.weights.items():
            kept = self.optimizer.state.get(weight, {})
            moments |= {f"{moment}.{name}": kept[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in kept}
        return _gathered(moments)

    @property
    def updates(self) -> int:
        """How often the optimizer has moved the weights: skipped updates do not count. Waits for the device."""
        kept = next(iter(self.optimizer.state.values()), None)
        return 0 if kept is None else int(kept["step"])

    def restore(self, ema: StateDict, moments: StateDict, updates: int, where: Path) -> None:
        """Put back an average that fits the network, whose weights are there, and moments of all weights, or none.
        Raises InputError naming `where` when moments are missing or of another shape."""
        if moments:
            names = [f"{moment}.{name}" for name in self.weights for moment in ("exp_avg", "exp_avg_sq")]
            wrong = [n for n in names if n not in moments or moments[n].shape != ema[n.partition(".")[2]].shape]
            if wrong:
                raise InputError(f"{where}: the optimizer's {some(wrong, 3)} are missing or of another shape")
        with torch.no_grad():
            for name, average in self.ema.items():
                average.copy_(_like(ema[name], average))
        if not moments:
            return
        state = {
            number: {
                "step": torch.tensor(float(updates)),
                **{m: _like(moments[f"{m}.{name}"], self.weights[name]) for m in ("exp_avg", "exp_avg_sq")},
            }
            for number, name in enumerate(self.weights)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _write_copies(self) -> None:
        if not self._copied:
            return
        own, weights = ([own_part(values[name]) for name in self._copied] for values in (self._own, self.weights))
        with torch.no_grad():
            torch._foreach_copy_(own, weights)

    def _shard(self, blocks: list[Any]) -> None:
        """FSDP2 (Zhao et al. 2023, "PyTorch FSDP"). A module that is called on its own is gathered on its own."""
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        reduce = MixedPrecisionPolicy(reduce_dtype=torch_dtype(self.policy.reduce), cast_forward_inputs=False)
        kept = [m for name in self.network.keep_in_fp32 if isinstance(m := getattr(self.network, name), nn.Module)]
        for module in [*kept, *(part for block in blocks for part in (block.adaLN_modulation, block))]:
            fully_shard(module, mesh=mesh, mp_policy=reduce)
        fixed = {p for p in self.network.parameters() if not p.requires_grad}
        fully_shard(self.network, mesh=mesh, mp_policy=reduce, ignored_params=fixed)


def _data_parallel(network: nn.Module, policy: PrecisionPolicy, device: torch.device) -> DistributedDataParallel:
    devices = [device.index] if device.type == "cuda" else None
    # The newer name of the same: buffers, which are constants here, do not travel in each step.
    name = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_ARGUMENTS else "broadcast_buffers"
    unsynced: dict[str, Any] = {name: False}
    model = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True, **unsynced)
    if policy.reduce != policy.params:
        reduce, size = torch_dtype(policy.reduce), dist.get_world_size()
        model.register_comm_hook(None, lambda _, bucket: _mean(bucket, reduce, size))
    return model


def _mean(bucket: Any, reduce: torch.dtype, size: int) -> Any:
    """A future of the bucket's gradients averaged over processes in the type `reduce`."""
    work: Any = dist.all_reduce(bucket.buffer().to(reduce).div_(size), async_op=True)
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def _like(full: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """fp32 values of a whole tensor, placed and sharded as `pattern` is."""
    value = full.detach().to(pattern.device, torch.float32)
    if isinstance(pattern, DTensor):
        return distribute_tensor(value, pattern.device_mesh, pattern.placements)
    return value.clone()


def _gathered(values: StateDict) -> StateDict:
    """Whole tensors on the CPU; one at a time, so that no device holds more than one of them."""
    whole = {}
    leads = not dist.is_initialized() or dist.get_rank() == 0
    for name, value in values.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if leads:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole

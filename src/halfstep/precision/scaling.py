"""LossScale: gradients of fp16 that neither vanish nor poison the weights, in any loop, with any optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Optimizer

from halfstep.errors import InputError, some
from halfstep.precision.apply import _Prepared, change_compute
from halfstep.precision.policy import PrecisionPolicy

COLLAPSE = 20  # updates left out in a row: a dynamic scale has fallen by 2^20, from 65536 to below one

_STATE = ("scaler", "skipped", "skipped_in_row", "switched_at", "step")


class LossScale:
    """Scales the loss as a policy says, and moves the weights by gradients that are finite (Micikevicius et al. 2018,
    "Mixed Precision Training", section 3.2). For one optimizer; `device` is that of its weights.

        scale = LossScale(policy, "cuda")
        for batch in batches:
            scale.backward(loss_of(network, batch))
            scale.step(optimizer, clip_norm=1.0)
            optimizer.zero_grad()

    An update whose gradients are not finite is left out and counted, whatever the scale is: "dynamic" (from 65536;
    halved then, doubled after 2000 good updates), fixed, or none. Where the range of fp16 cannot be the reason, none is
    applied any more, so that the weights are still those that the failure can be found with: see `find_failure`.

    steps: updates asked for, those left out among them. grad_norm: of the newest gradients, unscaled and before
    clipping. skipped, skipped_in_row: updates left out. first_bad_step: the number, from 0, of the first step whose
    loss (under a scale) or gradients (without) are not finite, or -1; filling in -1 lets training go on. These four
    are tensors without dimensions on the device; nothing waits for it but what says so. switched_at: the step at which
    fp16 was given up, or None.

    Where torch.distributed is initialized, all processes step together. Raises InputError for a policy that is auto.
    """

    def __init__(self, policy: PrecisionPolicy, device: str | torch.device) -> None:
        if policy.is_auto:
            raise InputError(
                "loss scale: got auto, which is not decided yet; take settle(policy, device, 'train').policy"
            )
        self._device = torch.device(device)
        self.steps = 0
        self.switched_at: int | None = None
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        self._follow(policy)

    @property
    def factor(self) -> float | None:
        """What the loss is multiplied by; None without a scale. Waits for the device."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    @property
    def may_overflow(self) -> bool:
        """Whether fp16 under a loss scale can explain a step that is not finite."""
        return self._scaler.is_enabled() and self.policy.compute == "fp16"

    @property
    def collapsed(self) -> bool:
        """Whether so many updates in a row were left out that nothing is learned any more. Waits for the device."""
        return self._scaler.is_enabled() and int(self.skipped_in_row) >= COLLAPSE

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, scaled, to those that are there. Of a step's micro-batches each has its call."""
        self._bad_loss |= ~torch.isfinite(loss.detach())
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, clip_norm: float = float("inf")) -> torch.Tensor:
        """Unscale the gradients, clip their norm, and let `optimizer` move its weights where all are finite. Returns
        whether it did, a bool tensor on the device.

        An optimizer with `fused=True` leaves an update out by itself. Any other is not called then, for which the host
        waits for the device, as GradScaler does. Raises InputError for weights in fp16.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if self._scaler.is_enabled() and any(w.grad is not None and w.grad.dtype is torch.float16 for w in weights):
            raise InputError(
                "loss scale: the optimizer moves fp16 weights, where unscaled gradients vanish; use 16-mixed, or give "
                "it fp32 copies"
            )
        self._scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, clip_norm)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of weights that are sharded
        finite = torch.isfinite(self.grad_norm)
        bad = self._bad_anywhere() if self._scaler.is_enabled() else ~finite
        self.first_bad_step = torch.where((self.first_bad_step < 0) & bad, self.steps, self.first_bad_step)
        applied = finite & ((self.first_bad_step < 0) | self.may_overflow)
        if _leaves_out(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, (~applied).float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif applied:
            optimizer.step()
        self._scaler.update(self._fixed)
        self.skipped += ~finite
        self.skipped_in_row = torch.where(finite, 0, self.skipped_in_row + 1)
        self._bad_loss.zero_()
        self.steps += 1
        return applied

    def to_bf16(self, module: nn.Module) -> PrecisionPolicy:
        """Let a prepared module go on with products in bf16, which need no loss scale, and return that policy. Raises
        InputError when `module` is not prepared, or when it is not fp16 that overflows."""
        if not self.may_overflow:
            raise InputError(
                f"loss scale: {self.policy} has no fp16 under a loss scale to give up; nothing was changed"
            )
        if not any(isinstance(part, _Prepared) for part in module.modules()):
            raise InputError(f"loss scale: {type(module).__name__} is not prepared; give what prepare() returned")
        policy = replace(self.policy, compute="bf16", loss_scale=None)
        change_compute(module, policy)
        self._follow(policy)
        self.switched_at = self.steps
        self.skipped_in_row.zero_()
        return policy

    def state_dict(self) -> dict[str, Any]:
        """Plain values to go on from. `policy`, as text, is the one to prepare the module in then: it is another after
        `to_bf16`. Waits for the device."""
        return {
            "policy": str(self.policy),
            "step": self.steps,
            "scaler": self._scaler.state_dict(),
            "skipped": int(self.skipped),
            "skipped_in_row": int(self.skipped_in_row),
            "switched_at": self.switched_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. The policy stays this one's; a scale is taken over where both have one.
        Raises InputError when values are missing."""
        if missing := [name for name in _STATE if name not in state]:
            raise InputError(f"loss scale: the state lacks {some(missing)}; expected what state_dict() gives")
        self.steps, self.switched_at = state["step"], state["switched_at"]
        self.skipped.fill_(state["skipped"])
        self.skipped_in_row.fill_(state["skipped_in_row"])
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _follow(self, policy: PrecisionPolicy) -> None:
        scale = policy.loss_scale
        self.policy = policy
        self._fixed = float(scale) if isinstance(scale, (int, float)) else None
        initial = 2.0**16 if self._fixed is None else self._fixed
        self._scaler = torch.amp.GradScaler(self._device.type, init_scale=initial, enabled=scale is not None)

    def _bad_anywhere(self) -> torch.Tensor:
        """Whether any process's loss of this step is not finite."""
        if dist.is_initialized():
            everywhere = self._bad_loss.float()
            dist.all_reduce(everywhere, dist.ReduceOp.MAX)
            return everywhere > 0
        return self._bad_loss


def _leaves_out(optimizer: Optimizer) -> bool:
    """Whether `optimizer` reads `found_inf` on the device and then moves nothing."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    # Left out, the first update of torch's fused SGD would leave a momentum that nobody wrote to.
    return not isinstance(optimizer, SGD) or all(
        not group["momentum"] or weight.grad is None or "momentum_buffer" in optimizer.state.get(weight, {})
        for group in optimizer.param_groups
        for weight in group["params"]
    )

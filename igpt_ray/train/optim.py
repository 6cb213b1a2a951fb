"""Optimisers, and the learning rate as a pure function of the step.

The paper uses Adam. The modern presets use Muon (Jordan et al. 2024) for the matrices inside the blocks and Adam for
embeddings, output layer and gains.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Adam, Optimizer

from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train.config import OptimConfig

MOMENTUM = 0.95
"""Nesterov momentum of Muon; the value of its authors and of torch."""
QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration, chosen by Muon's authors to increase small singular values quickly: five
iterations bring all of them to 0.7 to 1.2."""
ROUNDS = 5
MATRICES = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1}
"""Layers of a block whose weights Muon updates -> matrices in a weight: c_attn has those of q, k and v."""


def build(model: nn.Module, optim: OptimConfig, precision: str = "float32") -> Optimizer:
    """Adam, or Muon if `optim.muon_lr` is set. `precision` is the type of Muon's matrix products: in bfloat16, the last
    bit of a gradient, which depends on the number of workers, may change a step by 1 %."""
    fused = (
        True if next(model.parameters()).is_cuda else None
    )  # one kernel, instead of about ten that write temporaries
    optimizer: Optimizer
    if optim.muon_lr is None:
        optimizer = Adam(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    else:
        optimizer = Muon(cast(ImageGPT, model), optim, getattr(torch, precision), fused)

    def keep_implementation(_: Optimizer, state: dict[str, Any]) -> None:
        """A checkpoint's choice is that of the device it was written on."""
        for group in state["param_groups"]:
            group["fused"] = fused

    optimizer.register_load_state_dict_pre_hook(keep_implementation)
    return optimizer


class Muon(Adam):
    """Muon for the groups with `parts`, whose matrices have equal shapes; Adam for the group without.

    torch.optim.Muon processes whole matrices one at a time. Here the matrices of all layers are one batch, and with
    sharding each rank orthogonalises its share of the layers: two collectives, and no duplicated work.
    """

    def __init__(self, model: ImageGPT, optim: OptimConfig, dtype: torch.dtype, fused: bool | None = None):
        assert optim.muon_lr is not None
        muon = {"lr": optim.muon_lr, "lr_ratio": optim.muon_lr / optim.lr}
        groups: list[dict[str, Any]] = []
        for name, parts in MATRICES.items():
            matrices = [block.get_submodule(name).weight for block in model.blocks]
            groups.append({"params": matrices, "parts": parts, **muon})
        rest = [p for name, p in model.named_parameters() if not name.endswith(tuple(f"{m}.weight" for m in MATRICES))]
        groups.append({"params": rest, "parts": 0, "lr": optim.lr, "lr_ratio": 1.0})
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Skips Adam's conversion of old states, which expects a step count in every state."""
        Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the matrices by Muon and clear their gradients; Adam updates the other parameters."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            if group["parts"] and matrices:
                updates = orthogonal([self._momentum(p).to(self.dtype) for p in matrices], group["parts"])
                skipped = self._skipped
                for p, update in zip(matrices, updates, strict=True):
                    update = update if skipped is None else torch.where(skipped, 0, update)
                    local(p).add_(update.to(p.dtype), alpha=-group["lr"])
                    p.grad = None
        super().step(closure)

    def _momentum(self, p: Tensor) -> Tensor:
        """Nesterov momentum of `p`, sharded as `p`."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum, gradient, skipped = local(state["momentum"]), local(p.grad), self._skipped
        if skipped is not None:
            gradient = torch.where(skipped, momentum, gradient)
        momentum.lerp_(gradient, 1 - MOMENTUM)
        return p.grad.lerp(state["momentum"], MOMENTUM)

    @property
    def _skipped(self) -> Tensor | None:
        """Whether `step_if_finite` skips this step, decided on the device; None if it decides on the host."""
        return self.found_inf > 0 if hasattr(self, "found_inf") else None


def orthogonal(matrices: list[Tensor], parts: int) -> list[Tensor]:
    """Approximately orthogonal matrices nearest to `matrices` (rows, columns), made of `parts` stacked by rows.

    Tall parts are scaled by sqrt(rows / columns) (Muon's reference code). Matrices with `Shard(0)`, as FSDP makes them,
    are redistributed by layer for the computation and back.
    """
    first = matrices[0]
    stacked = torch.stack([local(m) for m in matrices])  # (L, rows here, columns)
    if not isinstance(first, DTensor):
        return list(_orthogonal(stacked, parts))
    mesh, shape = first.device_mesh, torch.Size([len(matrices), *first.shape])
    by_rows = [Shard(1) if isinstance(p, Shard) else p for p in first.placements]
    by_layer = [Shard(0) if isinstance(p, Shard) else p for p in first.placements]
    strides = (shape[1] * shape[2], shape[2], 1)
    rows = DTensor.from_local(stacked, mesh, by_rows, run_check=False, shape=shape, stride=strides)
    mine = _orthogonal(rows.redistribute(placements=by_layer).to_local(), parts)
    layers = DTensor.from_local(mine, mesh, by_layer, run_check=False, shape=shape, stride=strides)
    return list(layers.redistribute(placements=by_rows).to_local())


def _orthogonal(x: Tensor, parts: int) -> Tensor:
    """Newton-Schulz iterations on a batch of matrices: (L, rows, columns)."""
    whole = x.shape
    x = x.reshape(whole[0] * parts, whole[1] // parts, whole[2])
    tall = x.shape[1] > x.shape[2]
    scale = max(1, x.shape[1] / x.shape[2]) ** 0.5
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # no singular value above 1
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return scale * (x.mT if tall else x).reshape(whole)


def local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def lr_at(step: int, optim: OptimConfig) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up to the peak, then `schedule`; the paper's (section 3.3) is
    cosine decay to zero."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "warmup_stable_decay":
        return optim.lr * min(1.0, max(0.0, (optim.steps - step) / (optim.decay_fraction * optim.steps)))
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_if_finite(optimizer: Optimizer, lr: float, total: Tensor) -> None:
    """Update the weights at learning rate `lr` and clear the gradients; without any change if `total` is not finite.

    With fused Adam (on a GPU) the device decides, so that the update is queued while the host still waits for `total`.
    """
    if optimizer.defaults["fused"]:
        skipped = (~total.isfinite()).to(torch.float32)
        optimizer.grad_scale, optimizer.found_inf = None, skipped  # type: ignore[attr-defined]  # read by fused Adam
    elif not total.isfinite():
        return
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set Adam's learning rate to `lr`, and Muon's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1)

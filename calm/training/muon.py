"""Muon for weight matrices and AdamW for everything else, as one optimizer.

A small CALM learns about twice as much from a step: its early plateau is shorter, and batches may
be larger. Muon replaces the gradient of a matrix by the nearest matrix with equal singular values,

    M <- μ M + G,    W <- W - lr (0.2 √max(rows, columns) · orthogonal(G + μ M) + weight_decay · W)

with five Newton-Schulz steps for ``orthogonal``. The factor gives updates of the size that AdamW's
have (Liu et al. 2025, arXiv 2502.16982), so rates of the two are comparable. Source of the method:
K. Jordan, "Muon" (2024).

`torch.optim.Muon` updates one matrix after the other and always in bfloat16, which is slow on
processors without bfloat16 units. Here matrices of equal shape are updated by one batched matmul,
in float32 on such processors.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from calm.training.precision import has_bfloat16_units

__all__ = ["MuonAdamW", "orthogonal"]

STEPS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
UPDATE_SIZE = 0.2  # root mean square of an AdamW update
TINY = 1e-7


class MuonAdamW(Optimizer):
    """Muon on `matrices`, fused AdamW on `others`.

    Args:
        matrices: 2-dimensional parameters.
        others: parameters or parameter groups.
        muon_lr: learning rate of the matrices.
        lr: learning rate of the others.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, of the matrices and of groups that name none.

    The first parameter group holds the matrices; schedules scale the rate of every group.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Any],
        *,
        muon_lr: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self._adamw = AdamW(
            others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        matrix_group = {"params": list(matrices), "lr": muon_lr, "weight_decay": weight_decay}
        super().__init__([matrix_group, *self._adamw.param_groups], {"lr": lr})

    @classmethod
    def for_model(cls, model: nn.Module, **settings: Any) -> Self:
        """The matrices are the weights of all linear layers but the output embedding.

        Args:
            model: its parameters that need no gradient are skipped.
            settings: as above; biases and gains of norms do not decay.
        """
        find_output = getattr(model, "get_output_embeddings", lambda: None)
        output = find_output()
        matrices = [
            module.weight
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not output
        ]
        matrices = [weight for weight in matrices if weight.requires_grad]
        taken = {id(weight) for weight in matrices}
        others = [
            parameter
            for parameter in model.parameters()
            if parameter.requires_grad and id(parameter) not in taken
        ]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in others if parameter.dim() > 1]},
            {
                "params": [parameter for parameter in others if parameter.dim() < 2],
                "weight_decay": 0.0,
            },
        ]
        return cls(matrices, [group for group in groups if group["params"]], **settings)

    @classmethod
    def from_arguments(cls, model: nn.Module, args: Any) -> Self:
        """`for_model` with the settings that flags give, `CALMTrainingArguments`."""
        return cls.for_model(
            model,
            muon_lr=args.muon_learning_rate,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch's has overloads
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices(self.param_groups[0])
        # Loading a state replaces both; the two optimizers share one.
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        directions: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[weight.shape].append(weight)
                directions[weight.shape].append(self._direction(weight, weight.grad))
        for shape, weights in by_shape.items():
            updates = orthogonal(torch.stack(directions[shape])).to(weights[0].dtype)
            size = group["lr"] * UPDATE_SIZE * max(shape) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(updates.unbind()), alpha=-size)

    def _direction(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """G + μ M, after M <- μ M + G (Nesterov)."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        return gradient.add(momentum, alpha=MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of ``[batch, rows, columns]`` with its singular values brought near 1 (0.7 to 1.2).

    Newton-Schulz iteration X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X on the smaller side, from X of
    Frobenius norm 1; in bfloat16 where the device has units for it.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT
    linear, cubic, quintic = QUINTIC
    near = matrices.to(torch.bfloat16 if has_bfloat16_units(matrices.device) else torch.float32)
    near = near / near.norm(dim=(-2, -1), keepdim=True).clamp(min=TINY)
    for _ in range(STEPS):
        gram = near @ near.mT
        gram = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        near = torch.baddbmm(near, gram, near, beta=linear)
    return near

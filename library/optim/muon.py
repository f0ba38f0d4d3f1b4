"""Muon for matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon steps the matrices; torch's AdamW steps convolutions, norms and biases, which Muon does not take.

    With `adjust_lr_fn="match_rms_adamw"` a step of Muon is as large as one of AdamW, so one rate suits both (Liu et al. 2025, "Muon
    is Scalable for LLM Training").

    Args:
        params: parameters or parameter groups.
        lr: rate of groups without one.
        weight_decay: of both.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: of Muon, see `torch.optim.Muon`.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._muon = torch.optim.Muon(
            [torch.zeros(1, 1)],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._adamw = torch.optim.AdamW([torch.zeros(1)], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__(params, {**self._muon.defaults, **self._adamw.defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step the parameters that have a gradient."""
        muon_eps = self._muon.defaults["eps"]  # the only setting whose name both have and whose value differs
        self._step_with(self._muon, lambda parameter: parameter.dim() == 2, {"eps": muon_eps})
        self._step_with(self._adamw, lambda parameter: parameter.dim() != 2, {})

    def _step_with(self, inner: torch.optim.Optimizer, takes: Callable[[torch.Tensor], bool], settings: Mapping[str, Any]) -> None:
        """Let an optimizer step what it takes, with the rates and the state that are here."""
        inner.param_groups = [
            {**group, **settings, "params": [parameter for parameter in group["params"] if takes(parameter)]}
            for group in self.param_groups
        ]
        inner.state = self.state
        inner.step()

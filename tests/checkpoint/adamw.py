"""Saves and loads Megatron-Core's optimizers where torch's AdamW is behind them (no Transformer Engine, no Apex).

Three things go wrong there in 0.16.1 and 0.19.2. An optimizer that has not stepped yet cannot describe its state
(``assert len(steps) == 1``), so that nothing can be loaded into it. The fully reshardable loader looks for a ``step``
per parameter that the format does not have (``KeyError: 'step'``). And all parameters of a rank are given one ``step``
tensor, so that every step counts once per parameter: the bias correction is wrong from the second step after a resume.
"""

from __future__ import annotations

from typing import Any

import torch


def allocate_optimizer_state(optimizer: Any) -> None:
    """Gives parameters that have not been stepped yet the state of step 0; before any ``sharded_state_dict``.

    An optimizer that goes on from there does what it would have done without.
    """
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)`` for a MegatronOptimizer, distributed or chained, made right for AdamW."""
    setters = [_KeepsStep(part) for part in _parts(optimizer) if hasattr(part, "_set_main_param_and_optimizer_states")]
    for setter in setters:
        setter.install()
    try:
        optimizer.load_state_dict(state)
    finally:
        for setter in setters:
            setter.remove()
    for part in _parts(optimizer):
        for values in part.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()


class _KeepsStep:
    """Stands before an optimizer's own setter and adds the ``step`` it already has to what was loaded."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._set = part._set_main_param_and_optimizer_states

    def install(self) -> None:
        self._part._set_main_param_and_optimizer_states = self

    def remove(self) -> None:
        del self._part._set_main_param_and_optimizer_states

    def __call__(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self._part.model_param_group_index_map[model_param]
        main_param = self._part.optimizer.param_groups[group]["params"][order]
        step = self._part.optimizer.state[main_param].get("step")
        self._set(model_param, tensors if step is None else {"step": step, **tensors})


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))

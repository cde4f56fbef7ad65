"""DeepSpeed ZeRO under the same loop: the few places where its shards of gradients, parameters and moments differ."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from moa.build import DTYPES
from moa.sections import TrainConfig
from moa.training.batches import Layout, TrainingError
from moa.training.distributed.plain import Plain

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Plain):
    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layout: Layout,
        train: TrainConfig,
    ) -> None:
        configure(accelerator, layout, train)
        self.accelerator, self.optimizer = accelerator, optimizer
        accelerator.prepare(model, optimizer)
        self.engine: Any = accelerator.deepspeed_engine_wrapped.engine
        self.holds_gradient = False

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.holds_gradient = True

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """Clip and update in one call; where the norm is not finite, DeepSpeed drops the gradient instead."""
        self.engine.step()
        self.holds_gradient = False
        return float(self.engine.get_global_grad_norm())

    def update(self) -> None:
        pass

    def discard(self) -> None:
        # Its norm is not finite either, so the engine's step drops the gradient and updates nothing.
        if self.holds_gradient:
            self.clip([], 0.0)
            if self.engine.was_step_applied():
                raise TrainingError("DeepSpeed updated by the gradient of a loss that is not finite")

    def optimizer_tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """Moments, step counts and fp32 masters, by name and kind."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        optimizer = self.engine.optimizer
        states = [state for state in optimizer.optimizer.state.values() if "step" in state]
        if not states:
            return {}  # before the first update
        link_moments(optimizer)
        step = states[0]["step"]
        tensors = {}
        for parameter, name in names.items():
            for kind in MOMENTS:
                tensors[f"{name}:{kind}"] = safe_get_full_optimizer_state(parameter, kind).cpu()
            tensors[f"{name}:master"] = safe_get_full_fp32_param(parameter).cpu()
            tensors[f"{name}:step"] = torch.as_tensor(step).cpu()
        return tensors

    def restore_optimizer(self, names: Mapping[nn.Parameter, str], tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Put back what `optimizer_tensors` gave; what was saved without DeepSpeed has no masters, but fp32 weights."""
        optimizer = self.engine.optimizer
        stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        flat = "fp32_partitioned_groups_flat" if stage_3 else "single_partition_of_fp32_groups"
        step = next(iter(tensors.values()))["step"]
        # The moments are made before they are set: torch makes them at its first step only.
        for shard in getattr(optimizer, flat):
            moments = {kind: torch.zeros_like(shard) for kind in MOMENTS}
            optimizer.optimizer.state[shard] = {"step": step.clone(), **moments}
        link_moments(optimizer)
        for parameter, name in names.items():
            for kind, key in (*((kind, kind) for kind in MOMENTS), ("master", None)):
                if kind not in tensors[name]:
                    continue
                value = tensors[name][kind].to(self.engine.device)
                if stage_3:
                    optimizer.set_local_hp_param(shard_of(parameter, value), parameter, key)
                else:
                    parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]

    def close(self) -> None:
        self.engine.destroy()
        self.accelerator.free_memory()


def compile_nothing() -> None:
    """Keep DeepSpeed on a CPU from compiling an operator that only its inference calls, and whose lock may hang."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # the operators that it would compile


def configure(accelerator: Accelerator, layout: Layout, train: TrainConfig) -> None:
    """Set what DeepSpeed needs before it wraps a model. Half precision is autocast: its own `bf16` would cast the
    parameters. The optimiser stays torch's fused AdamW."""
    dtype = str(DTYPES[train.precision]).removeprefix("torch.")
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_batch_size": layout.batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": train.clip_norm,
        "torch_autocast": {"enabled": dtype != "float32", "dtype": dtype},
        "zero_force_ds_cpu_optimizer": False,
    }


def whole(parameters: Sequence[nn.Parameter], write: bool) -> AbstractContextManager[Any]:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


def link_moments(optimizer: Any) -> None:
    """Let ZeRO-1/2 find each parameter's moments, which it links by itself after the first group's first step only."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def shard_of(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of a whole tensor: ZeRO-3 pads the last one."""
    size, processes = parameter.ds_tensor.ds_numel, torch.distributed.get_world_size()
    padded = F.pad(value.flatten(), (0, size * processes - value.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)

"""DeepSpeed ZeRO under the same loop: the few places where sharded training differs.

Gradients, parameters and moments are sharded over processes there; each function gives or takes
whole tensors, and every process must call it.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from moa.training.batches import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")


def configure(accelerator: Accelerator, layout: Layout, clip_norm: float, dtype: str) -> None:
    """Fill in what DeepSpeed wants to know before it wraps a model; nothing without DeepSpeed.

    Half precision is autocast, as without DeepSpeed: its own `bf16` would cast the parameters.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": layout.micro_batch_size,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": clip_norm,
            "torch_autocast": {"enabled": dtype != "float32", "dtype": dtype},
        }


def engine_of(accelerator: Accelerator) -> Any:
    """DeepSpeed's engine of the model prepared last, or None without DeepSpeed."""
    wrapper = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return wrapper.engine if wrapper is not None else None


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Accumulate gradients; the `last` micro-batch of a step exchanges them."""
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)


def gradient(parameter: nn.Parameter) -> Tensor | None:
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def whole(engine: Any, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, sharded parameters (ZeRO-3) are whole on every process; to be read, not written."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if engine is None or not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def optimizer_tensors(engine: Any, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Moments, step counts and fp32 masters, by name and kind."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link_moments(engine.optimizer)
    step = next(iter(engine.optimizer.optimizer.state.values()))["step"]
    tensors = {}
    for parameter, name in names.items():
        for kind in MOMENTS:
            tensors[f"{name}:{kind}"] = safe_get_full_optimizer_state(parameter, kind).cpu()
        tensors[f"{name}:master"] = safe_get_full_fp32_param(parameter).cpu()
        tensors[f"{name}:step"] = torch.as_tensor(step).cpu()
    return tensors


def restore_optimizer(
    engine: Any, names: Mapping[nn.Parameter, str], tensors: Mapping[str, dict[str, Tensor]]
) -> None:
    """Put back what `optimizer_tensors` gave, by name: torch makes moments at the first step only.

    What was saved without DeepSpeed has no masters: they are the fp32 weights already.
    """
    optimizer = engine.optimizer
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    flat = "fp32_partitioned_groups_flat" if stage_3 else "single_partition_of_fp32_groups"
    step = next(iter(tensors.values()))["step"]
    for shard in getattr(optimizer, flat):
        moments = {kind: torch.zeros_like(shard) for kind in MOMENTS}
        optimizer.optimizer.state[shard] = {"step": step.clone(), **moments}
    link_moments(optimizer)
    for parameter, name in names.items():
        for kind, key in (*((kind, kind) for kind in MOMENTS), ("master", None)):
            if kind not in tensors[name]:
                continue
            value = tensors[name][kind].to(engine.device)
            if stage_3:
                optimizer.set_local_hp_param(shard_of(parameter, value), parameter, key)
            else:
                parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]


def link_moments(optimizer: Any) -> None:
    """Let ZeRO-1/2 find each parameter's moments: by itself it links them once, after the first
    parameter group's first step, when the other groups have none.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def shard_of(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of a whole tensor: ZeRO-3 pads the last one."""
    size, processes = parameter.ds_tensor.ds_numel, torch.distributed.get_world_size()
    padded = F.pad(value.flatten(), (0, size * processes - value.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)

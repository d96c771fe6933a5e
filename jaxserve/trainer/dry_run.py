"""`jaxserve train --dry-run`: what a run would do, computed without doing any of it."""

from __future__ import annotations

from typing import Any

from jaxserve import model_store
from jaxserve.host_memory import read_host_memory
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.errors import TrainConfigError
from jaxserve.trainer.memory_file import NUM_SLOTS
from jaxserve.trainer.run_identity import make_world
from jaxserve.trainer.shard_gradient import abstract_trainable, flat_vector_of
from jaxserve.trainer.step_config import OPTIMIZER_OPTIONS
from models.loading import open_model
from models.lora import LoraConfig
from models.registry import get_family
from schedules import TunerConfig

_NUM_MOMENTS = {"sgd": 1, "lion": 1, "rmsprop": 1, "adagrad": 1, "amsgrad": 3}
"""Vectors of the parameters' size that an optimizer keeps; 2 for the others."""
MIB = 1 << 20


def plan_of(config: TrainConfig) -> dict[str, Any]:
    """The plan as JSON values.

    Raises:
        TrainConfigError, ConfigError, DataError, FormatError: what a start would raise.
    """
    assert config.optimizer.name in OPTIMIZER_OPTIONS
    if config.task != "causal_lm":
        raise TrainConfigError(f"--dry-run: there is no plan for task {config.task!r} yet")
    dataset = TokenDataset(config.data.path)
    world = make_world(config)
    source = config.language_model.source
    model = config.language_model.shape or open_model(model_store.resolve(source or "")).config
    lora = config.lora
    adapters = None if lora is None else LoraConfig(lora.rank, lora.alpha, lora.targets)
    flat = flat_vector_of(abstract_trainable(model, adapters), config.optimizer.decayed)
    num_model = _num_parameters(get_family(model.family).abstract_params(model, "float32"))
    ema = config.optimizer.ema_decay is not None
    is_tuned = isinstance(config.parsed_schedule, TunerConfig)  # keeps where its last probe was
    num_vectors = 1 + _NUM_MOMENTS.get(config.optimizer.name, 2) + int(ema) + int(is_tuned)
    vector_bytes = flat.num_blocks * flat.block_size * 4
    state_bytes = num_vectors * vector_bytes
    tokens_per_step = world.global_batch_size * world.seq_len
    cadence = config.cadence(state_bytes)
    num_devices = config.placement.num_devices
    examples = config.total_steps * world.global_batch_size
    return {
        "run_dir": config.run_dir,
        "parameters": num_model,
        "trained_parameters": flat.num_values,
        "flops_per_token": _flops_per_token(num_model, flat.num_values, is_lora=lora is not None),
        "steps": config.total_steps,
        "tokens_per_step": tokens_per_step,
        "tokens": config.total_steps * tokens_per_step,
        "epochs": round(examples / dataset.num_examples, 3),
        "devices": num_devices,
        "shard_ranges": [[one.first, one.end] for one in world.ranges_of(num_devices)],
        "snapshot_every": cadence.snapshot_every,
        "checkpoint_every": cadence.checkpoint_every,
        "memory_bytes": {
            "state": state_bytes,
            "snapshots": NUM_SLOTS * state_bytes,
            "gradients_per_device": vector_bytes * (world.num_leaves.bit_length() + 1),
            "checkpoint_on_disk": state_bytes,
        },
        "host_memory_available_bytes": read_host_memory().available_bytes,
    }


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    memory = {name: f"{size / MIB:,.1f} MiB" for name, size in plan["memory_bytes"].items()}
    ranges = ", ".join(f"{first}-{end - 1}" for first, end in plan["shard_ranges"])
    available = plan["host_memory_available_bytes"] / MIB
    lines = {
        "run": plan["run_dir"],
        "parameters": f"{plan['parameters']:,} ({plan['trained_parameters']:,} trained)",
        "steps": f"{plan['steps']:,} of {plan['tokens_per_step']:,} tokens",
        "tokens": f"{plan['tokens']:,}, {plan['epochs']} epochs",
        "devices": f"{plan['devices']}; logical shards of each: {ranges}",
        "snapshots": f"every {plan['snapshot_every']} steps, in memory",
        "checkpoints": f"every {plan['checkpoint_every']} steps, {memory['checkpoint_on_disk']}",
        "state": f"{memory['state']}: parameters and optimizer, float32",
        "shared memory": f"{memory['snapshots']}: two snapshots",
        "gradients": f"at most {memory['gradients_per_device']} a device, beside activations",
        "this machine": f"{available:,.0f} MiB of memory are free",
    }
    return "\n".join(f"{name:14} {value}" for name, value in lines.items())


def _flops_per_token(num_model: int, num_trained: int, *, is_lora: bool) -> int:
    """Two a parameter for each of forward pass, gradients of activations and gradients of
    parameters (Kaplan et al. 2020, section 2.1), without attention's products."""
    return 4 * num_model + 6 * num_trained if is_lora else 6 * num_model


def _num_parameters(tree: Any) -> int:
    import jax

    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))

"""After a model's probe failed, finds on the meta device the config key that makes every pass fail."""

from __future__ import annotations

import inspect

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures import Architecture, build_skeleton, config_path, faulty_key_of_model
from rabbit_engine.errors import UnsupportedArchitectureError
from rabbit_engine.planning.probe import Probe, run_probe
from rabbit_engine.transformers_bridge.remote_code import is_remote


def require_pass(architecture: Architecture, dtype: torch.dtype, probe: Probe) -> None:
    """Raise UnsupportedArchitectureError if one key of the config makes every pass fail: without it a pass works.

    Most models whose probe failed only reject tensors without values, and are left alone.
    """
    cls, config = architecture.cls, architecture.config
    if not probe.failure or _is_of_the_device(probe.failure) or is_remote(cls) or not _runs_on_text_alone(cls, config):
        return
    faulty_key = faulty_key_of_model(config, lambda other: _pass(cls, other, dtype))
    if faulty_key:
        raise UnsupportedArchitectureError(f"{config_path(config)}: no pass of {cls.__name__} works: {probe.failure}{faulty_key}")


def _pass(cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype) -> None:
    failure = run_probe(build_skeleton(cls, config, dtype)).failure
    if failure:
        raise RuntimeError(failure)


def _runs_on_text_alone(cls: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Whether a prompt is all that a pass needs, which is all that a probe gives."""
    return not config.is_encoder_decoder and "input_ids" in inspect.signature(cls.forward).parameters


def _is_of_the_device(failure: str) -> bool:
    return failure.startswith("NotImplementedError") or "meta" in failure.lower()

"""PEFT adapters: applies the one next to the weights, rejects what would be wrong or needs streamed weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rabbit_engine.errors import (
    CannotLoadStateError,
    ConfigurationError,
    DamagedCheckpointError,
    RabbitError,
    UnsupportedOperationError,
    WeightNotLoadedError,
    first_line,
)
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming import ExpertsPlaceholder, Placeholder, adapts_routed
from rabbit_engine.transformers_bridge.adapters import can_load_adapters, remove_adapter
from rabbit_engine.utils.foreign import foreign_code

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"

_WHOLE = "set max_memory high enough for the whole model"
_WHOLE_HERE = "load the model on one device that has memory for all of it"
_INITIALISATIONS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
_READING = ("trainable_token_indices", "modules_to_save", "layer_replication")
"""Settings that make an adapter copy weights."""


def load_checked(model: Any, load: Callable[[], Any], name: str, source: Any, given: Mapping[str, Any]) -> Any:
    """The result of `load`: transformers' `load_adapter` of `source` as `name`, with the keywords `given`.

    Raises CannotLoadStateError if the adapter would be applied wrongly, and WeightNotLoadedError if its kind reads the weights
    it adapts and these are streamed or elsewhere; the model is then unchanged.
    """
    placeholders = _placeholders_in(model)
    try:
        info = load()
    except WeightNotLoadedError as error:
        where = f"on other devices: {_WHOLE_HERE}" if runtime_of(model).in_stages else f"streamed: {_WHOLE}"
        raise WeightNotLoadedError(
            f"{_kind_of(source, given)} reads weights that are {where}, or merge the adapter into its base model "
            "with transformers and peft, save that, and load the result"
        ) from error
    wrong = _what_is_wrong(model, placeholders, info)
    try:
        if wrong:
            raise CannotLoadStateError(wrong)
        _send_to_stages(model)
    except RabbitError:
        remove_adapter(model, name)
        raise
    return info


def _send_to_stages(model: Any) -> None:
    """Raises what the stages raise, among it CannotLoadStateError for a kind that only one device has."""
    for layers in runtime_of(model).assembly.remote_layers:
        try:
            layers.send_adapters()
        except UnsupportedOperationError as error:
            raise CannotLoadStateError(str(error)) from error


def load_own_adapter(model: Any) -> None:
    """Apply the adapter next to the weights, as transformers does if peft is installed.

    Raises ConfigurationError for a Hub repo, where transformers would load the adapter's base model instead, and
    DamagedCheckpointError for an adapter that cannot be loaded.
    """
    repo = model._checkpoint.repo
    if _ADAPTER not in repo.names:
        return
    if not can_load_adapters():
        logger.warning("the adapter in %s is not applied: pip install peft", repo.folder)
        return
    try:
        if repo.commit is not None:
            raise ConfigurationError(
                f"{repo.name} holds a model and an adapter: load the base model that its {_ADAPTER} names, then "
                f"model.load_adapter({repo.name!r})"
            )
        told = f"{repo.folder / _ADAPTER} cannot be applied"
        with foreign_code(lambda error: DamagedCheckpointError(f"{told}: {first_line(error)}")):
            model.load_adapter(str(repo.folder))
    except BaseException:
        model.close()
        raise


def _what_is_wrong(model: Any, placeholders: list[tuple[nn.Module, str, Placeholder]], info: Any) -> str:
    changed = _put_back(placeholders)
    if changed:
        return f"the adapter contains {changed[0]} with other values than the checkpoint, and that weight is streamed: {_WHOLE}"
    if adapts_routed(model):
        return f"the adapter changes experts: {ExpertsPlaceholder.advice}"
    family, lost = runtime_of(model).architecture.family, sorted(getattr(info, "unexpected_keys", None) or ())
    if family is not None and lost:
        return (
            f"the adapter has {len(lost)} weights for modules of {family}'s own class that {type(model).__name__} has under "
            f"other names, such as {lost[0]}, so its text would be wrong: train it on the converted model"
        )
    return ""


def _placeholders_in(model: nn.Module) -> list[tuple[nn.Module, str, Placeholder]]:
    """Modules, the names of their parameters, and the placeholders of these."""
    named: list[tuple[nn.Module, str, Any]]
    named = [(module, name, weight) for module in model.modules() for name, weight in module._parameters.items()]
    return [(module, name, weight) for module, name, weight in named if isinstance(weight, Placeholder)]


def _put_back(placeholders: list[tuple[nn.Module, str, Placeholder]]) -> list[str]:
    """Restore each placeholder where a weight was set; returns the names of weights with other values in the checkpoint."""
    changed = []
    for module, name, weight in placeholders:
        given = module._parameters[name]
        module._parameters[name] = weight  # type: ignore[assignment]
        if given is not None and not isinstance(given, Placeholder) and not weight.holds(given):
            changed.append(weight.weight_name)
    return changed


def _kind_of(source: Any, given: Mapping[str, Any]) -> str:
    """The setting of an adapter's config that makes it read weights, in PEFT's terms."""
    from peft import PeftConfig

    where = {name: given[name] for name in ("revision", "subfolder", "cache_dir", "token") if name in given}
    config = given.get("peft_config") or PeftConfig.from_pretrained(source, **where)
    if getattr(config, "use_dora", False):
        return "DoRA (use_dora)"
    initialisation = str(getattr(config, "init_lora_weights", "")).partition("_niter")[0]
    if initialisation in _INITIALISATIONS:
        return f"{_INITIALISATIONS[initialisation]} (init_lora_weights={config.init_lora_weights!r})"
    used = next((name for name in _READING if getattr(config, name, None)), None)
    return used or f"an adapter of type {config.peft_type.value}"

"""From the keywords that ask for smaller weights to one checked value: ours, and transformers' for bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import BitsAndBytesConfig

from rabbit_engine.config import BitsAndBytes, CompressionConfig
from rabbit_engine.errors import CompressionUnavailableError, ConfigurationError, first_line
from rabbit_engine.transformers_bridge.quantizers import bitsandbytes_config

_SHORTHANDS = ("load_in_4bit", "load_in_8bit")


def other_than_compression(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that `compression_of` does not read."""
    return {name: value for name, value in keywords.items() if name not in _SHORTHANDS}


def compression_of(arguments: Mapping[str, Any], device_type: str) -> CompressionConfig | None:
    """What `compression`, `quantization_config` and `load_in_4bit` or `load_in_8bit` ask for, or None for none of them.

    Raises ConfigurationError for more than one, or invalid values; CompressionUnavailableError for another quantiser.
    """
    method, config = arguments["compression"], quantization_config_of(arguments)
    if config is None:
        return None if method is None else CompressionConfig(method=method, device_type=device_type)
    if method is not None:
        raise ConfigurationError(f"compression={method!r} and a quantisation by bitsandbytes are two ways: leave out one of them")
    return CompressionConfig(method="bnb", bitsandbytes=_options(config), device_type=device_type)


def quantization_config_of(arguments: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """The config given, or the one that transformers made of the older keywords."""
    given, other = arguments["quantization_config"], arguments["other"]
    short = {name: other[name] for name in _SHORTHANDS if other.get(name)}
    if given is not None and short:
        raise ConfigurationError(f"{next(iter(short))} and quantization_config are both given: leave out one of them")
    if given is None and not short:
        return None
    try:
        found = bitsandbytes_config(short if given is None else given)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"quantization_config cannot be used: {first_line(error)}") from error
    if found is None:
        kind = given if isinstance(given, str | dict) else type(given).__name__
        raise CompressionUnavailableError(
            f'quantization_config={kind!r} is not supported: pass a BitsAndBytesConfig, or compression="4bit"; '
            "a checkpoint that is quantised already is recognised by its config.json"
        )
    return found


def _options(config: BitsAndBytesConfig) -> BitsAndBytes:
    if config.llm_int8_has_fp16_weight or not (config.load_in_4bit or config.load_in_8bit):
        raise CompressionUnavailableError(
            "this BitsAndBytesConfig leaves weights as they are: pass load_in_4bit=True or load_in_8bit=True, "
            "without llm_int8_has_fp16_weight"
        )
    skip = config.llm_int8_skip_modules
    return BitsAndBytes(
        kind=config.bnb_4bit_quant_type if config.load_in_4bit else "int8",
        nested=config.load_in_4bit and config.bnb_4bit_use_double_quant,
        skip=None if skip is None else tuple(skip),
        compute_dtype=str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
        threshold=config.llm_int8_threshold,
    )

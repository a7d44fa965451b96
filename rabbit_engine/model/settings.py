"""From the arguments of `AutoModel.from_pretrained` to checked settings, which loading and `rabbit plan` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig, parse_dtype, parse_path, parse_paths
from rabbit_engine.devices import DeviceRow, parse_device, parse_max_memory, parse_planned_device, parse_row
from rabbit_engine.model.compression import compression_of, other_than_compression
from rabbit_engine.model.speculating import Speculate, parse_speculate
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.utils.keywords import take_keywords

Arguments = Mapping[str, Any]
"""Every parameter of `from_pretrained` by name: the given value or the default."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """Where a checkpoint comes from, whether and how it is split, how its model is run, and what guesses its tokens.

    `row` are the devices among which the layers are divided; that of `stream` is the first of them.
    """

    source: SourceConfig
    split: SplitConfig
    stream: StreamConfig
    speculate: Speculate = None
    row: DeviceRow | None = None


def settings_of(arguments: Arguments, *, planned: bool = False) -> LoadSettings:
    """Check the arguments. A `planned` device need not be present if `max_memory` names its size.

    Raises ConfigurationError, CompressionUnavailableError and DeviceUnavailableError.
    """
    overrides = take_keywords(other_than_compression(arguments["other"]))
    row = parse_row(arguments["device"], arguments["device_map"], arguments["max_memory"], planned=planned)
    if row is not None:
        device = row.devices[0].device
    elif planned:
        device = parse_planned_device(arguments["device"], arguments["max_memory"])
    else:
        device = parse_device(arguments["device"], arguments["device_map"])
    return LoadSettings(
        source=_source_of(arguments, overrides),
        split=_split_of(arguments, device),
        stream=_stream_of(arguments, device),
        speculate=parse_speculate(arguments["speculate"]),
        row=row,
    )


def _source_of(arguments: Arguments, overrides: Mapping[str, Any]) -> SourceConfig:
    token = arguments["token"]
    return SourceConfig(
        token=arguments["hf_token"] if token is None else token,
        revision=arguments["revision"],
        cache_dir=parse_path("cache_dir", arguments["cache_dir"]),
        local_files_only=arguments["local_files_only"],
        trust_remote_code=arguments["trust_remote_code"],
        gguf_file=arguments["gguf_file"],
        subfolder=arguments["subfolder"] or "",
        variant=arguments["variant"],
        use_safetensors=arguments["use_safetensors"],
        force_download=arguments["force_download"],
        key_mapping=arguments["key_mapping"] or {},
        code_revision=arguments["code_revision"],
        config=arguments["config"],
        overrides=overrides,
    )


def _split_of(arguments: Arguments, device: torch.device) -> SplitConfig:
    dtype = arguments["dtype"]
    paths = parse_paths("layer_shards_saving_path", arguments["layer_shards_saving_path"])
    return SplitConfig(
        mode=arguments["split"],
        dtype=parse_dtype(arguments["torch_dtype"] if dtype is None else dtype),
        saving_path=paths[0] if paths else None,
        more_paths=paths[1:],
        delete_original=arguments["delete_original"],
        compression=compression_of(arguments, device.type),
    )


def _stream_of(arguments: Arguments, device: torch.device) -> StreamConfig:
    device_bytes, host_bytes = parse_max_memory(arguments["max_memory"], device)
    return StreamConfig(
        device=device,
        device_budget_bytes=device_bytes,
        host_budget_bytes=host_bytes,
        attn_implementation=_attention_of(arguments),
        prefetching=arguments["prefetching"],
        profiling_mode=arguments["profiling_mode"],
        show_layer_progress=arguments["show_layer_progress"],
        max_seq_len=arguments["max_seq_len"],
        cache_dtype=arguments["cache_dtype"],
        fused_products=arguments["fused_products"],
        cut=arguments["cut"],
    )


def _attention_of(arguments: Arguments) -> str:
    """The attention requested by keyword, else by the caller's config object, else "auto"."""
    named = arguments["attn_implementation"]
    if named not in (None, "auto"):
        return str(named)
    return attention_of(arguments["config"]) or "auto"

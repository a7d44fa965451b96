"""A GGUF file as transformers reads it: its dtype, where each weight comes from, and its tensors, dequantised.

transformers has two readers. Most architectures go through the older one, `load_gguf_checkpoint`; `GgufHfQuantizer` handles the
others itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from rabbit_engine.transformers_bridge.gguf_reader import quick_reader
from rabbit_engine.transformers_bridge.gguf_weights import (
    Shape,
    Source,
    sources_of_newer_reader,
    sources_of_older_reader,
)
from rabbit_engine.transformers_bridge.loading import Unread
from rabbit_engine.transformers_bridge.progress import without_progress_bars
from rabbit_engine.transformers_bridge.quantizers import Quantizer


def read_gguf_config(path: Path) -> dict[str, Any]:
    """A GGUF file's header as the attributes of a config. The reader may raise anything for a header of another kind."""
    with quick_reader(strings=False):
        found, _ = PretrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
    return dict(found)


class GgufFile:
    """A GGUF file whose header has been read. Raises ImportError without the package gguf."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._path = str(path)
        self._quantizer = GgufHfQuantizer(GgufConfig(dequantize=True, gguf_file=self._path))
        self._quantizer.read_header(self._path)

    @property
    def quantizer(self) -> Quantizer:
        """The quantiser that dequantises the file's tensors at load."""
        return self._quantizer

    def dtype(self) -> torch.dtype:
        """The dtype that transformers loads the file in: its own for plain floats, float32 for quantised weights."""
        dtype: torch.dtype = self._quantizer.update_dtype(None)
        return dtype

    @property
    def rounds_each_step(self) -> bool:
        """Whether the reader dequantises in the model's dtype, not in float32."""
        return bool(self._quantizer.supported)

    def sources(
        self, model: PreTrainedModel, architecture: str, config: Callable[[], Mapping[str, Any]], shapes: Mapping[str, Shape]
    ) -> dict[str, Source]:
        """Weight of `model` -> what it is of the file's tensors, of `shapes` in torch's order.

        `config` returns what `read_gguf_config` does; only the older reader needs it.

        The reader may raise anything if the header's numbers do not match the tensors.
        """
        if self._quantizer.supported:
            return sources_of_newer_reader(model, architecture, shapes)
        with quick_reader():
            return sources_of_older_reader(model, architecture, config(), shapes)

    def open_tensors(self, model: PreTrainedModel, dtype: torch.dtype) -> Mapping[str, Unread]:
        """The file's tensors by key, to be loaded into `model` as `dtype`.

        Architectures that only transformers' older reader supports are dequantised at once, in memory. The reader may raise
        anything if the header's numbers are wrong.
        """
        self._quantizer.update_dtype(dtype)
        self._quantizer.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=[self._path])
        with without_progress_bars(), quick_reader(strings=False):
            tensors: Mapping[str, Unread] = self._quantizer.get_state_dict(self._path, model)
        return tensors

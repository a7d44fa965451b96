"""Multi-token heads, blocks of some checkpoints that guess the tokens after the next, as transformers' MtpModel runs them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel, cache_utils, modeling_layers
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from rabbit_engine.transformers_bridge.building import build_without_weights
from rabbit_engine.transformers_bridge.quantizers import Quantizer
from rabbit_engine.transformers_bridge.weight_transforms import NameMap, Place, WeightTransform, transforms_for

_EMBEDDING, _HEAD = "embed_tokens.weight", "shared_head.weight"
"""Names in transformers' MtpModel of what it shares with the main model."""


def heads_in(config: PretrainedConfig) -> int:
    """The number of multi-token heads that a config says its checkpoint has."""
    count = getattr(config.get_text_config(), "num_mtp_layers", None)
    return count if isinstance(count, int) else 0


def layers_of_heads(config: PretrainedConfig) -> range:
    """The numbers of the layers that most checkpoints store their heads as: those after the last."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    return range(layers, layers + heads_in(text)) if isinstance(layers, int) else range(0)


def can_run_heads() -> bool:
    """Whether this release of transformers has a model of them that runs one head at a time."""
    model: Any = getattr(modeling_layers, "MtpModel", None)
    parts = ("forward_layer", "get_weight_conversions", "_project_to_logits")
    return hasattr(cache_utils, "MtpCache") and all(hasattr(model, name) for name in parts)


def build_heads(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The heads of a checkpoint of `cls` as a model of their own, with every parameter on the meta device.

    It has an embedding and a head of its own, stored where the main model's are. Raises whatever the classes do.
    """
    main = build_without_weights(cls, config, dtype, attn_implementation)
    with torch.device("meta"), init.meta_device_safe_creation_ops(), _default_dtype(dtype):
        heads: PreTrainedModel = _heads_class()(main)
    heads.eval()
    return heads


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class MultiTokenModel:
    """What is added to transformers' MtpModel: a forward of one step, and an output embedding. `_heads_class` joins them."""

    layers: Any

    def __init__(self, main: PreTrainedModel) -> None:
        super().__init__(main, heads_in(main.config))  # type: ignore[call-arg]
        self.main = (main,)  # in a tuple, so that its weights are not those of this model
        self._keep_in_fp32_modules = main._keep_in_fp32_modules
        self._keep_in_fp32_modules_strict = main._keep_in_fp32_modules_strict
        self._keys_to_ignore_on_load_missing = None
        self._keys_to_ignore_on_load_unexpected = [""]  # the main model's

    def get_output_embeddings(self) -> Any:
        """The head, which has the main model's weights."""
        return self.shared_head  # type: ignore[attr-defined]

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Initialise what no checkpoint holds as the main model's class does, which knows its rotary embeddings."""
        self.main[0]._init_weights(module)

    def forward(
        self,
        input_ids: torch.Tensor,
        states: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        depth: int | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
    ) -> Any:
        """One step of the head at `depth`, or of all in turn, over tokens [1, tokens] and states [1, tokens, width].

        Returns the `logits` [1, `logits_to_keep`, vocabulary], the head's own `states`, and the `cache`.
        """
        del use_cache  # there is always one
        own: Any = self
        if states is None:  # to show which modules run
            states = own.embed_tokens(input_ids)
        if cache is None:
            cache = new_cache(own.config)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        for index in range(len(own.layers)) if depth is None else (depth,):
            states = own.forward_layer(index, states, position_ids, cache, input_ids=input_ids)
        logits = own._project_to_logits(states[:, -logits_to_keep:])
        return ModelOutput(logits=logits, states=states, cache=cache)


def new_cache(config: PretrainedConfig) -> Any:
    """An empty cache for one text of the heads with that config, which can drop its newest positions."""
    cache = cache_utils.MtpCache(config=config)
    cache.activate_past_recording()
    return cache


@functools.cache
def _heads_class() -> Any:
    base = modeling_layers.MtpModel
    return type(base.__name__, (MultiTokenModel, base), {"__module__": base.__module__})  # conversions are looked up by both


class HeadsNameMap:
    """Maps the keys of a checkpoint to the weights of its heads; those of the main model's layers have no place."""

    def __init__(self, heads: Any, quantizer: Quantizer | None, first: Sequence[WeightTransform]) -> None:
        main: Any = heads.main[0]
        main._weight_conversions = transforms = transforms_for(main, quantizer, first)
        self._main, self._own = NameMap(main, transforms), NameMap(heads, heads.get_weight_conversions(main))
        self._shared = {
            name: place
            for module, place in ((main.get_input_embeddings(), _EMBEDDING), (main.get_output_embeddings(), _HEAD))
            for name, parameter in main.named_parameters(remove_duplicate=False)
            if parameter is module.weight
        }
        self._layers = layers_of_heads(main.config)
        named = (pattern for pattern in main._keys_to_ignore_on_load_unexpected or () if "layers" not in pattern)
        self._prefixes = [re.compile(pattern) for pattern in named]

    def place_of(self, key: str) -> Place | None:
        """See `NameMap`."""
        if self._is_of_heads(key):
            return self._own.place_of(key)
        shared = self._main.place_of(key)
        return None if shared is None or shared.weight not in self._shared else Place(self._shared[shared.weight])

    def renamed(self, key: str) -> str:
        """See `NameMap`."""
        return self._own.renamed(key)

    def _is_of_heads(self, key: str) -> bool:
        """Heads are the layers after the main model's last, or under names that its class ignores."""
        layer = re.search(r"(^|\.)layers\.(\d+)\.", key)
        if layer is not None and int(layer[2]) in self._layers:
            return True
        return any(pattern.search(key) for pattern in self._prefixes)

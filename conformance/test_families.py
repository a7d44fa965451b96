"""One test class per family: transformers' mixins, on streamed models with the configs of tests/families.py."""

from __future__ import annotations

import os
import unittest
from fnmatch import fnmatchcase
from typing import Any

import families
import torch
import transformers
from tests.generation import test_utils as generation

from conformance.streamed import Current, backbone_type, streamed_type
from tests import test_modeling_common as common

WHOLE_TEXT = ("test_*_dict_outputs_use_cache", "test_*_static_cache", "test_assisted_*", "test_prompt_lookup_*")
"""Tests that expect caches and attentions as long as the text in every layer: they get windows wider than the text."""


class ModelTester:
    """What the mixins need from a family: a config, inputs, and a few sizes."""

    batch_size, seq_length, is_training = 1 if Current.speculate else 7, 7, False  # batches are decoded one token a pass

    def __init__(self, family: str, test: str) -> None:
        self.config = families.build(family).config
        for name in ("sliding_window", "attention_chunk_size"):
            if any(fnmatchcase(test, pattern) for pattern in WHOLE_TEXT) and getattr(self.config, name, None):
                setattr(self.config, name, 64)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(self.config, name, None))

    def get_config(self) -> Any:
        """A new config for the test: the fields of its class, and the head size that some tests read."""
        fields = type(self.config)().to_dict()
        config = type(self.config)(**{name: value for name, value in self.config.to_dict().items() if name in fields})
        if getattr(config, "head_dim", self) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config, and ids and mask as int64 [batch, seq]: row i sees its first i + 1 tokens."""
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class LinearAttention:
    """The shapes of a cache's states; in transformers, each family with gated delta nets defines them for its own tests."""

    def _get_conv_state_shape(self, batch_size: int, config: Any) -> tuple[int, int, int]:
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return batch_size, 2 * keys + values, config.linear_conv_kernel_dim

    def _get_recurrent_state_shape(self, batch_size: int, config: Any) -> tuple[int, int, int, int]:
        return batch_size, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim


def family_class(family: str) -> type:
    """The family's test class: its language model in every test, its base model in the tests of the rotary embedding."""
    config_name, model_name, _ = (families.FAMILIES | families.MORE)[family]
    causal = streamed_type(getattr(transformers, model_name))
    base = backbone_type(transformers.MODEL_MAPPING[getattr(transformers, config_name)], causal)
    body: dict[str, Any] = {
        "all_model_classes": property(lambda self: (base if "_rope_" in self._testMethodName else causal,)),
        "setUp": lambda self: setattr(self, "model_tester", ModelTester(family, self._testMethodName)),
    }
    config = families.build(family).config
    body["has_attentions"] = hasattr(config, "num_attention_heads")
    own = (LinearAttention,) if hasattr(config, "linear_num_key_heads") else ()
    return type(family, (*own, common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase), body)


globals().update({family: family_class(family) for family in os.environ["CONFORMANCE_FAMILIES"].split()})

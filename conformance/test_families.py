"""One test class a family: transformers' mixins, over streamed models of the configs in tests/families.py."""

from __future__ import annotations

import os
import unittest
from typing import Any

import families
import torch
import transformers
from tests.generation import test_utils as generation

from conformance.streamed import backbone_type, streamed_type
from tests import test_modeling_common as common


class ModelTester:
    """What the mixins ask of a family: a config, inputs, and a few sizes."""

    batch_size, seq_length, is_training = 7, 7, False

    def __init__(self, family: str) -> None:
        self.config = families.build(family).config
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(self.config, name))

    def get_config(self) -> Any:
        """A config of the test's own, with the size of a head that some tests read."""
        config = type(self.config)(**self.config.to_dict())
        if getattr(config, "head_dim", self) is None:
            config.head_dim = config.hidden_size // config.num_attention_heads
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Config, and int64 [batch, seq] of ids and of a mask: row i sees its first i + 1 tokens."""
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


def family_class(family: str) -> type:
    """The family's test class: its language model in every test, its base model in those of the rotary embedding."""
    config_name, model_name, _ = families.FAMILIES[family]
    causal = streamed_type(getattr(transformers, model_name))
    base = backbone_type(transformers.MODEL_MAPPING[getattr(transformers, config_name)], causal)
    body = {
        "all_model_classes": property(lambda self: (base if "_rope_" in self._testMethodName else causal,)),
        "setUp": lambda self: setattr(self, "model_tester", ModelTester(family)),
    }
    return type(family, (common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase), body)


globals().update({family: family_class(family) for family in os.environ["CONFORMANCE_FAMILIES"].split()})

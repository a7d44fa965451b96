"""The parts of a model and its tokenizer that sessions, servers and chats use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import PassProgress, Profile


class Decoder(Protocol):
    """Decodes token ids to text."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> Any:
        """The text of a list of ids."""


class TextTokenizer(Decoder, Protocol):
    """Encodes text as token ids, and decodes them. Chat templates and special tokens are only used if present."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """`input_ids` of a text, among other things."""

    def apply_chat_template(self, conversation: Any, *, tokenize: bool = True, return_dict: bool = True, **given: Any) -> Any:
        """A conversation in the model's own form: text, or `input_ids` among other things."""


class SessionModel(Protocol):
    """A model for sessions: what `AutoModel.from_pretrained` returns, or PEFT around it."""

    @property
    def config(self) -> PretrainedConfig:
        """The checkpoint's config, as the class reads it."""

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of its answers; only a model that generates has one."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer, or the one that was set. Raises TokenizerNotFoundError."""

    @property
    def plan(self) -> Plan:
        """Which tier keeps each unit, and what a pass costs."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    @property
    def profile(self) -> Profile:
        """Passes, bytes and seconds since it was loaded."""

    @property
    def progress(self) -> PassProgress | None:
        """The progress of the running pass."""

    @property
    def base_model(self) -> nn.Module:
        """The part that computes hidden states, without a head."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """The class's own forward, for its signature."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Its forward, and the hooks around it."""

    def can_generate(self) -> bool:
        """Whether it generates texts, rather than only embeds them."""

    def generate(self, inputs: torch.Tensor, **keywords: Any) -> object:
        """transformers' `generate`."""

    def modules(self) -> Iterator[nn.Module]:
        """Its modules, itself the first."""

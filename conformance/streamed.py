"""Model classes for transformers' own tests, whose instances are streamed. If the library refuses, its advice is followed.

The tests construct (`model_class(config)`), load, save, copy and cast models to get a second one. A streamed model cannot be
saved, copied or cast: its errors say to copy the checkpoint, or to load it again. `Followed` does that, so that these tests
still check what the second model computes.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rabbit_engine import AutoModel, Lookup, errors
from rabbit_engine.transformers_bridge.attention import attention_of


class Workspace:
    """The checkpoints and streamed models of the current test; conftest.py closes it after each test."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        self._models: list[Any] = []

    def new_folder(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    def keep(self, model: Any) -> None:
        """Close the model when the workspace is closed."""
        self._models.append(model)

    def close(self) -> None:
        """Close the models, remove the folders."""
        for model in self._models:
            model.close()
        self._folder.cleanup()


DRAFTS = {"": None, "auto": "auto", "lookup": Lookup(nodes=16)}
"""Names of defaults for `speculate`. "auto" guesses only where that pays, "lookup" as often as it can."""


class Current:
    """The workspace of the current test; whether this is the control run, with models loaded whole by transformers; and the
    `speculate` that models are loaded with."""

    workspace: Workspace
    whole = bool(os.environ.get("CONFORMANCE_WHOLE"))
    speculate = DRAFTS[os.environ.get("CONFORMANCE_SPECULATE", "")]


class Followed:
    """Does what a streamed model refuses as its errors advise: copies the checkpoint, or loads it again."""

    checkpoint: Path
    loaded_with: dict[str, Any]

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Copy the checkpoint, with the current config."""
        shutil.copytree(self.checkpoint, save_directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("rabbit_shards"))
        self.config.save_pretrained(save_directory)  # type: ignore[attr-defined]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Load again if the dtype changes."""
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype in (None, self.dtype):  # type: ignore[attr-defined]
            return super().to(*args, **kwargs)  # type: ignore[misc]
        return self._load_again(dtype=dtype)

    def half(self) -> Any:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._load_again()

    def _load_again(self, **changes: Any) -> Any:
        checkpoint = Current.workspace.new_folder()
        self.save_pretrained(checkpoint)
        return load(checkpoint, **{**self.loaded_with, **changes})


@functools.cache
def followed_class(streamed: type) -> type:
    """The streamed class with `Followed` in front, under the same name and module."""
    return type(streamed.__name__, (Followed, streamed), {"__module__": streamed.__module__})


BUDGETS: dict[tuple[str, str], int] = {}
"""Cache of `smallest_bytes` by config and keywords: computing it takes an extra load."""


def smallest_bytes(checkpoint: Path, **keywords: Any) -> int:
    """The smallest budget that works: everything that can be streamed is streamed."""
    key = ((checkpoint / "config.json").read_text(), repr(sorted(keywords.items())))
    if key not in BUDGETS:
        try:
            AutoModel.from_pretrained(checkpoint, max_memory={"cpu": 1}, **keywords).close()
        except errors.BudgetError as error:
            BUDGETS[key] = error.smallest_bytes
    return BUDGETS[key]


def load_smallest(checkpoint: Path, **keywords: Any) -> Any:
    """The checkpoint in the smallest budget; the workspace closes it."""
    model = AutoModel.from_pretrained(checkpoint, max_memory={"cpu": smallest_bytes(checkpoint, **keywords)}, **keywords)
    Current.workspace.keep(model)
    return model


def load(checkpoint: Path, **keywords: Any) -> Any:
    """A model on the CPU, streamed as far as possible; whole in the control run. Raises RuntimeError if nothing is streamed."""
    if Current.whole:
        return AutoModelForCausalLM.from_pretrained(checkpoint, **keywords)
    keywords = {"device": "cpu", "speculate": Current.speculate, **keywords}
    model = load_smallest(checkpoint, **keywords)
    if not model.plan.streamed:  # realigning a file takes a buffer larger than such a model: shards need none
        model = load_smallest(checkpoint, **keywords, split="always")
    if not model.plan.streamed:
        raise RuntimeError(f"nothing of {checkpoint} is streamed: the test would prove nothing")
    model.__class__ = followed_class(type(model))
    model.checkpoint, model.loaded_with = checkpoint, keywords
    return model


def stream(whole: PreTrainedModel) -> Any:
    """A streamed model with the weights, dtype and attention of `whole`."""
    checkpoint = Current.workspace.new_folder()
    whole.save_pretrained(checkpoint)
    return load(checkpoint, dtype=whole.dtype, attn_implementation=attention_of(whole.config))


class StreamedType(type):
    """The type of a model class whose instances are always streamed."""

    whole: type[PreTrainedModel]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Build the real model, save it, stream it."""
        return stream(cls.whole(*args, **kwargs))

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.whole)

    def build_from_config(cls, *args: Any, **kwargs: Any) -> Any:
        """`_from_config`, streamed."""
        return stream(cls.whole._from_config(*args, **kwargs))

    def stream_copy(cls, pretrained_model_name_or_path: str | Path, **keywords: Any) -> Any:
        """`from_pretrained` of a copy: the tests remove their folders while they still use the model."""
        checkpoint = Current.workspace.new_folder()
        shutil.copytree(pretrained_model_name_or_path, checkpoint, dirs_exist_ok=True)
        model = load(checkpoint, **keywords)
        model._keys_to_ignore_on_load_unexpected = cls._keys_to_ignore_on_load_unexpected  # type: ignore[attr-defined]
        return model  # tests patch this: it names the weights of multi-token prediction


def streamed_type(whole: type[PreTrainedModel]) -> type:
    """The causal language model class `whole`, as the tests see it."""
    ways = {
        "_from_config": classmethod(StreamedType.build_from_config),
        "from_pretrained": classmethod(StreamedType.stream_copy),
    }
    return StreamedType(whole.__name__, (whole,), {"__module__": whole.__module__, "whole": whole, **ways})


class Backbone(torch.nn.Module):
    """A base model's output, from a pass of the streamed language model that contains it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutput:
        """int64 [batch, seq] -> hidden states [batch, seq, hidden] after the last norm."""
        return BaseModelOutput(last_hidden_state=self.model(input_ids, output_hidden_states=True).hidden_states[-1])

    def to(self, *args: Any, **kwargs: Any) -> Backbone:
        """Does nothing if the model is there already; otherwise the model raises its own error."""
        self.model.to(*args, **kwargs)
        return self


class BackboneType(type):
    """The type of a base model class whose instances are `Backbone`s."""

    causal: type

    def __call__(cls, config: Any) -> Backbone:
        """A streamed language model, seen as its base model."""
        return Backbone(cls.causal(config))


def backbone_type(base: type[PreTrainedModel], causal: type) -> type:
    """The base model class `base` of `causal`, as the tests see it."""
    return BackboneType(base.__name__, (base,), {"__module__": base.__module__, "causal": causal})

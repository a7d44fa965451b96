"""The inputs of any class's forward: of the right names, shapes and dtypes, for passes in which values do not matter.

Made on the current default device: on the meta device they have no values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of, last_logits_argument

Inputs = dict[str, Any]
Prompting = Callable[[int], Inputs]
"""Makes the inputs of a pass over a prompt of that many tokens."""

_IMAGE_PIXELS, _SAMPLES, _FRAMES = 224, 16000, 1024
"""Where a config does not say it: the side of an image, a second of sound, and its frames."""


def ways_to_prompt(model: PreTrainedModel) -> list[Prompting]:
    """How a forward may take a prompt, the simplest way first: as text alone; as an image or a sound, where the tokens are those
    of a decoder; as both; as the class's own `dummy_inputs`, whatever the number of tokens."""
    takes = inspect.signature(model.forward).parameters
    media = {name: make for name, make in _MEDIA.items() if name in takes}
    pairs_with_text = "input_ids" in takes
    decodes = "decoder_input_ids" in takes and getattr(model.config, "is_encoder_decoder", False)

    def prompt(tokens: int, *, text: bool, other: bool) -> Inputs:
        found = {name: made for name, make in media.items() if other and (made := make(model, tokens)) is not None}
        if text:
            found["input_ids"] = _ids(model, tokens)
        if decodes:
            found["decoder_input_ids"] = _ids(model, 1 if text else tokens)
        return found | _settings(model)

    ways: list[Prompting] = []
    if pairs_with_text:
        ways.append(lambda tokens: prompt(tokens, text=True, other=False))
    if media:
        ways.append(lambda tokens: prompt(tokens, text=False, other=True))
    if media and pairs_with_text:
        ways.append(lambda tokens: prompt(tokens, text=True, other=True))
    return [*ways, lambda _: _own(model)]


def next_token(model: PreTrainedModel, output: Any) -> Inputs | None:
    """The inputs of a pass over one token after the prompt that gave `output`; None for a class that keeps no cache."""
    takes, cache = inspect.signature(model.forward).parameters, cache_of(output)
    if cache is None:
        return None
    more = _settings(model) | cache_argument(model.forward, cache)
    states = output.get("encoder_last_hidden_state")
    if states is None:
        return {"input_ids": _ids(model, 1), **more} if "input_ids" in takes else None
    encoded = BaseModelOutput(last_hidden_state=states)
    return {"encoder_outputs": encoded, "decoder_input_ids": _ids(model, 1), **more} if "encoder_outputs" in takes else None


def _settings(model: PreTrainedModel) -> Inputs:
    takes = inspect.signature(model.forward).parameters
    return ({"use_cache": True} if "use_cache" in takes else {}) | last_logits_argument(model.forward)


def _ids(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """int64 [1, tokens], or [1, 1, tokens] with one choice."""
    choices = (1,) if "MultipleChoice" in type(model).__name__ else ()
    return torch.zeros(1, *choices, tokens, dtype=torch.long)


def _own(model: PreTrainedModel) -> Inputs:
    device = torch.get_default_device()
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in model.dummy_inputs.items()}


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The config, and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            yield from _configs(inner)


def _stated(model: PreTrainedModel, *names: str) -> Any:
    """The first value that the config, or one inside it, has under one of `names`; None if none has."""
    values = (getattr(config, name, None) for config in _configs(model.config) for name in names)
    return next((value for value in values if value is not None), None)


def _pixels(model: PreTrainedModel, _: int) -> torch.Tensor:
    """[1, channels, height, width], of a video [1, frames, channels, height, width]."""
    size = _stated(model, "image_size") or _IMAGE_PIXELS
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = getattr(model.config, "num_frames", None)
    channels = _stated(model, "num_channels", "in_channels", "in_chans") or 3
    return torch.zeros(1, *((frames,) if frames else ()), channels, height, width, dtype=model.dtype)


def _spectrum(model: PreTrainedModel, _: int) -> torch.Tensor:
    """[1, mel bins, frames] for a class with a fixed number of positions, as Whisper, else [1, frames, features]."""
    bins, positions = _stated(model, "num_mel_bins"), _stated(model, "max_source_positions")
    if bins and positions and not _stated(model, "input_feat_per_channel"):
        return torch.zeros(1, bins, 2 * positions, dtype=model.dtype)
    features = _stated(model, "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_size") or 80
    return torch.zeros(1, _FRAMES, features, dtype=model.dtype)


def _sound(model: PreTrainedModel, _: int) -> torch.Tensor:
    """[1, samples], or [1, frames, mel bins] for a class that reads spectra."""
    if _stated(model, "conv_stride", "sampling_rate") is None and (bins := _stated(model, "num_mel_bins")):
        return torch.zeros(1, _stated(model, "max_length") or _FRAMES, bins, dtype=model.dtype)
    return torch.zeros(1, _SAMPLES, dtype=model.dtype)


def _boxes(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """int64 [1, tokens, 4]: where each word stands on a page."""
    return torch.zeros(*_ids(model, tokens).shape, 4, dtype=torch.long)


_MEDIA: dict[str, Callable[[PreTrainedModel, int], torch.Tensor | None]] = {
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _sound,
    "bbox": _boxes,
}

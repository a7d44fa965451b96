"""The type of a loaded model, for editors and type checkers. At run time it is the checkpoint's own class, streamed."""

from __future__ import annotations

from transformers import GenerationMixin, PreTrainedModel

from rabbit_engine.model.mixin import StreamingMixin


class StreamedModel(StreamingMixin, GenerationMixin, PreTrainedModel):  # type: ignore[misc] # what it refuses
    """What `AutoModel.from_pretrained` returns."""

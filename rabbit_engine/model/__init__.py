"""The streamed model: the `AutoModel` class, the mixin of its methods, and the parts that run it."""

from rabbit_engine.model.auto import AutoModel, forecast_with_draft, read_settings
from rabbit_engine.model.mixin import StreamingMixin
from rabbit_engine.model.streamed import StreamedModel

__all__ = ["AutoModel", "StreamedModel", "StreamingMixin", "forecast_with_draft", "read_settings"]

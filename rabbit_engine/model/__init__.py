"""The streamed model: the `AutoModel` class, the mixin of its methods, and the parts that run it."""

from rabbit_engine.model.auto import AutoModel, forecast_with_draft, read_settings
from rabbit_engine.model.devices import forecast_row
from rabbit_engine.model.mixin import StreamingMixin
from rabbit_engine.model.streamed import StreamedModel

__all__ = ["AutoModel", "StreamedModel", "StreamingMixin", "forecast_row", "forecast_with_draft", "read_settings"]

"""The streamed model: the `AutoModel` class, the mixin of its methods, and the parts that run it."""

from rabbit_engine.model.auto import AutoModel
from rabbit_engine.model.mixin import StreamingMixin

__all__ = ["AutoModel", "StreamingMixin"]

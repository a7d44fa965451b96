"""Run Hugging Face models that do not fit your memory: one decoder layer at a time, with transformers' own answer."""

from rabbit_engine.errors import RabbitError
from rabbit_engine.model import AutoModel, StreamingMixin
from rabbit_engine.plan import Plan
from rabbit_engine.sessions import Options, Reply, Session
from rabbit_engine.streaming import Profile

__version__ = "0.1.0"

__all__ = ["AutoModel", "Options", "Plan", "Profile", "RabbitError", "Reply", "Session", "StreamingMixin"]

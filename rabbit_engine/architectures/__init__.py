"""What a checkpoint's config says its model is: the class, its modules' layout, and how its weights become the model's."""

from rabbit_engine.architectures.classes import build_skeleton, config_for, find_class, find_config
from rabbit_engine.architectures.conversion import Conversion, Target, gguf_dtype, open_conversion, open_gguf_conversion
from rabbit_engine.architectures.head_dim import corrected_head_dim
from rabbit_engine.architectures.layout import RESIDENT, Layout, find_layout

__all__ = [
    "RESIDENT",
    "Conversion",
    "Layout",
    "Target",
    "build_skeleton",
    "config_for",
    "corrected_head_dim",
    "find_class",
    "find_config",
    "find_layout",
    "gguf_dtype",
    "open_conversion",
    "open_gguf_conversion",
]

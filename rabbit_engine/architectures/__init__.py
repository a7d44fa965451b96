"""What a checkpoint's config says its model is: the class, its modules' layout, and how its weights become the model's."""

from rabbit_engine.architectures.architecture import Architecture, Family
from rabbit_engine.architectures.classes import build_skeleton, find_architecture
from rabbit_engine.architectures.conversion import Conversion, Target, gguf_dtype, open_conversion, open_gguf_conversion
from rabbit_engine.architectures.head_dim import corrected_head_dim
from rabbit_engine.architectures.layout import RESIDENT, Layout, find_layout
from rabbit_engine.architectures.positions import EndOfPositions, refuse_past
from rabbit_engine.architectures.registry import CONVERTED, KNOWN, Known
from rabbit_engine.architectures.remote import explain_failures, keeps_tuples

__all__ = [
    "CONVERTED",
    "KNOWN",
    "RESIDENT",
    "Architecture",
    "Conversion",
    "EndOfPositions",
    "Family",
    "Known",
    "Layout",
    "Target",
    "build_skeleton",
    "corrected_head_dim",
    "explain_failures",
    "find_architecture",
    "find_layout",
    "gguf_dtype",
    "keeps_tuples",
    "open_conversion",
    "open_gguf_conversion",
    "refuse_past",
]

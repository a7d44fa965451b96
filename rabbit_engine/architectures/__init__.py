"""What a checkpoint's config says its model is: the class, its modules' layout, and how its weights become the model's."""

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.blame import blame_for_model
from rabbit_engine.architectures.building import build_skeleton, config_path, initialize, require_layers
from rabbit_engine.architectures.classes import find_architecture
from rabbit_engine.architectures.configfile import stated_dtype
from rabbit_engine.architectures.conversion import (
    Conversion,
    Target,
    gguf_dtype,
    open_conversion,
    open_gguf_conversion,
    warn_of_unused,
)
from rabbit_engine.architectures.generationfile import require_generation_config
from rabbit_engine.architectures.head_dim import corrected_head_dim
from rabbit_engine.architectures.layout import RESIDENT, Layout, find_layout
from rabbit_engine.architectures.positions import capped_length, refuse_past, stated_positions
from rabbit_engine.architectures.record import Proof, Record, read_record
from rabbit_engine.architectures.registry import KNOWN, Known, converted_families, register_family
from rabbit_engine.architectures.remote import explain_failures, keeps_tuples
from rabbit_engine.architectures.wishes import Wishes, read_given_config

__all__ = [
    "KNOWN",
    "RESIDENT",
    "Architecture",
    "Conversion",
    "Family",
    "Known",
    "Layout",
    "Proof",
    "RawConfig",
    "Record",
    "Target",
    "Wishes",
    "blame_for_model",
    "build_skeleton",
    "capped_length",
    "config_path",
    "converted_families",
    "corrected_head_dim",
    "explain_failures",
    "find_architecture",
    "find_layout",
    "gguf_dtype",
    "initialize",
    "keeps_tuples",
    "open_conversion",
    "open_gguf_conversion",
    "read_given_config",
    "read_record",
    "refuse_past",
    "register_family",
    "require_generation_config",
    "require_layers",
    "stated_dtype",
    "stated_positions",
    "warn_of_unused",
]

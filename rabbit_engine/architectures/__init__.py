"""What a checkpoint's config describes: the model class, its module layout, and how stored weights map to the model's."""

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.building import build_architecture, build_skeleton, config_path, initialize, require_layers
from rabbit_engine.architectures.classes import find_architecture
from rabbit_engine.architectures.configfile import stated_dtype
from rabbit_engine.architectures.conversion import (
    Conversion,
    Target,
    gguf_dtype,
    gguf_sources,
    open_conversion,
    open_gguf,
    open_gguf_conversion,
    warn_of_unused,
)
from rabbit_engine.architectures.faulty_key import faulty_key_of_model
from rabbit_engine.architectures.generationfile import require_generation_config
from rabbit_engine.architectures.gguf_config import GgufConfigFile
from rabbit_engine.architectures.head_dim import corrected_head_dim, stated_head_dim
from rabbit_engine.architectures.layout import RESIDENT, Layout, find_layout
from rabbit_engine.architectures.lengths import sliding_window, stated_lengths, template_in, template_of
from rabbit_engine.architectures.overrides import ConfigOverrides, read_given_config
from rabbit_engine.architectures.positions import capped_length, refuse_past, stated_positions
from rabbit_engine.architectures.purpose import auto_class_of, auto_classes_for, task_of
from rabbit_engine.architectures.record import Proof, Record, read_record, recorded_speculation
from rabbit_engine.architectures.registry import KNOWN, Known, converted_families, register_family, unregister_family
from rabbit_engine.architectures.remote import explain_failures, keeps_tuples

__all__ = [
    "KNOWN",
    "RESIDENT",
    "Architecture",
    "ConfigOverrides",
    "Conversion",
    "Family",
    "GgufConfigFile",
    "Known",
    "Layout",
    "Proof",
    "RawConfig",
    "Record",
    "Target",
    "auto_class_of",
    "auto_classes_for",
    "build_architecture",
    "build_skeleton",
    "capped_length",
    "config_path",
    "converted_families",
    "corrected_head_dim",
    "explain_failures",
    "faulty_key_of_model",
    "find_architecture",
    "find_layout",
    "gguf_dtype",
    "gguf_sources",
    "initialize",
    "keeps_tuples",
    "open_conversion",
    "open_gguf",
    "open_gguf_conversion",
    "read_given_config",
    "read_record",
    "recorded_speculation",
    "refuse_past",
    "register_family",
    "require_generation_config",
    "require_layers",
    "sliding_window",
    "stated_dtype",
    "stated_head_dim",
    "stated_lengths",
    "stated_positions",
    "task_of",
    "template_in",
    "template_of",
    "unregister_family",
    "warn_of_unused",
]

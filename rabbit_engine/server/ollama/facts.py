"""What is known of a model: of one that was loaded, and of one that was only described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rabbit_engine.model.capabilities import Capabilities, quantization_of, stored_types
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.server.ollama.asking import has_reasoning, template_reasons
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.images import ImageProcessor
from rabbit_engine.sessions.template import reads

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
}
"""Settings of a generation config, and Ollama's names for them."""

_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""GGUF's names of sizes, and those of a config."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model once it was loaded; of another one nothing is."""

    details: Mapping[str, object]
    weights_bytes: int = 0
    info: Mapping[str, object] = field(default_factory=dict)
    template: str = ""
    parameters: str = ""
    capabilities: tuple[str, ...] = ("completion",)


UNKNOWN = ModelFacts(
    {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
)


def facts_of(session: Session) -> ModelFacts:
    """What a loaded model is."""
    model: Any = session.model
    config, source = model.config, runtime_of(model).checkpoint
    family, parameters = str(config.model_type), int(model.num_parameters())
    stored = stored_types(source)
    form = "safetensors" if source.request.gguf is None else "gguf"
    return ModelFacts(
        details=_details(family, form, parameters, quantization_of(source), next(iter(stored), "")),
        weights_bytes=sum(stored.values()),
        info={
            "general.architecture": family,
            "general.parameter_count": parameters,
            f"{family}.context_length": session.most_tokens,
            **_sizes(family, config.get_text_config()),
        },
        template=str(getattr(model.tokenizer, "chat_template", None) or ""),
        parameters=_parameters(session),
        capabilities=_capabilities(session),
    )


def described_facts(found: Capabilities) -> ModelFacts:
    """What a model is that was not loaded. Its length is the one that it states: memory may allow less."""
    family, level = found.model_type, found.quantization
    is_gguf = level == "gguf"
    length = {} if found.context_length is None else {f"{family}.context_length": found.context_length}
    return ModelFacts(
        details=_details(family, "gguf" if is_gguf else "safetensors", found.parameters, level, next(iter(found.stored), "")),
        weights_bytes=found.weights_bytes,
        info={
            "general.architecture": family,
            "general.parameter_count": found.parameters,
            **length,
            f"{family}.block_count": found.layers,
        },
        template=found.chat_template,
        parameters="" if found.context_length is None else f"{'num_ctx':<30} {found.context_length}",
        capabilities=_described_capabilities(found),
    )


def _described_capabilities(found: Capabilities) -> tuple[str, ...]:
    embeds = found.task == "feature-extraction"
    if not found.can_generate:
        return ("embedding",)
    has = {
        "completion": True,
        "vision": found.task == "image-text-to-text",
        "tools": reads(found.chat_template, "tools"),
        "thinking": template_reasons(found.chat_template),
        "embedding": embeds,
    }
    return tuple(name for name, own in has.items() if own)


def _details(family: str, form: str, parameters: int, quantization: str | None, stored: str) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": form,
        "family": family,
        "families": [family],
        "parameter_size": spell_count(parameters),
        "quantization_level": stored if quantization in (None, "gguf") else quantization,
    }


def spell_count(count: int) -> str:
    """A number of parameters: 134.52M."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _sizes(family: str, config: object) -> dict[str, object]:
    found = {name: getattr(config, own, None) for name, own in _SIZES.items()}
    return {f"{family}.{name}": value for name, value in found.items() if isinstance(value, int)}


def _parameters(session: Session) -> str:
    """The defaults of an answer, a line each."""
    lines = {"num_ctx": session.most_tokens}
    config: Any = session.model.generation_config if session.model.can_generate() else None
    if config is not None and config.do_sample:
        lines |= {name: value for own, name in _SAMPLING.items() if (value := getattr(config, own, None)) is not None}
    return "\n".join(f"{name:<30} {value}" for name, value in lines.items())


def _capabilities(session: Session) -> tuple[str, ...]:
    if not session.model.can_generate():
        return ("embedding",)
    found = {
        "completion": True,
        "vision": ImageProcessor(session.model).takes_images,
        "tools": session.template_reads("tools"),
        "thinking": has_reasoning(session),
        "embedding": session.embedder is not None,
    }
    return tuple(name for name, has in found.items() if has)

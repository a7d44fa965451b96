"""What Ollama's clients are told about models: the lists of those that are served and loaded, and the details of one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from rabbit_engine.model.capabilities import quantization_of, stored_types
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.server.hosting import LATEST, Host, Served
from rabbit_engine.server.ollama.asking import has_reasoning
from rabbit_engine.server.ollama.wire import timestamp
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.images import ImageProcessor

_LONGEST = timedelta(days=292 * 365)
"""When a model that stays forever is unloaded, as Ollama says it."""

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


class Cards:
    """Describes the models of a host. What was learnt from a loaded model is kept."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._known: dict[str, ModelFacts] = {}

    def served(self) -> list[dict[str, object]]:
        """All models."""
        return [self._card(name, self.facts(name)) for name in self._host.names]

    def loaded(self) -> list[dict[str, object]]:
        """The models in memory, with the time when each is unloaded if it is not used."""
        return [self._loaded_card(served) for served in reversed(self._host.loaded)]

    def details(self, name: str) -> dict[str, object]:
        """What is known of one."""
        facts = self.facts(name)
        return {
            "modelfile": f"# {tagged(name)} is served by rabbit_engine\nFROM {name}\n",
            "parameters": facts.parameters,
            "template": facts.template,
            "details": facts.details,
            "model_info": {"general.basename": name, **facts.info},
            "capabilities": list(facts.capabilities),
            "modified_at": self._since(),
        }

    def facts(self, name: str) -> ModelFacts:
        """What is known of a model."""
        for served in self._host.loaded:
            if served.name == name and name not in self._known:
                self._known[name] = facts_of(served.session)
        return self._known.get(name, UNKNOWN)

    def _loaded_card(self, served: Served) -> dict[str, object]:
        plan = served.session.model.plan
        device = plan.device_bytes + plan.reserved_bytes
        return {
            **self._card(served.name, self.facts(served.name)),
            "size": device + plan.host_bytes,
            "size_vram": 0 if plan.device == "cpu" else device,
            "expires_at": _expires(served),
            "context_length": served.session.most_tokens,
        }

    def _card(self, name: str, facts: ModelFacts) -> dict[str, object]:
        return {
            "name": tagged(name),
            "model": tagged(name),
            "modified_at": self._since(),
            "size": facts.weights_bytes,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": facts.details,
        }

    def _since(self) -> str:
        return timestamp(datetime.fromtimestamp(self._host.created, UTC))


def tagged(name: str) -> str:
    """A name with a tag: clients append one to names without, and look for that in the list."""
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def facts_of(session: Session) -> ModelFacts:
    """What a loaded model is."""
    model: Any = session.model
    config, source = model.config, runtime_of(model).checkpoint
    family, level = str(config.model_type), quantization_of(source)
    if level in (None, "gguf"):
        level = next(iter(stored_types(source)), "")
    parameters = int(model.num_parameters())
    return ModelFacts(
        details={
            "parent_model": "",
            "format": "safetensors" if source.request.gguf is None else "gguf",
            "family": family,
            "families": [family],
            "parameter_size": spell_count(parameters),
            "quantization_level": level,
        },
        weights_bytes=model.plan.weights_bytes,
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


def _expires(served: Served) -> str:
    """When an idle model is unloaded; one in use, that time from now."""
    end_s = time.monotonic() + served.keep_alive_s if served.users else served.idle_until_s
    left_s = min(end_s - time.monotonic(), _LONGEST.total_seconds())
    return timestamp(datetime.now(UTC) + timedelta(seconds=max(0.0, left_s)))

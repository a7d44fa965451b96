"""Every family that this library knows by name: classes of transformers with the place of their layers, and converted families.

A class that is not listed takes the generic path: its layers are searched for in the module tree, which is logged.
"""

from __future__ import annotations

from dataclasses import dataclass

from rabbit_engine.architectures.architecture import Family, RawConfig
from rabbit_engine.architectures.families import baichuan, chatglm, internlm, qwen

_converted: list[Family] = [*chatglm.FAMILIES, *qwen.FAMILIES, *internlm.FAMILIES, *baichuan.FAMILIES]


@dataclass(frozen=True, slots=True)
class Known:
    """A class of transformers: the names of its models and of its lists of blocks.

    `layers` names the decoder's list; `towers` the lists that run only for images, under the names of all versions.
    """

    cls: str
    models: str
    layers: str = "model.layers"
    towers: tuple[str, ...] = ()


_INSIDE = "model.language_model.layers"
_VISION = ("vision_model.model.layers",)
_VISUAL = ("model.visual.blocks",)
_SIGLIP = ("model.vision_tower.encoder.layers", "model.vision_tower.vision_model.encoder.layers")

KNOWN: tuple[Known, ...] = (
    Known("LlamaForCausalLM", "Llama 2, 3, 3.1, 3.2; SmolLM2; Yi; Vicuna"),
    Known("Llama4ForCausalLM", "Llama 4, text"),
    Known("Llama4ForConditionalGeneration", "Llama 4, image and text", "language_model.model.layers", _VISION),
    Known("Qwen2ForCausalLM", "Qwen1.5, Qwen2, Qwen2.5"),
    Known("Qwen3ForCausalLM", "Qwen3"),
    Known("Qwen2MoeForCausalLM", "Qwen1.5-MoE, Qwen2-MoE"),
    Known("Qwen3MoeForCausalLM", "Qwen3-MoE"),
    Known("Qwen3NextForCausalLM", "Qwen3-Next"),
    Known("Qwen3_5ForCausalLM", "Qwen3.5, text"),
    Known("Qwen3_5ForConditionalGeneration", "Qwen3.5, image and text", _INSIDE, _VISUAL),
    Known("Qwen3_5MoeForCausalLM", "Qwen3.5-MoE, text"),
    Known("Qwen2VLForConditionalGeneration", "Qwen2-VL, image and text", _INSIDE, _VISUAL),
    Known("Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL, image and text", _INSIDE, _VISUAL),
    Known("MistralForCausalLM", "Mistral, Mistral-Nemo"),
    Known("MinistralForCausalLM", "Ministral"),
    Known("Ministral3ForCausalLM", "Ministral 3, text"),
    Known("Mistral3ForConditionalGeneration", "Mistral 3, image and text", _INSIDE, ("model.vision_tower.transformer.layers",)),
    Known("MixtralForCausalLM", "Mixtral"),
    Known("GemmaForCausalLM", "Gemma"),
    Known("Gemma2ForCausalLM", "Gemma 2"),
    Known("Gemma3ForCausalLM", "Gemma 3, text"),
    Known("Gemma3ForConditionalGeneration", "Gemma 3, image and text", _INSIDE, _SIGLIP),
    Known("Gemma3nForCausalLM", "Gemma 3n, text"),
    Known("Gemma4ForCausalLM", "Gemma 4, text"),
    Known("PhiForCausalLM", "Phi-1.5, Phi-2"),
    Known("Phi3ForCausalLM", "Phi-3, Phi-4, Phi-4-mini"),
    Known("PhimoeForCausalLM", "Phi-3.5-MoE"),
    Known("DeepseekV2ForCausalLM", "DeepSeek-V2"),
    Known("DeepseekV3ForCausalLM", "DeepSeek-V3, R1"),
    Known("GlmForCausalLM", "GLM-4-9B (hf)"),
    Known("Glm4ForCausalLM", "GLM-4-0414"),
    Known("Glm4MoeForCausalLM", "GLM-4.5, GLM-4.6"),
    Known("GptOssForCausalLM", "GPT-OSS"),
    Known("AlibiLlamaForCausalLM", "Baichuan-13B, Baichuan2-13B, converted"),
    Known("GPT2LMHeadModel", "GPT-2", "transformer.h"),
    Known("OPTForCausalLM", "OPT", "model.decoder.layers"),
    Known("BloomForCausalLM", "BLOOM", "transformer.h"),
    Known("FalconForCausalLM", "Falcon", "transformer.h"),
    Known("MptForCausalLM", "MPT", "transformer.blocks"),
    Known("GPTNeoXForCausalLM", "GPT-NeoX, Pythia", "gpt_neox.layers"),
    Known("CohereForCausalLM", "Command R"),
    Known("Cohere2ForCausalLM", "Command R7B"),
    Known("GraniteForCausalLM", "Granite"),
    Known("OlmoForCausalLM", "OLMo"),
    Known("Olmo2ForCausalLM", "OLMo 2"),
    Known("StableLmForCausalLM", "StableLM"),
    Known("Starcoder2ForCausalLM", "StarCoder2"),
    Known("SmolLM3ForCausalLM", "SmolLM3"),
    Known("MambaForCausalLM", "Mamba", "backbone.layers"),
    Known("JambaForCausalLM", "Jamba"),
    Known("Mamba2ForCausalLM", "Mamba 2", "backbone.layers"),
    Known("BambaForCausalLM", "Bamba"),
    Known("FalconH1ForCausalLM", "Falcon-H1"),
    Known("Lfm2ForCausalLM", "LFM2"),
)
"""Tested classes of transformers; COMPATIBILITY.md holds the results."""

_BY_CLASS = {known.cls: known for known in KNOWN}


def find_known(class_name: str) -> Known | None:
    """The entry of a class of transformers, or None if its layers have to be searched for."""
    return _BY_CLASS.get(class_name)


def converted_families() -> tuple[Family, ...]:
    """Families whose checkpoints are converted to another class, last registered first; none of their own code runs."""
    return tuple(_converted)


def register_family(family: Family) -> None:
    """Convert the checkpoints of `family` from now on; it takes precedence over families registered earlier.

    A family of the same name is replaced. docs/adding-a-model.md shows how to write one.
    """
    _converted[:] = [family, *(other for other in _converted if other.name != family.name)]


def unregister_family(name: str) -> None:
    """Convert the checkpoints of that family no more."""
    _converted[:] = [other for other in _converted if other.name != name]


def find_family(raw: RawConfig) -> Family | None:
    """The family that converts a config.json, or None if transformers has a class for it."""
    return next((family for family in _converted if family.owns(raw)), None)

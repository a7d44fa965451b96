"""The rows of COMPATIBILITY.md's table: which models, the checkpoint's class, and the tiny model that represents them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ORACLES = Path(__file__).parent / "data" / "oracles"
"""Tiny checkpoints in their authors' format, with what the authors' own code makes of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """`family` names a tiny model of families.py that transformers itself makes and answers for."""

    models: str
    cls: str
    family: str


NATIVE = (
    Row("Llama 2", "LlamaForCausalLM", "llama2"),
    Row("Llama 3", "LlamaForCausalLM", "llama"),
    Row("Llama 3.1", "LlamaForCausalLM", "llama3_rope"),
    Row("Llama 3.2", "LlamaForCausalLM", "llama3_tied"),
    Row("Llama 4, text", "Llama4ForCausalLM", "llama4"),
    Row("Qwen2", "Qwen2ForCausalLM", "qwen2"),
    Row("Qwen2.5", "Qwen2ForCausalLM", "qwen2_untied"),
    Row("Qwen3", "Qwen3ForCausalLM", "qwen3"),
    Row("Qwen2-MoE", "Qwen2MoeForCausalLM", "qwen2_moe"),
    Row("Qwen3-MoE", "Qwen3MoeForCausalLM", "qwen3_moe"),
    Row("Qwen3-Next", "Qwen3NextForCausalLM", "qwen3_next"),
    Row("Qwen3.5, text", "Qwen3_5ForCausalLM", "qwen3_5"),
    Row("Qwen3.5-MoE, text", "Qwen3_5MoeForCausalLM", "qwen3_5_moe"),
    Row("Mistral", "MistralForCausalLM", "mistral"),
    Row("Ministral", "MinistralForCausalLM", "ministral"),
    Row("Ministral 3", "Ministral3ForCausalLM", "ministral3"),
    Row("Mixtral", "MixtralForCausalLM", "mixtral"),
    Row("Gemma 1", "GemmaForCausalLM", "gemma"),
    Row("Gemma 2", "Gemma2ForCausalLM", "gemma2"),
    Row("Gemma 3, text", "Gemma3ForCausalLM", "gemma3"),
    Row("Gemma 3n, text", "Gemma3nForCausalLM", "gemma3n"),
    Row("Gemma 4, text", "Gemma4ForCausalLM", "gemma4"),
    Row("Phi-2", "PhiForCausalLM", "phi"),
    Row("Phi-3", "Phi3ForCausalLM", "phi3"),
    Row("Phi-4-mini", "Phi3ForCausalLM", "phi4"),
    Row("Phi-3.5-MoE", "PhimoeForCausalLM", "phimoe"),
    Row("DeepSeek-V2", "DeepseekV2ForCausalLM", "deepseek_v2"),
    Row("DeepSeek-V3", "DeepseekV3ForCausalLM", "deepseek_v3"),
    Row("GLM-4-9B (hf)", "GlmForCausalLM", "glm"),
    Row("GLM-4-0414", "Glm4ForCausalLM", "glm4"),
    Row("GLM-4.5", "Glm4MoeForCausalLM", "glm4_moe"),
    Row("GPT-OSS", "GptOssForCausalLM", "gpt_oss"),
    Row("GPT-2", "GPT2LMHeadModel", "gpt2"),
    Row("OPT", "OPTForCausalLM", "opt"),
    Row("BLOOM", "BloomForCausalLM", "bloom"),
    Row("Falcon", "FalconForCausalLM", "falcon"),
    Row("MPT", "MptForCausalLM", "mpt"),
    Row("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "gpt_neox"),
    Row("Command R", "CohereForCausalLM", "cohere"),
    Row("Command R7B", "Cohere2ForCausalLM", "cohere2"),
    Row("Granite", "GraniteForCausalLM", "granite"),
    Row("OLMo", "OlmoForCausalLM", "olmo"),
    Row("OLMo 2", "Olmo2ForCausalLM", "olmo2"),
    Row("StableLM", "StableLmForCausalLM", "stablelm"),
    Row("StarCoder2", "Starcoder2ForCausalLM", "starcoder2"),
    Row("SmolLM3", "SmolLM3ForCausalLM", "smollm3"),
    Row("Mamba", "MambaForCausalLM", "mamba"),
    Row("Jamba", "JambaForCausalLM", "jamba"),
    Row("Mamba 2", "Mamba2ForCausalLM", "mamba2"),
    Row("Bamba", "BambaForCausalLM", "bamba"),
    Row("Falcon-H1", "FalconH1ForCausalLM", "falcon_h1"),
    Row("LFM2", "Lfm2ForCausalLM", "lfm2"),
)

IMAGE_TEXT = (
    Row("Llama 4, image and text", "Llama4ForConditionalGeneration", "llama4_image"),
    Row("Gemma 3, image and text", "Gemma3ForConditionalGeneration", "gemma3_image"),
    Row("Qwen2-VL", "Qwen2VLForConditionalGeneration", "qwen2_vl"),
    Row("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
    Row("Qwen3.5, image and text", "Qwen3_5ForConditionalGeneration", "qwen3_5_image"),
    Row("Mistral 3, image and text", "Mistral3ForConditionalGeneration", "mistral3_image"),
)


@dataclass(frozen=True, slots=True)
class ConvertedRow:
    """`folders` below ORACLES hold its tiny checkpoints; the authors' own code answered for them."""

    models: str
    cls: str
    folders: tuple[str, ...]


CONVERTED = (
    ConvertedRow("ChatGLM2-6B", "ChatGLMModel", ("chatglm2", "chatglm2_32k", "chatglm_mha")),
    ConvertedRow("ChatGLM3-6B", "ChatGLMModel", ("chatglm3", "chatglm3_32k", "chatglm_wide")),
    ConvertedRow("GLM-4-9B", "ChatGLMModel", ("glm4_9b",)),
    ConvertedRow("QWen v1", "QWenLMHeadModel", ("qwen", "qwen_wide", "qwen_bias", "qwen_plain_long")),
    ConvertedRow("InternLM", "InternLMForCausalLM", ("internlm1_7b", "internlm1_20b")),
    ConvertedRow("InternLM2", "InternLM2ForCausalLM", ("internlm2", "internlm2_bias", "internlm2_dynamic", "internlm2_mha")),
    ConvertedRow("Baichuan-7B", "BaiChuanForCausalLM", ("baichuan1_7b",)),
    ConvertedRow("Baichuan-13B", "BaichuanForCausalLM", ("baichuan1_13b",)),
    ConvertedRow("Baichuan2-7B", "BaichuanForCausalLM", ("baichuan2_7b",)),
    ConvertedRow("Baichuan2-13B", "BaichuanForCausalLM", ("baichuan2_13b", "baichuan2_13b_six")),
)

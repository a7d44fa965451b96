"""What the record says of a class decides how its guesses are verified; other classes are tried first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from guessing import Guided
from test_matrix import speculation_of
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from rabbit_engine.architectures import read_record, recorded_speculation
from rabbit_engine.decoding import Findings
from rabbit_engine.model.speculating import findings_of

TOKENS = 24
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}


def prompt(tokens: int = 21) -> torch.Tensor:
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


def speculated(model: Any, ids: torch.Tensor) -> tuple[str, int]:
    """How the whole answer was verified, guessed rightly from its second token on, and the passes; its text is as without."""
    expected = model.generate(ids, **GREEDY)
    before = model.profile.passes
    draft = Guided(expected[0].tolist(), agreement=1.0, branches=0, nodes=TOKENS)
    assert torch.equal(model.generate(ids, speculate=draft, **GREEDY), expected)
    return findings_of(model).used, model.profile.passes - before


@pytest.mark.parametrize(("family", "way"), [("llama", "tree"), ("mpt", "chain"), ("qwen3_next", "carry")])
def test_class_of_the_record_guesses_from_its_first_token_on(family: str, way: str, checkpoint: Any, streamed: Any) -> None:
    assert speculated(streamed(checkpoint(family), dtype="float32"), prompt()) == (way, 2)


def test_class_recorded_as_plain_is_not_tried_and_the_log_says_why(
    checkpoint: Any, streamed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = streamed(checkpoint("jamba"), dtype="float32")
    with caplog.at_level(logging.INFO, "rabbit_engine"):
        assert speculated(model, prompt()) == ("plain: other numbers for several tokens than for one", TOKENS)
    assert "without speculation: other numbers for several tokens than for one" in caplog.text


def test_class_that_is_not_in_the_record_is_tried_first(tmp_path: Path, streamed: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    FalconForCausalLM(FalconConfig(**sizes, alibi=True, eos_token_id=None)).save_pretrained(tmp_path)
    way, passes = speculated(streamed(tmp_path, dtype="float32"), prompt())
    assert way == "chain"
    assert 2 < passes < TOKENS


def sparse(folder: Path, heads: int) -> Path:
    """A model with an indexer of that many heads, which selects 16 keys; with few heads, scores of keys are often equal."""
    torch.manual_seed(0)
    names = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    indexer = {"index_n_heads": heads, "index_head_dim": 16, "index_topk": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**sizes, **dict.fromkeys(names, 8), **indexer, **experts, eos_token_id=None))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


KEPT_ELSEWHERE: dict[str, dict[str, Any]] = {
    "MiniMax": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "RecurrentGemma": {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
}
"""Models whose states are not in the layers of their caches: in the cache itself, or in modules."""


@pytest.mark.parametrize("family", KEPT_ELSEWHERE)
def test_states_outside_the_layers_of_a_cache_are_not_touched(family: str, tmp_path: Path, streamed: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes | {"eos_token_id": None} | KEPT_ELSEWHERE[family])
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    way, passes = speculated(streamed(tmp_path, dtype="float32"), prompt())
    assert way.startswith("plain: a")
    assert passes == TOKENS


def test_model_with_an_indexer_verifies_trees(tmp_path: Path, streamed: Any) -> None:
    model = streamed(sparse(tmp_path, heads=32), dtype="float32")
    assert speculation_of(model, {"input_ids": prompt()}) == "tree"


def test_model_is_tried_again_where_it_begins_to_select_keys(tmp_path: Path, streamed: Any) -> None:
    model = streamed(sparse(tmp_path, heads=2), dtype="float32")
    way, passes = speculated(model, prompt(5))
    assert findings_of(model).refused
    assert way.startswith("plain: other numbers")
    assert passes < TOKENS


def test_model_without_a_cache_decodes_plainly_and_says_so(tmp_path: Path, streamed: Any) -> None:
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    assert speculated(streamed(tmp_path, dtype="float32"), prompt()) == ("plain: each pass computes the whole text", TOKENS)


def test_model_that_refuses_several_tokens_behind_a_cache_decodes_plainly(tmp_path: Path, streamed: Any) -> None:
    torch.manual_seed(0)
    layers = {
        "num_decoder_layers": 3,
        "num_encoder_layers": 3,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
    }
    sizes = {"hidden_size": 32, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "vocab_size": 96, "max_position_embeddings": 64}
    config = transformers.ProphetNetConfig(**layers, **sizes, eos_token_id=None, is_decoder=True, is_encoder_decoder=False)
    transformers.ProphetNetForCausalLM(config).save_pretrained(tmp_path)
    way, _ = speculated(streamed(tmp_path, dtype="float32"), prompt())
    assert way.startswith("plain: ")


def cross_attending() -> transformers.PreTrainedModel:
    """A model whose second layer attends to an image, by a mask with a row for each token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "cross_attention_layers": [1], "eos_token_id": None, "pad_token_id": 0}
    eyes = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1}
    tiles = {
        "attention_heads": 4,
        "intermediate_size": 48,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "max_num_tiles": 1,
    }
    config = transformers.MllamaConfig(text_config=text, vision_config={**eyes, **tiles, "supported_aspect_ratios": [[1, 1]]})
    model = transformers.MllamaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model


def test_keyword_with_a_value_for_each_token_that_is_not_known_decodes_plainly(tmp_path: Path, streamed: Any) -> None:
    cross_attending().save_pretrained(tmp_path)
    model, ids = streamed(tmp_path, dtype="float32"), prompt()
    ratio = {"aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    image = {"pixel_values": torch.randn(1, 1, 1, 3, 28, 28), "cross_attention_mask": torch.ones(1, 21, 1, 1, dtype=torch.long)}
    keywords = {"input_ids": ids, **ratio, **image, **GREEDY}
    expected = model.generate(**keywords)
    draft = Guided(expected[0].tolist(), agreement=1.0)
    assert torch.equal(model.generate(**keywords, speculate=draft), expected)
    assert findings_of(model).used.startswith("plain: ")


def test_record_does_not_vouch_for_other_code_nor_other_biases() -> None:
    own = type("LlamaForCausalLM", (), {"__module__": "transformers_modules.repo.modeling_llama"})
    assert recorded_speculation(LlamaForCausalLM, LlamaConfig()) == "tree"
    assert recorded_speculation(own, LlamaConfig()) == ""
    assert recorded_speculation(FalconForCausalLM, FalconConfig()) == "tree"
    assert recorded_speculation(FalconForCausalLM, FalconConfig(alibi=True)) == ""


def test_every_row_of_the_record_says_how_guesses_are_verified() -> None:
    assert all(row.columns["speculation"] and Findings.recorded(row.columns["speculation"]) for row in read_record().rows)

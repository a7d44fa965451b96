"""What each module of `rabbit_engine.transformers_bridge` relies on, asked of transformers itself on small models."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from rabbit_engine.transformers_bridge import attention, building, forwards, tied_weights

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


IDS = torch.tensor([[3, 5, 7]])

# forwards


@pytest.mark.parametrize("model", [llama(), MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))])
def test_the_cache_of_an_output_goes_back_in_by_the_forwards_own_keyword(model: Any) -> None:
    cache = forwards.cache_of(model(IDS, use_cache=True))
    (keyword,) = forwards.cache_argument(model.forward, cache)
    assert keyword in inspect.signature(model.forward).parameters
    after = model(IDS[:, -1:], use_cache=True, **{keyword: cache})
    assert forwards.cache_of(after) is cache


def test_there_is_no_cache_where_none_was_asked_for() -> None:
    assert forwards.cache_of(llama()(IDS, use_cache=False)) is None


def test_a_forward_that_can_runs_its_head_on_the_last_position_alone() -> None:
    model = llama()
    last = model(IDS, **forwards.last_logits_argument(model.forward)).logits
    torch.testing.assert_close(last, model(IDS).logits[:, -1:])
    assert forwards.last_logits_argument(lambda input_ids: input_ids) == {}


# attention


def test_a_config_names_the_attention_that_its_model_runs() -> None:
    config = LlamaConfig(**SIZES)
    assert attention.attention_of(config) is None
    assert attention.attention_of(LlamaForCausalLM(config).config) == "sdpa"


def test_classes_say_which_attention_they_have() -> None:
    assert attention.has_sdpa(LlamaForCausalLM)
    assert not attention.has_sdpa(GptOssForCausalLM)
    assert attention.has_flash_attention(LlamaForCausalLM)


def test_a_class_can_refuse_flash_attention() -> None:
    class Masked(LlamaForCausalLM):
        pass

    assert not attention.has_flash_attention(attention.without_flash_attention(Masked))
    assert attention.has_flash_attention(LlamaForCausalLM)
    assert attention.has_sdpa(Masked)


def test_flash_attention_becomes_sdpa_for_a_while() -> None:
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with attention.sdpa_for_flash_attention(model):
        assert attention.attention_of(model.model.config) == "sdpa"
    assert attention.attention_of(model.config) == "flash_attention_2"
    eager = llama(attn_implementation="eager")
    with attention.sdpa_for_flash_attention(eager):
        assert attention.attention_of(eager.config) == "eager"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_every_layer_looks_its_attention_function_up(name: str) -> None:
    model, calls = llama(attn_implementation=name), []

    def counted(found: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(found)
            return function(*args, **kwargs)

        return call

    expected = model(IDS).logits
    with attention.wrapped_attention(counted):
        result = model(IDS).logits
    assert (calls, result.equal(expected)) == ([name, name], True)
    model(IDS)
    assert len(calls) == 2


# tied weights


def test_tied_weights_name_what_shares_a_tensor() -> None:
    assert tied_weights.tied_weights(llama(tie_word_embeddings=True)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_weights.tied_weights(llama(tie_word_embeddings=False)) == {}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1))
    assert tied_weights.tied_weights(gpt2) == {"lm_head.weight": "transformer.wte.weight"}


def test_an_untied_weight_stays_apart_when_the_others_are_tied() -> None:
    model = llama(tie_word_embeddings=True)
    tied_weights.untie(model, "lm_head.weight")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(32, 16))
    model.tie_weights(recompute_mapping=False)
    assert not model.lm_head.weight.equal(model.model.embed_tokens.weight)
    assert tied_weights.tied_weights(model) == {}


# building


def test_a_model_is_built_without_weights() -> None:
    model = building.build_without_weights(LlamaForCausalLM, LlamaConfig(**SIZES), torch.bfloat16, "eager")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.training, attention.attention_of(model.config)) == (False, "eager")
    assert list(model.state_dict()) == list(llama().state_dict())
    with pytest.raises(ValueError, match="attention"):
        building.build_without_weights(GptOssForCausalLM, transformers.GptOssConfig(num_hidden_layers=1), torch.float32, "sdpa")


def test_code_that_reads_values_while_it_is_built_gets_them() -> None:
    class Reading(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.rates = [float(rate) for rate in torch.linspace(0, 1, 3)]

    assert building.build_without_weights(Reading, LlamaConfig(**SIZES), torch.float32).rates == [0.0, 0.5, 1.0]


def test_what_is_marked_as_loaded_keeps_its_values_and_the_rest_is_made() -> None:
    model = building.build_without_weights(LlamaForCausalLM, LlamaConfig(**SIZES), torch.float32).to_empty(device="cpu")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.fill_(7)
        if "norm" not in name and "inv_freq" not in name:
            building.mark_loaded(tensor)
    building.initialize_the_rest(model)
    whole = llama()
    assert model.lm_head.weight.eq(7).all()
    assert model.model.norm.weight.equal(whole.model.norm.weight)
    assert model.model.rotary_emb.inv_freq.equal(whole.model.rotary_emb.inv_freq)

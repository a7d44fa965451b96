"""What the modules of `rabbit_engine.transformers_bridge` about models rely on, asked of transformers itself."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from private_names import private_uses
from tiny import IDS, SIZES, llama, mixtral
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    modeling_layers,
)
from transformers.integrations.moe import use_experts_implementation

import rabbit_engine
from rabbit_engine.transformers_bridge import (
    attention,
    building,
    experts,
    faults,
    forwards,
    generation,
    rotary,
    tied_weights,
)
from rabbit_engine.transformers_bridge.llama import MaskedLlamaAttention, replace_attention
from rabbit_engine.transformers_bridge.multi_token import can_run_heads

PACKAGE = Path(rabbit_engine.__file__).parent

WORDS_OF_FILES = {
    "architectures/families/chatglm.py": {"_name_or_path"},
    "tokenization/build.py": {"_name_or_path"},
    "server/openai/fields.py": {"_from_model_config", "_commit_hash", "_original_object_hash"},
    "utils/keywords.py": {"_commit_hash", "_from_auto", "_from_pipeline"},
}
"""Keys of config.json, of a client's generation config, and keywords of `from_pretrained`, which only look like attributes."""


FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("transformers_bridge/")])
def test_nothing_private_of_transformers_is_used_outside_the_bridge(file: str) -> None:
    words = {repr(word) for word in WORDS_OF_FILES.get(file, ())}
    uses = private_uses((PACKAGE / file).read_text("utf-8"))
    assert [use for use in uses if use.partition(": ")[2] not in words] == []


@pytest.mark.parametrize(
    "source",
    [
        "import transformers.modeling_utils",
        "from transformers.cache_utils import DynamicCache",
        "from transformers import modeling_utils",
        "from transformers import core_model_loading",
        "from transformers import no_such_name",
        "import transformers\ntransformers.modeling_utils.load_state_dict",
        "import_module('transformers.masking_utils')",
        "name.startswith('transformers.generation.')",
        "model._from_config(config)",
        "config._attn_implementation = 'sdpa'",
        "getattr(cls, '_supports_sdpa', False)",
        "type('Made', (cls,), {'_supports_default_dynamic_cache': None})",
        "model.all_tied_weights_keys.pop('lm_head.weight')",
        "setattr(tensor, '_is_hf_initialized', True)",
        "from transformers import LlamaModel\nclass Own(LlamaModel):\n    _supports_sdpa = False",
        "from transformers import PreTrainedTokenizer\nclass Own(PreTrainedTokenizer):\n    def _tokenize(self, text): ...",
        "from transformers import LlamaModel\nclass A(LlamaModel): ...\nclass B(A):\n    def f(self): return self._supports_sdpa",
        "class OwnMixin:\n    def _decode(self, ids): ...",
    ],
)
def test_a_private_use_is_found(source: str) -> None:
    assert private_uses(source)


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import AutoModelForCausalLM, WeightConverter, logging",
        "import transformers\ntransformers.LlamaConfig(), transformers.__version__, transformers.logging.set_verbosity_error()",
        "sys.modules.get('transformers.utils.logging')",
        "raise ValueError('make it with transformers.AutoModelForCausalLM')",
        "class Own:\n    def __init__(self): self._tokenizer = None\n    def _decode(self): return self._tokenizer",
        "model.config.name_or_path, module._parameters, tokenizer.backend_tokenizer",
    ],
)
def test_a_public_use_is_left_alone(source: str) -> None:
    assert private_uses(source) == []


# forwards


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).eval()


@pytest.mark.parametrize("make", [llama, mamba])
def test_the_cache_of_an_output_goes_back_in_by_the_forwards_own_keyword(make: Any) -> None:
    model = make()
    cache = forwards.cache_of(model(IDS, use_cache=True))
    (keyword,) = forwards.cache_argument(model.forward, cache)
    assert keyword in inspect.signature(model.forward).parameters
    after = model(IDS[:, -1:], use_cache=True, **{keyword: cache})
    assert forwards.cache_of(after) is cache


def test_there_is_no_cache_if_none_was_requested() -> None:
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


def test_wrappers_of_attention_end_in_any_order() -> None:
    model, calls = llama(num_hidden_layers=1), []

    def noting(label: str) -> Any:
        def wrap(name: str, function: Any) -> Any:
            return lambda *args, **kwargs: calls.append(label) or function(*args, **kwargs)

        return attention.wrapped_attention(wrap)

    first, second = noting("first"), noting("second")
    first.__enter__()
    second.__enter__()
    model(IDS)
    first.__exit__(None, None, None)
    model(IDS)
    second.__exit__(None, None, None)
    model(IDS)
    assert calls == ["second", "first", "second"]


# tied weights


def test_tied_weights_lists_weights_that_share_a_tensor() -> None:
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


def test_weights_marked_as_loaded_keep_their_values_and_the_rest_is_initialised() -> None:
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


# experts


def counted_experts(calls: list[tuple[int, ...]]) -> experts.ExpertsFunction:
    """What the interface documents, one token and expert at a time, in no kernel of transformers."""

    def run(module: Any, states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(indices.shape))
        first = getattr(module, experts.first_projection(module))
        result = torch.zeros_like(states)
        for token, chosen in enumerate(indices.tolist()):
            for rank, expert in enumerate(chosen):
                inner = experts.activated(module, states[token : token + 1] @ first[expert].T)
                down = experts.finished(module, inner @ module.down_proj[expert].T)
                result[token] += weights[token, rank] * down[0]
        return result

    return run


def test_a_function_of_the_interface_computes_the_experts_of_the_module_that_chose_it() -> None:
    model, calls = mixtral(), []
    expected = model(IDS).logits
    experts.register_experts_function("rabbit_engine_test", counted_experts(calls))
    experts.choose_experts_function(model.model.layers[0].mlp.experts, "rabbit_engine_test")
    torch.testing.assert_close(model(IDS).logits, expected)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(IDS).logits, expected)
    assert calls == [(3, 2), (3, 2)]


def test_experts_are_computed_by_another_function_for_a_while() -> None:
    model, calls = mixtral(), []
    experts.register_experts_function("rabbit_engine_test", counted_experts(calls))
    with experts.experts_computed_by(model, "rabbit_engine_test"):
        model(IDS)
    model(IDS)
    assert (len(calls), model.get_experts_implementation()) == (2, {"": "eager"})


def test_modules_with_the_interface_are_known() -> None:
    module = mixtral().model.layers[0].mlp.experts
    assert experts.has_experts_interface(module)
    assert (module.num_experts, module.has_gate, module.has_bias, module.is_transposed) == (3, True, False, False)
    assert (module.gate_up_proj.shape, module.down_proj.shape) == ((3, 48, 16), (3, 16, 24))
    assert not experts.has_experts_interface(llama().model.layers[0].mlp)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_expert_without_a_gate_is_activated_alone(rows: int) -> None:
    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 2, torch.nn.functional.relu
            self.post_expert_norm = torch.nn.LayerNorm(4)

        def forward(self, *_: Any) -> None:
            pass

    flags = inspect.signature(use_experts_implementation).parameters
    module: Any = use_experts_implementation(Experts, has_gate=False)(MixtralConfig())
    up = torch.randn(rows, 4)
    assert experts.first_projection(module) == "up_proj"
    assert experts.activated(module, up).equal(up.relu())
    assert experts.finished(module, up).equal(up)
    if "has_post_expert_norm" in flags:
        module = use_experts_implementation(Experts, has_gate=False, has_post_expert_norm=True)(MixtralConfig())
        assert experts.finished(module, up).equal(module.post_expert_norm(up))


# rotary


def test_frequencies_stand_still_for_a_while() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = llama(rope_parameters=rope, max_position_embeddings=4)
    module, states = model.model.rotary_emb, torch.zeros(1, 1, 16)
    near, far = torch.tensor([[3]]), torch.tensor([[3, 40]])
    expected = module(states, near)[0]
    with rotary.fixed_frequencies(model):
        assert module(states, far)[0][:, :1].equal(expected)
        model.to("meta")(IDS.to("meta"))
    assert module.rope_type == "dynamic"
    moved = llama(rope_parameters=rope, max_position_embeddings=4).model.rotary_emb
    assert not moved(states, far)[0][:, :1].equal(expected)


def test_positions_are_seen_before_the_first_layer() -> None:
    model, seen = llama(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(["layer"]))
    rotary.on_positions(model, lambda positions: seen.append(positions.tolist()))
    cache = forwards.cache_of(model(IDS, use_cache=True))
    model(IDS[:, :1], **forwards.cache_argument(model.forward, cache))
    assert seen == [[[0, 1, 2]], ["layer"], [[3]], ["layer"]]


# llama


def test_a_llama_turns_by_the_rotary_embedding_that_it_is_given() -> None:
    class Still(torch.nn.Module):
        def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            ones = states.new_ones(*position_ids.shape, 8)
            return ones, torch.zeros_like(ones)

    class Unmasked(MaskedLlamaAttention):
        def mask(self, mask: Any, states: torch.Tensor, seen: int, keys: int) -> torch.Tensor:
            return torch.zeros(1, 1, states.shape[1], keys)

    model = llama()
    weights = model.state_dict()
    replace_attention(model.model, Unmasked, Still())
    model.load_state_dict(weights)
    model.eval()
    backwards = model(IDS.flip(1)).logits.flip(1)
    torch.testing.assert_close(model(IDS).logits, backwards)  # without positions and mask the order means nothing


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_llama_attends_with_a_custom_mask(implementation: str) -> None:
    """With the causal mask written out it is Llama, cache and padding included."""
    seen_and_keys: list[tuple[int, int]] = []

    class Causal(MaskedLlamaAttention):
        def mask(self, mask: Any, states: torch.Tensor, seen: int, keys: int) -> torch.Tensor:
            seen_and_keys.append((seen, keys))
            queries = states.shape[1]
            allowed = torch.arange(keys)[None] <= torch.arange(seen, seen + queries)[:, None]
            if mask is not None:
                allowed = allowed & (mask if mask.dtype == torch.bool else mask == 0)
            return torch.zeros(1, 1, queries, keys).masked_fill(~allowed, torch.finfo(torch.float32).min)

    model, own = llama(attn_implementation=implementation), llama(attn_implementation=implementation)
    replace_attention(own.model, Causal, own.model.rotary_emb)
    own.load_state_dict(model.state_dict())
    own.eval()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    steps = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    scores = {"output_logits": True, "return_dict_in_generate": True}
    expected, found = (each.generate(IDS.repeat(2, 1), **steps, **scores) for each in (model, own))
    assert found.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert seen_and_keys == [(0, 3)] * 2 + [(3, 4)] * 2 + [(4, 5)] * 2


# faults


def test_an_output_of_llama_4s_text_model_can_be_asked_for_images() -> None:
    sizes = {
        **SIZES,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "intermediate_size_mlp": 24,
        "num_local_experts": 2,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 28}
    vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(text_config={**sizes, "pad_token_id": 0}, vision_config=vision)
    model = building.build_without_weights(transformers.Llama4ForConditionalGeneration, config, torch.float32)
    faults.fix_known_bugs(model)
    output = model.language_model(IDS.to("meta"))
    assert output.image_outputs is None
    assert output.logits.shape == (1, 3, 32)


@pytest.mark.parametrize("how", [{}, {"do_sample": True}])
def test_the_loop_over_tokens_runs_where_it_is_told_to(how: dict[str, Any]) -> None:
    seen: list[generation.DecodingLoop] = []

    def around(model: Any, loop: generation.DecodingLoop) -> Any:
        seen.append(loop)
        return loop.run()

    model = llama()
    expected = model.generate(IDS, max_new_tokens=4, pad_token_id=0, do_sample=False)
    model.__class__ = type("Around", (type(model),), generation.around_decoding(type(model), around))
    found = model.generate(IDS, max_new_tokens=4, pad_token_id=0, **how)
    (loop,) = seen
    assert torch.equal(loop.input_ids, IDS)
    assert loop.most_tokens == 7
    assert not loop.returns_cache
    assert how or torch.equal(found, expected)
    model.generate(IDS, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True)
    assert seen[1].returns_cache
    model.generate(IDS, max_new_tokens=4, pad_token_id=0, num_beams=2)
    assert len(seen) == 2


def test_heads_can_be_run_wherever_transformers_runs_one_at_a_time() -> None:
    model = getattr(modeling_layers, "MtpModel", None)
    assert can_run_heads() == hasattr(model, "forward_layer")

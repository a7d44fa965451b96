"""What each module of `rabbit_engine.transformers_bridge` relies on, asked of transformers itself on small models."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MergeModulelist,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WeightConverter,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.moe import use_experts_implementation

from rabbit_engine.transformers_bridge import (
    adapters,
    attention,
    auto_classes,
    building,
    experts,
    faults,
    forwards,
    generation,
    gguf,
    loading,
    progress,
    quantizers,
    remote_code,
    rotary,
    tied_weights,
    tokenization,
    weight_transforms,
)
from rabbit_engine.transformers_bridge.llama import MaskedLlamaAttention

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

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


# weight transforms


def test_stored_names_become_the_models_by_renamings_and_then_one_converter() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    names = weight_transforms.NameMap(model, weight_transforms.transforms_for(model))
    place = names.place_of("model.layers.1.block_sparse_moe.experts.0.w3.weight")
    assert place is not None
    assert place.converter is not None
    assert (place.weight, place.source) == ("model.layers.1.mlp.experts.gate_up_proj", 1)
    assert [type(step).__name__ for step in place.converter.operations] == ["MergeModulelist", "Concatenate"]
    assert [step.dim for step in place.converter.operations] == [0, 1]
    router = names.place_of("model.layers.1.block_sparse_moe.gate.weight")
    assert router == weight_transforms.Place("model.layers.1.mlp.gate.weight")


def test_a_base_models_name_gets_its_prefix_and_a_strange_one_has_no_place() -> None:
    names = weight_transforms.NameMap(llama(), [])
    assert names.place_of("layers.0.mlp.up_proj.weight") == weight_transforms.Place("model.layers.0.mlp.up_proj.weight")
    assert names.place_of("mean.weight") is None
    assert names.renamed("norm.weight") == "model.norm.weight"


def test_transforms_of_ones_own_come_first_and_are_copies() -> None:
    own = weight_transforms.WeightRenaming(r"^blocks\.", "model.layers.")
    transforms = weight_transforms.transforms_for(llama(), first=[own])
    assert transforms[0] is not own
    assert weight_transforms.as_values(transforms[0]) == [[r"^blocks\."], ["model.layers."], []]
    place = weight_transforms.NameMap(llama(), transforms).place_of("blocks.0.mlp.up_proj.weight")
    assert place == weight_transforms.Place("model.layers.0.mlp.up_proj.weight")


def test_a_converter_says_its_operations_by_value() -> None:
    stack = WeightConverter("experts.*.up.weight", "experts.up", [MergeModulelist(dim=0)])
    assert weight_transforms.as_values(stack)[:2] == [["experts.*.up.weight"], ["experts.up"]]
    assert weight_transforms.as_values(stack)[2][0].startswith("MergeModulelist(dim=0")


def test_layers_are_loaded_in_the_order_of_their_numbers() -> None:
    assert weight_transforms.in_loading_order(["h.10.w", "h.2.w"]) == ["h.2.w", "h.10.w"]


# loading


def test_tensors_become_weights_and_the_model_stays_empty() -> None:
    whole = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    model = building.build_without_weights(MixtralForCausalLM, whole.config, torch.bfloat16)
    transforms = weight_transforms.transforms_for(model)
    gate_up = whole.model.layers[0].mlp.experts.gate_up_proj.detach()
    stored = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": half
        for expert in (1, 0)
        for name, half in zip(("w1", "w3"), gate_up[expert].chunk(2), strict=True)
    }
    loaded = loading.load_weights(model, stored, torch.bfloat16, transforms)
    assert list(loaded.weights) == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert loaded.weights["model.layers.0.mlp.experts.gate_up_proj"].equal(gate_up.bfloat16())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_what_does_not_fit_is_told_and_not_raised() -> None:
    model = building.build_without_weights(LlamaForCausalLM, LlamaConfig(**SIZES), torch.float32)
    loaded = loading.load_weights(model, {"model.norm.weight": torch.ones(3)}, torch.float32, [])
    assert [(name, tuple(got), tuple(wanted)) for name, got, wanted in loaded.mismatched] == [("model.norm.weight", (3,), (16,))]
    stack = WeightConverter("norm.*.weight", "norm.weight", [MergeModulelist(dim=0)])
    stored = {"model.norm.0.weight": torch.ones(3), "model.norm.1.weight": torch.ones(5)}
    (failed,) = loading.load_weights(model, stored, torch.float32, [stack]).failed.items()
    assert failed[0] == "model.norm.weight"
    assert "stack expects each tensor to be equal size" in failed[1]


def test_some_weights_keep_float32() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1)
    model = building.build_without_weights(T5ForConditionalGeneration, config, torch.float16)
    dtypes = loading.weight_dtypes(model, torch.float16)
    kept = {name.rpartition("DenseReluDense.")[2] for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {"wo.weight"}
    stored = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("decoder.block")}
    loaded = loading.load_weights(model, stored, torch.float16, [])
    assert {name: tensor.dtype for name, tensor in loaded.weights.items()} == {name: dtypes[name] for name in stored}


def test_a_class_says_what_may_be_missing_and_what_may_be_unused() -> None:
    model = llama()
    assert loading.may_be_missing(model) == ()
    unused = loading.may_be_unused(model)
    assert unused.search("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not unused.search("model.layers.0.self_attn.q_norm.weight")
    assert not unused.search("model.layers.0.mlp.up_proj.weight_scale_inv")
    assert loading.may_be_unused(model, dequantizes=True).search("model.layers.0.mlp.up_proj.weight_scale_inv")
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1))
    assert loading.may_be_unused(gpt2).search("h.0.attn.bias")


# quantisers


def test_eight_bit_floats_are_loaded_as_what_their_scales_make_of_them() -> None:
    quantizer = quantizers.open_dequantizer({"quant_method": "fp8", "weight_block_size": [8, 8]})
    model = building.build_without_weights(LlamaForCausalLM, LlamaConfig(**SIZES), torch.float32)
    values = torch.arange(24 * 16).reshape(24, 16).remainder(7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [0.5, 4.0], [8.0, 0.25]])
    name = "model.layers.0.mlp.up_proj.weight"
    transforms = weight_transforms.transforms_for(model, quantizer)
    loaded = loading.load_weights(model, {name: values, f"{name}_scale_inv": scales}, torch.float32, transforms, quantizer)
    expected = values.float() * scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert loaded.weights[name].equal(expected)


def test_a_quantisation_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="made-up"):
        quantizers.open_dequantizer({"quant_method": "made-up"})


# progress


def test_progress_bars_are_away_for_a_while(capfd: pytest.CaptureFixture[str]) -> None:
    transformers.logging.enable_progress_bar()
    try:
        with progress.without_progress_bars():
            assert not transformers.logging.is_progress_bar_enabled()
            list(modeling_gguf_pytorch_utils.tqdm(range(2)))
        assert transformers.logging.is_progress_bar_enabled()
        assert capfd.readouterr().err == ""
    finally:
        transformers.logging.disable_progress_bar()


# gguf


def test_a_gguf_files_tensors_are_dequantised_where_they_are_taken(tmp_path: Path) -> None:
    from fuzzing.checkpoints import gguf as write_gguf

    write_gguf(tmp_path)
    path = tmp_path / "model.gguf"
    whole = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    file = gguf.GgufFile(path)
    assert file.dtype() == whole.dtype
    model = building.build_without_weights(LlamaForCausalLM, whole.config, torch.float32)
    tensors = file.open_tensors(model, torch.float32)
    transforms = weight_transforms.transforms_for(model, file.quantizer)
    names = weight_transforms.NameMap(model, transforms)
    for key in tensors:
        place = names.place_of(key)
        if place is not None:
            loaded = loading.load_weights(model, {key: tensors[key]}, torch.float32, transforms, file.quantizer).weights
            assert loaded[place.weight].equal(whole.state_dict()[place.weight]), key


# experts


def mixtral(implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, experts_implementation=implementation)).eval()


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


# auto classes


def test_an_auto_class_has_classes_for_a_config_and_their_names() -> None:
    config = LlamaConfig(**SIZES)
    assert auto_classes.classes_for(AutoModelForCausalLM, config) == [LlamaForCausalLM]
    assert auto_classes.classes_for(AutoModelForImageTextToText, config) == []
    assert {"LlamaForCausalLM", "GPT2LMHeadModel"} <= set(auto_classes.class_names(AutoModelForCausalLM))
    assert {"LlamaForSequenceClassification"} <= set(auto_classes.class_names(transformers.AutoModelForSequenceClassification))


def test_every_auto_class_of_models_is_listed() -> None:
    found = auto_classes.auto_model_classes()
    assert {transformers.AutoModel, AutoModelForCausalLM, transformers.AutoModelForMaskedLM} <= set(found)
    names = [name for auto in found for name in auto_classes.class_names(auto)]
    assert len(names) > 500
    assert all(isinstance(name, str) for name in names)


# remote code

CODE = """
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

class OwnForCausalLM(PreTrainedModel):
    config_class = LlamaConfig
    _supports_cache_class = True
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        raise ValueError("not for this version")
"""


def test_a_class_of_a_repositorys_code_is_imported_and_generates(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(CODE)
    found = remote_code.import_class("modeling_own.OwnForCausalLM", tmp_path)
    cls = remote_code.as_generating_class(found)
    assert (remote_code.is_remote(found), remote_code.is_remote(cls), remote_code.is_remote(LlamaForCausalLM)) == (
        True,
        True,
        False,
    )
    assert issubclass(cls, GenerationMixin)
    assert remote_code.says_it_takes_cache_objects(cls)
    with pytest.raises(ValueError, match="not for this version") as caught:
        cls(LlamaConfig(**SIZES)).prepare_inputs_for_generation(IDS)
    assert remote_code.came_through_remote_code(caught.value)
    with pytest.raises(ValueError, match="max_new_tokens") as caught:
        llama().generate(IDS, max_new_tokens=-1)
    assert not remote_code.came_through_remote_code(caught.value)


# generation


def test_a_folders_generation_config_becomes_the_models(tmp_path: Path) -> None:
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[7, 9]).save_pretrained(tmp_path)
    model = llama()
    generation.read_generation_config(model, tmp_path)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.25, [7, 9])


def test_a_folder_without_one_gives_what_its_config_says(tmp_path: Path) -> None:
    LlamaConfig(**SIZES, eos_token_id=11).save_pretrained(tmp_path)
    model = llama()
    generation.read_generation_config(model, tmp_path)
    assert model.generation_config.eos_token_id == 11


def test_a_class_that_makes_its_own_cache_gets_none() -> None:
    given: list[Any] = []

    @generation.without_cache_objects
    class Own(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given.append(kwargs.get(forwards.cache_keyword(LlamaForCausalLM.forward) or ""))
            return super().forward(*args, **kwargs)

    Own(LlamaConfig(**SIZES)).eval().generate(IDS, max_new_tokens=1, pad_token_id=0)
    assert given == [None]


def test_settings_that_generate_refuses_are_told_from_errors_of_the_model() -> None:
    for settings in ({"max_new_tokens": -1}, {"num_beams": 1, "num_return_sequences": 2, "do_sample": False}):
        with pytest.raises(ValueError, match=r"max_new_tokens|num_return_sequences") as caught:
            llama().generate(IDS, **settings)
        assert generation.refused_by_generate(caught.value)
    model = llama()
    model.model.layers[0].forward = lambda *_, **__: int("no number")
    with pytest.raises(ValueError, match="no number") as caught:
        model.generate(IDS, max_new_tokens=1)
    assert not generation.refused_by_generate(caught.value)


# adapters


def test_an_adapter_leaves_without_a_trace(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    assert adapters.can_load_adapters()
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path)
    model = llama()
    expected = model(IDS).logits
    for name in ("one", "two"):
        model.load_adapter(str(tmp_path), adapter_name=name)
    adapted = model(IDS).logits
    assert not adapted.equal(expected)
    adapters.remove_adapter(model, "one")
    assert list(model.peft_config) == ["two"]
    adapters.remove_adapter(model, "two")
    assert model(IDS).logits.equal(expected)
    model.load_adapter(str(tmp_path), adapter_name="one")
    assert model(IDS).logits.equal(adapted)


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


# llama


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_ones_own_is_what_a_llama_attends_by(implementation: str) -> None:
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
    for index, layer in enumerate(own.model.layers):
        layer.self_attn = Causal(own.config, index)
    own.load_state_dict(model.state_dict())
    own.eval()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    steps = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    scores = {"output_logits": True, "return_dict_in_generate": True}
    expected, found = (each.generate(IDS.repeat(2, 1), **steps, **scores) for each in (model, own))
    assert found.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert seen_and_keys == [(0, 3)] * 2 + [(3, 4)] * 2 + [(4, 5)] * 2


# tokenization


def test_a_text_is_cut_at_the_longest_of_the_words() -> None:
    parts = tokenization.split_at(["<a>", "<a><b>", "x"], "<a><b>y<a>xz")
    assert parts == ["<a><b>", "y", "<a>", "x", "z"] or parts == ["", "<a><b>", "y", "<a>", "x", "z"]
    assert "".join(parts) == "<a><b>y<a>xz"


class Upper(tokenization.RustTokenizer):
    def prepared(self, text: Any) -> Any:
        return [part.upper() for part in text] if isinstance(text, list) else text and text.upper()

    def decoded(self, token_ids: list[int], *, skip_special_tokens: bool, **kwargs: Any) -> str:
        return f"{token_ids} {skip_special_tokens} {sorted(kwargs)}"


def test_a_rust_tokenizer_prepares_texts_and_decodes_as_it_says() -> None:
    words = Tokenizer(WordLevel({"A": 0, "B": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = Upper(tokenizer_object=words)
    assert tokenizer("a b")["input_ids"] == [0, 1]
    assert tokenizer("a", "b")["input_ids"] == [0, 1]
    assert tokenizer(["a", "b c"])["input_ids"] == [[0], [1, 2]]
    assert tokenizer.decode(torch.tensor([1, 0])) == "[1, 0] False []"
    assert tokenizer.decode(1, skip_special_tokens=True, spaces_between_special_tokens=False) == (
        "[1] True ['spaces_between_special_tokens']"
    )
    assert [text.split(" False")[0] for text in tokenizer.batch_decode([[0], [1, 2]])] == ["[0]", "[1, 2]"]
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)


class Letters(tokenization.PythonTokenizer):
    vocab_size = 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + index): index for index in range(26)}

    def pieces_of(self, text: str) -> list[str]:
        return list(text)

    def id_of(self, piece: str) -> int:
        return ord(piece) - 97

    def piece_of(self, index: int) -> str:
        return chr(97 + index)

    def decoded(self, token_ids: list[int], *, skip_special_tokens: bool, **_: Any) -> str:
        return "-".join(map(self.piece_of, token_ids))


def test_a_python_tokenizer_is_its_pieces_and_their_ids() -> None:
    tokenizer = Letters()
    assert tokenizer("abz")["input_ids"] == [0, 1, 25]
    assert tokenizer.tokenize("ab") == ["a", "b"]
    assert (tokenizer.convert_tokens_to_ids(["c"]), tokenizer.convert_ids_to_tokens([2])) == ([2], ["c"])
    assert (tokenizer.decode([0, 1]), tokenizer.decode(2), tokenizer.batch_decode([[0], [1]])) == ("a-b", "c", ["a", "b"])


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
    faults.mend_faults(model)
    output = model.language_model(IDS.to("meta"))
    assert output.image_outputs is None
    assert output.logits.shape == (1, 3, 32)

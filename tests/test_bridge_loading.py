"""What the modules of `rabbit_engine.transformers_bridge` about checkpoints rely on, asked of transformers itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
import transformers
from tiny import IDS, SIZES, llama, mixtral
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
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MergeModulelist,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WeightConverter,
    modeling_gguf_pytorch_utils,
)

from rabbit_engine.transformers_bridge import (
    adapters,
    auto_classes,
    building,
    forwards,
    generation,
    gguf,
    gguf_reader,
    loading,
    progress,
    quantizers,
    remote_code,
    tokenization,
    weight_transforms,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))


# weight transforms


def test_stored_names_become_the_models_by_renamings_and_then_one_converter() -> None:
    model = mixtral()
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


def test_custom_transforms_come_first_and_are_copies() -> None:
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
    whole = mixtral()
    model = building.build_without_weights(MixtralForCausalLM, whole.config, torch.bfloat16)
    transforms = weight_transforms.transforms_for(model)
    gate_up = whole.model.layers[0].mlp.experts.gate_up_proj.detach()
    stored = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": half
        for expert in (2, 0, 1)
        for name, half in zip(("w1", "w3"), gate_up[expert].chunk(2), strict=True)
    }
    loaded = loading.load_weights(model, stored, torch.bfloat16, transforms)
    assert list(loaded.weights) == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert loaded.weights["model.layers.0.mlp.experts.gate_up_proj"].equal(gate_up.bfloat16())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def test_misfitting_weights_are_reported_and_not_raised() -> None:
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


def test_eight_bit_floats_are_loaded_with_their_scales() -> None:
    quantizer = quantizers.open_dequantizer({"quant_method": "fp8", "weight_block_size": [8, 8]})
    model = building.build_without_weights(LlamaForCausalLM, LlamaConfig(**SIZES), torch.float32)
    values = torch.arange(24 * 16).reshape(24, 16).remainder(7).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [0.5, 4.0], [8.0, 0.25]])
    name = "model.layers.0.mlp.up_proj.weight"
    transforms = weight_transforms.transforms_for(model, quantizer)
    loaded = loading.load_weights(model, {name: values, f"{name}_scale_inv": scales}, torch.float32, transforms, quantizer)
    expected = values.float() * scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert loaded.weights[name].equal(expected)


UP, EXPERTS = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("config", "cls", "key", "expected"),
    [
        ({"quant_method": "fp8"}, (LlamaForCausalLM, LlamaConfig), UP + "_scale_inv", ("scales", 0)),
        ({"quant_method": "mxfp4"}, (GptOssForCausalLM, GptOssConfig), EXPERTS + ".down_proj_blocks", ("values", 0)),
    ],
)  # fmt: skip
def test_a_converter_says_what_it_dequantises_from_which_tensors(
    config: dict[str, str], cls: tuple[Any, Any], key: str, expected: tuple[str, int]
) -> None:
    model_class, config_class = cls
    model = building.build_without_weights(model_class, config_class(num_hidden_layers=1, hidden_size=64), torch.float32)
    names = weight_transforms.NameMap(model, weight_transforms.transforms_for(model, quantizers.open_dequantizer(config)))
    place = names.place_of(key)
    assert place is not None
    assert place.converter is not None
    stored = quantizers.dequantizes(place.converter.operations[0])
    assert stored is not None
    assert stored.method == config["quant_method"]
    assert (quantizers.roles_of(stored, place.converter.source_patterns) or [])[place.source] == expected


@pytest.mark.parametrize("end", ["", "$"])
def test_the_scales_of_several_weights_are_distinguished(end: str) -> None:
    patterns = [f"e.*.{name}{end}" for name in ("gate.weight", "up.weight", "gate.weight_scale_inv", "up.weight_scale_inv")]
    fp8 = next(found for found in quantizers.FORMATS if found.method == "fp8")
    assert quantizers.roles_of(fp8, patterns) == [("values", 0), ("values", 1), ("scales", 0), ("scales", 1)]
    assert quantizers.roles_of(fp8, [*patterns, "e.*.gate.zero_point"]) is None


def test_an_unknown_quantisation_is_refused() -> None:
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


def test_a_gguf_files_tensors_are_dequantised_when_read(tmp_path: Path) -> None:
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


def test_the_quick_reader_returns_what_the_usual_one_does(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "qwen3", "Q8_0")
    usual = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path)
    with gguf_reader.quick_reader():
        assert modeling_gguf_pytorch_utils.load_gguf_checkpoint(path) == usual
    with gguf_reader.quick_reader(strings=False):
        counted = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path)
    assert counted["config"] == usual["config"]
    assert len(counted["tokenizer"]["tokens"]) == len(usual["tokenizer"]["tokens"])


def test_readers_tell_the_rows_of_each_weight(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "qwen3moe", "F16")
    model, shapes = gguf_files.build("qwen3moe"), gguf_files.tensors_of("qwen3moe")
    sources = gguf.GgufFile(path).sources(model, "qwen3moe", lambda: gguf.read_gguf_config(path), shapes)
    assert set(sources) == set(model.state_dict()) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    gate_up = sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert gate_up.shape == tuple(model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].shape)
    experts, rows, _ = shapes["blk.0.ffn_gate_exps.weight"]
    start = gate_up.tensors.index("blk.0.ffn_gate_exps.weight") * experts * rows
    assert gate_up.index[:rows].tolist() == list(range(start, start + rows))


def test_readers_compute_small_weights_that_are_no_rows(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "gemma2", "F16")
    model, shapes = gguf_files.build("gemma2"), gguf_files.tensors_of("gemma2")
    norm = gguf.GgufFile(path).sources(model, "gemma2", lambda: gguf.read_gguf_config(path), shapes)["model.norm.weight"]
    assert (norm.tensor, norm.shape) == ("output_norm.weight", (256,))
    assert norm.function(torch.full((256,), 1.5)).equal(torch.full((256,), 0.5))


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


def test_a_folder_without_a_generation_config_uses_its_config(tmp_path: Path) -> None:
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


def test_settings_that_generate_rejects_are_distinguished_from_model_errors() -> None:
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

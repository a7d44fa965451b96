"""Families without a class in transformers, converted: their authors' own code is the oracle (tests/data/oracles)."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_matrix import STEPS, cache_is_filled, logits_are_equal, speculation_of, split_is_whole, tokens_are_equal

from rabbit_engine import AutoModel, errors
from rabbit_engine.architectures import build_skeleton
from rabbit_engine.architectures.families.alibi import alibi_slopes
from rabbit_engine.checkpoints.shards import read_entries, verify_shard
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.storage.tensorfiles import read_tensor

BOUND = 1e-4


def resident(model: Any) -> Any:
    """The class that `model` was converted to, whole in memory, with the weights of its shards: the streamed one's oracle."""
    prepared = runtime_of(model).checkpoint
    whole = build_skeleton(prepared.architecture.cls, prepared.architecture.config, prepared.dtype).to_empty(device="cpu")
    entries = read_entries(prepared.folder, prepared.manifest)
    whole.load_state_dict({name: read_tensor(entry) for name, entry in entries.items()})
    whole.base_model.rotary_emb.__init__(*_rotary_arguments(whole))
    return whole


def _rotary_arguments(whole: Any) -> tuple[Any, ...]:
    rotary = whole.base_model.rotary_emb
    return (rotary.head_dim,) if hasattr(rotary, "head_dim") else (whole.config,)


def largest_difference(model: Any, expected: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        found = (model(expected["input_ids"]).logits - expected["logits"]).abs().max().item()
    assert found <= BOUND
    return float(found)


def greedy_is_the_authors(model: Any, expected: dict[str, torch.Tensor]) -> None:
    steps = expected["greedy"].shape[1] - expected["input_ids"].shape[1]
    got = model.generate(expected["input_ids"], max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, expected["greedy"])


def padding_changes_nothing(model: Any, expected: dict[str, torch.Tensor]) -> None:
    """Against the authors' padded logits where their code pads rightly, and against each prompt alone."""
    if "padded_logits" in expected:
        mask = expected["padded_attention_mask"]
        with torch.no_grad():
            got = model(expected["padded_input_ids"], attention_mask=mask).logits
        assert (got - expected["padded_logits"])[mask.bool()].abs().max() <= BOUND
    ids, short = expected["input_ids"][:, :8], expected["input_ids"][:, 2:8]
    padded = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :2]), short], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    keywords = {**STEPS, "max_new_tokens": 4, "min_new_tokens": 4}
    together = model.generate(padded, attention_mask=mask, **keywords)
    assert torch.equal(together[0, 8:], model.generate(ids, **keywords)[0, 8:])
    assert torch.equal(together[1, 8:], model.generate(short, **keywords)[0, 6:])


@pytest.mark.parametrize("row", matrix.CONVERTED, ids=lambda row: row.models)
def test_converted_family_computes_what_its_authors_code_does(
    row: matrix.ConvertedRow, tmp_path: Path, streamed: Any, checkpoint: Any, record: Callable[..., None]
) -> None:
    differences, ways = [], set()
    for folder in row.folders:
        expected = load_file(matrix.ORACLES / folder / "expected.safetensors")
        model = streamed(matrix.ORACLES / folder, layer_shards_saving_path=tmp_path, dtype="float32")
        assert row.cls in json.loads((matrix.ORACLES / folder / "config.json").read_text())["architectures"]
        assert model.plan.streamed
        for shard in runtime_of(model).checkpoint.manifest.shards:
            verify_shard(runtime_of(model).checkpoint.folder, shard)
        differences.append(largest_difference(model, expected))
        greedy_is_the_authors(model, expected)
        padding_changes_nothing(model, expected)
        prompt = {"input_ids": expected["input_ids"][:, :8]}
        whole = resident(model)
        cache_is_filled(model, whole, prompt)
        tokens_are_equal(model, whole, prompt, num_beams=3)
        tokens_are_equal(model, whole, prompt, prompt_lookup_num_tokens=3)
        ways.add(speculation_of(model, prompt))
    assert len(ways) == 1, ways
    record(
        row.models,
        row.cls,
        runs_as=runtime_of(model).architecture.cls.__name__,
        oracle=f"the authors' code, {len(row.folders)} variant{'s' if len(row.folders) > 1 else ''}",
        split="verified",
        logits=f"within {max(differences):.0e}" if any(differences) else "equal",
        cache="equal",
        batch="equal",
        beam="equal",
        assisted="equal",
        speculation=ways.pop(),
        tokenizer="converted",
    )


@pytest.mark.parametrize(("biases", "family"), [({}, "llama"), ({"qkv_bias": True, "bias": True}, "llama_biased")])
def test_internlm3_is_read_as_its_description_says(
    biases: dict[str, bool],
    family: str,
    tmp_path: Path,
    own_checkpoint: Any,
    plain: Any,
    streamed: Any,
    ids: Any,
    padded: Any,
    record: Callable[..., None],
) -> None:
    """No code of its authors was to be had; its names and arithmetic are Llama's, by their description."""
    folder = own_checkpoint(family)
    whole = plain(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("attention_bias", "mlp_bias")} | biases
    words = {"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw | words))
    model = streamed(folder, layer_shards_saving_path=tmp_path / "shards")
    prompt = {"input_ids": ids}
    columns = {
        "split": split_is_whole(model, whole),
        "logits": logits_are_equal(model, whole, prompt),
        "cache": cache_is_filled(model, whole, prompt),
        "batch": tokens_are_equal(model, whole, padded),
        "beam": tokens_are_equal(model, whole, prompt, num_beams=3),
        "assisted": tokens_are_equal(model, whole, prompt, prompt_lookup_num_tokens=3),
        "speculation": speculation_of(model, prompt),
    }
    if not biases:
        record(
            "InternLM3",
            "InternLM3ForCausalLM",
            runs_as="LlamaForCausalLM",
            oracle="the published description",
            **columns,
            tokenizer="not run",
        )


@pytest.mark.parametrize("folder", ["qwen", "baichuan2_13b", "chatglm3"])
def test_bfloat16_is_the_converted_class_bit_for_bit(folder: str, tmp_path: Path, streamed: Any) -> None:
    model = streamed(matrix.ORACLES / folder, layer_shards_saving_path=tmp_path, dtype="bfloat16")
    ids = load_file(matrix.ORACLES / folder / "expected.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, resident(model)(ids).logits)


@pytest.mark.parametrize("folder", ["chatglm3", "glm4_9b", "qwen", "qwen_bias", "baichuan1_13b", "internlm1_7b"])
def test_rows_of_a_fused_projection_are_streamed_in_place(folder: str, streamed: Any) -> None:
    expected = load_file(matrix.ORACLES / folder / "expected.safetensors")
    model = streamed(matrix.ORACLES / folder, split="never")
    assert model.plan.streamed
    assert runtime_of(model).checkpoint.manifest is None
    largest_difference(model, expected)
    greedy_is_the_authors(model, expected)


def test_weights_that_are_not_plain_rows_are_split(changed: Any) -> None:
    for folder in ("internlm2", "baichuan2_7b", "baichuan2_13b"):
        with pytest.raises(errors.ConfigurationError, match="must be split"):
            AutoModel.from_pretrained(changed(folder, folder), device="cpu", split="never")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_alibi_is_right_with_either_attention_and_cache(attention: str, cache: str | None, tmp_path: Path, streamed: Any) -> None:
    folder = matrix.ORACLES / "baichuan2_13b"
    expected = load_file(folder / "expected.safetensors")
    model = streamed(folder, layer_shards_saving_path=tmp_path, attn_implementation=attention)
    largest_difference(model, expected)
    steps = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(expected["input_ids"], cache_implementation=cache, **steps), expected["greedy"])


def test_alibi_slopes_are_the_papers() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12)[:8] == alibi_slopes(8)
    assert alibi_slopes(12)[8:] == [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of an oracle's folder with other words in its config; None takes a key away."""

    def copy(folder: str, name: str = "model", **changes: Any) -> Path:
        target = shutil.copytree(matrix.ORACLES / folder, tmp_path / name)
        raw = json.loads((target / "config.json").read_text()) | changes
        (target / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
        return target

    return copy


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        ("chatglm3", {"position_encoding_2d": True}, "two-dimensional"),
        ("chatglm3", {"add_bias_linear": True}, "add_bias_linear=True"),
        ("chatglm3", {"rmsnorm": False}, "rmsnorm=False"),
        ("chatglm3", {"post_layer_norm": False}, "post_layer_norm"),
        ("chatglm3", {"apply_residual_connection_post_layernorm": True}, "residuals"),
        ("chatglm3", {"pre_seq_len": 8}, "prefixes"),
        ("chatglm3", {"vision_config": {}}, "GLM-4V"),
        ("chatglm3", {"ffn_hidden_size": None}, "lacks 'ffn_hidden_size'"),
        ("qwen", {"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_a_config_that_a_conversion_cannot_represent_is_refused(
    folder: str, changes: dict[str, Any], words: str, changed: Any
) -> None:
    with pytest.raises(errors.UnsupportedArchitectureError, match=words):
        AutoModel.from_pretrained(changed(folder, **changes), device="cpu")


def test_quantised_chatglm_is_refused(changed: Any) -> None:
    with pytest.raises(errors.CompressionUnavailableError, match="quantization_bit=4"):
        AutoModel.from_pretrained(changed("chatglm3", quantization_bit=4), device="cpu")


def test_qwen_past_its_length_is_refused_and_its_answers_end_there(changed: Any, streamed: Any, caplog: Any) -> None:
    model = streamed(changed("qwen", seq_length=16))
    ids = load_file(matrix.ORACLES / "qwen" / "expected.safetensors")["input_ids"]
    with caplog.at_level(logging.WARNING, logger="rabbit_engine"):
        answer = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert answer.shape[1] == 16
    assert "the answer ends at 16 tokens" in caplog.text
    looked_up = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=6)
    assert torch.equal(looked_up, answer)
    assert torch.equal(model.generate(ids, max_length=99, do_sample=False, eos_token_id=None), answer)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(
        model.generate(inputs_embeds=embeds, max_new_tokens=40, do_sample=False, eos_token_id=None), answer[:, 12:]
    )
    assert model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=None).shape[1] == 14
    with pytest.raises(errors.TextTooLongError, match=r"the text has 24 tokens.*use_dynamic_ntk, use_logn_attn"):
        model(torch.cat([ids, ids], dim=1))
    assert model(ids).logits.shape == (1, 12, 128)


def test_internlm_past_its_length_is_refused(changed: Any, streamed: Any) -> None:
    ids = load_file(matrix.ORACLES / "internlm1_7b" / "expected.safetensors")["input_ids"]
    limited = streamed(changed("internlm1_7b", "a", rotary={"base": 10000, "type": "dynamic"}, max_position_embeddings=8))
    plain = streamed(changed("internlm1_7b", "b", rotary={"base": 10000, "type": "origin"}, max_position_embeddings=8))
    with pytest.raises(errors.TextTooLongError, match="rotates every cached key again"):
        limited(ids)
    assert plain(ids).logits.shape == (1, 12, plain.config.vocab_size)


def test_internlms_unread_key_value_heads_change_nothing(changed: Any, streamed: Any) -> None:
    expected = load_file(matrix.ORACLES / "internlm1_20b" / "expected.safetensors")
    largest_difference(streamed(changed("internlm1_20b", num_key_value_heads=1)), expected)


def test_the_first_qwen_releases_words_are_read(changed: Any, streamed: Any) -> None:
    older = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    raw = json.loads((matrix.ORACLES / "qwen" / "config.json").read_text())
    changes = dict.fromkeys(older) | {old: raw[new] for new, old in older.items()}
    changes |= {"intermediate_size": None, "ffn_hidden_size": raw["intermediate_size"]}
    largest_difference(streamed(changed("qwen", **changes)), load_file(matrix.ORACLES / "qwen" / "expected.safetensors"))


def test_the_class_decides_the_family_if_two_share_a_model_type(changed: Any, streamed: Any) -> None:
    model = streamed(changed("internlm2", model_type="internlm"))
    largest_difference(model, load_file(matrix.ORACLES / "internlm2" / "expected.safetensors"))


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("glm4_9b", {"multi_query_group_num": 1}),
        ("chatglm3", {"multi_query_group_num": 1}),
        ("chatglm3", {"multi_query_group_num": 4}),
        ("chatglm3", {"add_qkv_bias": False}),
        ("qwen_bias", {"no_bias": True}),
        ("internlm1_7b", {"bias": False}),
        ("baichuan1_7b", {"num_hidden_layers": 1}),
    ],
)
@pytest.mark.parametrize("split", ["auto", "always"])
def test_a_config_that_does_not_fit_the_weights_is_an_error(
    split: str, folder: str, changes: dict[str, Any], changed: Any
) -> None:
    path = changed(folder, **changes)
    with pytest.raises((errors.MismatchedWeightsError, errors.DamagedCheckpointError), match=str(path)):
        AutoModel.from_pretrained(path, device="cpu", split=split)


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("qwen", {"architectures": -1, "num_attention_heads": 0}),
        ("qwen", {"num_attention_heads": 0}),
        ("qwen", {"hidden_size": "big"}),
        ("qwen", {"visual": {}}),
        ("internlm2", {"rope_scaling": "dynamic"}),
        ("internlm2", {"hidden_act": "no_such"}),
        ("internlm2", {"pad_token_id": 10**6}),
        ("baichuan2_7b", {"vocab_size": "many"}),
        ("chatglm3", {"multi_query_group_num": 0}),
    ],
)
def test_a_nonsensical_config_is_a_rabbit_error(folder: str, changes: dict[str, Any], changed: Any) -> None:
    with pytest.raises(errors.CheckpointError):
        AutoModel.from_pretrained(changed(folder, **changes), device="cpu")


def test_shards_are_rebuilt_when_their_conversion_changes(changed: Any, streamed: Any) -> None:
    folder = changed("baichuan2_7b")
    (folder / "modeling_baichuan.py").write_text("class BaichuanForCausalLM: pass")
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        assert (streamed(folder)(expected["input_ids"]).logits - expected["logits"]).abs().max() > 1
    (folder / "modeling_baichuan.py").write_text("class NormHead: pass")
    largest_difference(streamed(folder), expected)


def test_the_modelling_file_says_what_rope_ratio_does_and_which_baichuan_has_alibi(
    changed: Any, streamed: Any, caplog: Any
) -> None:
    folder = changed("chatglm2_32k", _name_or_path="/data/my-finetune")
    expected = load_file(folder / "expected.safetensors")
    with caplog.at_level(logging.WARNING, logger="rabbit_engine"):
        streamed(folder)
    assert "ChatGLM2-32k divides positions" in caplog.text
    (folder / "modeling_chatglm.py").write_text("seq_idx = torch.arange(seq_len) / self.rope_ratio")
    largest_difference(streamed(folder), expected)
    thirteen = changed("baichuan1_13b", "b", max_position_embeddings=4096)
    (thirteen / "modeling_baichuan.py").write_text("def _gen_alibi_mask(): pass")
    largest_difference(streamed(thirteen), load_file(thirteen / "expected.safetensors"))


def test_continuous_batching_of_alibi_is_refused(streamed: Any, tmp_path: Path) -> None:
    model = streamed(matrix.ORACLES / "baichuan1_13b", layer_shards_saving_path=tmp_path)
    with pytest.raises(errors.UnsupportedOperationError, match="ALiBi"):
        model.generate_batch(inputs=[[5, 6, 7], [8, 9]])


def test_chatglm2_divides_positions_where_chatglm3_multiplies_the_base(changed: Any, streamed: Any) -> None:
    second = streamed(changed("chatglm3", "a", rope_ratio=4, _name_or_path="THUDM/chatglm2-6b-32k"))
    third = streamed(changed("chatglm3", "b", rope_ratio=4))
    plain = streamed(matrix.ORACLES / "chatglm3")
    assert torch.allclose(second.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / 4)
    assert third.config.rope_parameters["rope_theta"] == 40000.0


@pytest.mark.parametrize(("code", "normalised"), [("class NormHead(nn.Module):", True), ("self.lm_head = nn.Linear(", False)])
def test_the_modelling_file_says_whether_baichuans_head_is_normalised(
    code: str, normalised: bool, changed: Any, streamed: Any
) -> None:
    folder = changed("baichuan2_7b")
    (folder / "modeling_baichuan.py").write_text(code + "\n    raise SystemExit  # never run\n")
    head = streamed(folder).lm_head.weight
    rows = read_rows(head, streamed(folder, max_memory=None))
    assert torch.allclose(rows.norm(dim=1), torch.ones(128)) is normalised


@pytest.mark.parametrize(
    ("folder", "changes", "files", "ends"),
    [
        ("qwen", {"vocab_size": 151936}, {"chat_format": "chatml", "eos_token_id": 151643}, [151643, 151644, 151645]),
        ("qwen", {"vocab_size": 151936}, {"chat_format": "raw", "eos_token_id": 151643}, 151643),
        ("qwen", {}, {"chat_format": "chatml", "eos_token_id": 5}, 5),
        ("chatglm3", {"padded_vocab_size": 65024}, None, [2, 64795, 64797]),
        ("internlm1_7b", {"vocab_size": 103168}, None, [2, 103028]),
    ],
)
def test_an_answer_ends_where_the_familys_own_chat_ends(
    folder: str, changes: dict[str, Any], files: dict[str, Any] | None, ends: Any, changed: Any, streamed: Any
) -> None:
    path = changed(folder, **changes)
    if files is not None:
        (path / "generation_config.json").write_text(json.dumps(files))
    words = {"lm_head.weight", "transformer.wte.weight", "transformer.embedding.word_embeddings.weight"}
    words |= {"transformer.output_layer.weight", "model.embed_tokens.weight"}
    for file in path.glob("model*.safetensors") if changes else ():
        rows = next(iter(changes.values()))
        state = {
            name: torch.zeros(rows, tensor.shape[1]) if name in words else tensor for name, tensor in load_file(file).items()
        }
        save_file(state, file)
    assert streamed(path).generation_config.eos_token_id == ends


def test_an_adapter_of_the_familys_own_class_is_refused(tmp_path: Path, streamed: Any) -> None:
    """Its names are half Llama's: peft would apply those, and drop the others with a warning."""
    model = streamed(matrix.ORACLES / "baichuan2_7b", layer_shards_saving_path=tmp_path / "shards")
    torch.manual_seed(0)
    whole = resident(model)
    adapter = get_peft_model(whole, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "fits")
    adapter.save_pretrained(tmp_path / "original")
    path = tmp_path / "original" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "W_pack"): tensor for name, tensor in load_file(path).items()}, path)
    config = tmp_path / "original" / "adapter_config.json"
    config.write_text(config.read_text().replace("q_proj", "W_pack"))
    with pytest.raises(errors.CannotLoadStateError, match="W_pack"):
        model.load_adapter(str(tmp_path / "original"))
    largest_difference(model, load_file(matrix.ORACLES / "baichuan2_7b" / "expected.safetensors"))
    again = streamed(matrix.ORACLES / "baichuan2_7b", layer_shards_saving_path=tmp_path / "shards")
    again.load_adapter(str(tmp_path / "fits"))
    ids = load_file(matrix.ORACLES / "baichuan2_7b" / "expected.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapter(ids).logits)


def test_a_converted_model_generates_text_with_its_original_tokenizer(changed: Any, streamed: Any) -> None:
    """A converted model with the original file of its tokenizer, no code of the family's."""
    folder = changed("baichuan2_13b")
    corpus = iter(Path(__file__).read_text(encoding="utf-8").splitlines())
    written = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 128, "character_coverage": 0.98, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=corpus, model_writer=written, **options)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": false}')
    model = streamed(folder)
    inputs = model.tokenizer("the hare runs", return_tensors="pt")
    assert inputs["input_ids"].tolist()[0] == SentencePieceProcessor(model_proto=written.getvalue()).encode("the hare runs")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert model.tokenizer.decode(answer[0], skip_special_tokens=True).startswith("the hare runs")


def read_rows(_: Any, whole: Any) -> torch.Tensor:
    return whole.lm_head.weight.detach().float()  # type: ignore[no-any-return]


def test_none_of_the_familys_code_runs_even_where_it_is_trusted(changed: Any, streamed: Any) -> None:
    folder = changed("qwen")
    for name in ("modeling_qwen.py", "configuration_qwen.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    assert type(streamed(folder, trust_remote_code=True)).__name__ == "Qwen2ForCausalLM"

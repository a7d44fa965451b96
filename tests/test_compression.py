"""Compressed splits: made once from any source, equal to transformers with the decoded weights, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_quantised import FP8, rewrite, to_fp8
from tiny import words
from transformers import BitsAndBytesConfig

from rabbit_engine import Session, errors
from rabbit_engine.checkpoints import prepare
from rabbit_engine.checkpoints.shards import shard_record
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.storage.tensorfiles import read_tensor

FAMILIES = ["llama", "llama_tied", "llama_biased", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "jamba"]
WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Sizes with groups of 64 and of 32."""


def with_decoded_weights(model: Any, whole: Any) -> Any:
    """transformers' `whole` model with the values that `model` streams."""
    entries, ties = model._checkpoint.entries, model._checkpoint.ties
    values = {name: read_tensor(entry) for name, entry in entries.items()}
    values |= {target: values[stored] for target, stored in ties.items()}
    if "lm_head.weight" in entries:  # also where the plain model ties it: encoded heads are stored separately
        whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.clone())
    with torch.no_grad():
        for name, tensor in whole.state_dict(keep_vars=True).items():
            if name in values:
                tensor.copy_(values[name])
    return whole


def kinds(model: Any) -> dict[str, str]:
    """weight -> the class of its encoding."""
    return {name: type(entry.encoding).__name__ for name, entry in model._checkpoint.entries.items() if entry.is_encoded}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_a_compressed_model_is_transformers_with_the_decoded_weights(
    family: str, method: str, tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder = families.save(family, tmp_path / family, torch.bfloat16)
    model = streamed(folder, compression=method, fused_products=False)
    whole = with_decoded_weights(model, plain(folder))
    assert kinds(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    steps = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(2)
    expected = whole.generate(ids, **steps)
    torch.manual_seed(2)
    assert torch.equal(model.generate(ids, **steps), expected)


@pytest.mark.parametrize("family", ["llama_biased", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_fused_products_are_near_the_decoded_weights_and_the_same_in_any_budget(
    family: str, method: str, own_checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint(family, hidden_size=64)
    model, large = streamed(folder, compression=method), streamed(folder, compression=method, max_memory={"cpu": "1GB"})
    assert model.plan.streamed
    assert large.plan.pass_bytes < model.plan.pass_bytes
    with torch.no_grad():
        fused, decoded = model(ids).logits, streamed(folder, compression=method, fused_products=False)(ids).logits
        assert torch.equal(large(ids).logits, fused)
    assert not torch.equal(fused, decoded)
    # products of four bits round their states to eight
    assert (fused - decoded).norm() < (0.02 if method == "4bit" else 1e-4) * decoded.norm()
    steps = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(2)
    expected = large.generate(ids, **steps)
    torch.manual_seed(2)
    assert torch.equal(model.generate(ids, **steps), expected)


def test_four_bits_are_for_linear_layers_and_eight_for_the_head(own_checkpoint: Any, streamed: Any) -> None:
    model = streamed(own_checkpoint("llama_tied", dtype=torch.bfloat16, **WIDE), compression="4bit")
    found = kinds(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    assert {name: kind for name, kind in found.items() if kind == "FourBitGroups"}.keys() == {f"{name}.weight" for name in linear}
    assert {name for name, kind in found.items() if kind == "EightBitRows"} == {"lm_head.weight"}
    plain_ones = {name for name in model._checkpoint.entries if name not in found}
    assert "model.embed_tokens.weight" in plain_ones
    assert all("norm" in name or "embed" in name for name in plain_ones)


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_speculation_gives_the_same_text_in_any_budget(
    method: str, own_checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **WIDE)
    small, large = streamed(folder, compression=method), streamed(folder, compression=method, max_memory={"cpu": "1GB"})
    steps = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    looked_up = small.generate(ids, **steps, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, large.generate(ids, **steps, prompt_lookup_num_tokens=3))
    before = small.profile.passes
    assisted = small.generate(ids, **steps, assistant_model=large)
    assert small.profile.passes - before < 8
    assert torch.equal(assisted, looked_up)


def test_rows_too_long_for_groups_take_eight_bits(own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=32, intermediate_size=65_600, num_hidden_layers=1)
    found = kinds(streamed(folder, compression="4bit"))
    assert found["model.layers.0.mlp.down_proj.weight"] == "EightBitRows"
    assert found["model.layers.0.mlp.up_proj.weight"] == "FourBitGroups"


def test_experts_are_compressed_and_routers_are_not(own_checkpoint: Any, streamed: Any) -> None:
    model = streamed(own_checkpoint("qwen3_moe", dtype=torch.bfloat16), compression="8bit")
    found = kinds(model)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"} <= found.keys()
    assert "model.layers.0.mlp.gate.weight" in model._checkpoint.entries.keys() - found.keys()
    assert model.plan.experts.layers


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_a_pass_moves_the_small_bytes_that_the_plan_says(method: str, own_checkpoint: Any, streamed: Any, ids: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    model = streamed(folder, compression=method, prefetching=False)
    assert model.plan.pass_bytes < streamed(folder).plan.pass_bytes * (0.32 if method == "4bit" else 0.53)
    with torch.no_grad():
        model(ids)
        before = runtime_of(model).transfer.profile().bytes_read
        model(ids)
    assert runtime_of(model).transfer.profile().bytes_read - before == model.plan.pass_bytes


def test_a_plan_before_the_split_is_the_plan_after_it(own_checkpoint: Any) -> None:
    folder = own_checkpoint("llama_tied", dtype=torch.bfloat16, hidden_size=256)
    split = SplitConfig(compression=CompressionConfig(method="4bit"))
    stream = StreamConfig(device=torch.device("cpu"), device_budget_bytes=320_000)
    before = forecast(folder, SourceConfig(), split, stream)
    assert not list(folder.rglob("rabbit_shards/*"))
    prepare(folder, SourceConfig(), split, progress=False)
    after = forecast(folder, SourceConfig(), split, stream)
    assert before.streamed
    assert (before.units, before.resident, before.pass_bytes) == (after.units, after.resident, after.pass_bytes)
    assert any("streamed from the shards" in note for note in after.notes)


def test_the_command_says_what_it_made(own_checkpoint: Any, rabbit: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16)
    assert "bfloat16 in 4bit, in" in rabbit("split", folder, "--compression", "4bit").out
    assert rabbit("verify", folder).code == 0
    assert "streamed from the shards" in rabbit("plan", folder, "--compression", "4bit", "--device", "cpu", "-m", "9MB").out


def test_the_footprint_is_that_of_what_is_stored(own_checkpoint: Any, streamed: Any, plain: Any) -> None:
    folder = own_checkpoint("llama_tied", dtype=torch.bfloat16, hidden_size=256)
    model, whole = streamed(folder, compression="8bit"), plain(folder)
    encoded = sum(entry.nbytes for entry in model._checkpoint.entries.values())
    buffers = whole.get_memory_footprint() - whole.get_memory_footprint(return_buffers=False)
    assert model.get_memory_footprint() == encoded + buffers
    assert model.get_memory_footprint(return_buffers=False) == encoded


def test_adapters_and_sessions_work_on_packed_weights(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **WIDE)
    model = streamed(folder, compression="4bit")
    steps = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **steps)
    model.tokenizer = words(96)
    with Session(model) as session:
        (reply,) = session.generate([ids[0].tolist()], max_new_tokens=5, temperature=0)
    assert list(reply.tokens) == before[0, ids.shape[1] :].tolist()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    with torch.no_grad():
        changed = adapted(ids).logits
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, streamed(folder, compression="4bit")(ids).logits)
    assert not torch.equal(changed, streamed(folder, compression="4bit")(ids).logits)


def test_a_gguf_file_is_compressed_too(smollm: Path, tmp_path: Path, rabbit: Any) -> None:
    """Only its plan: a split takes seconds."""
    arguments = ("plan", smollm, "--device", "cpu", "-m", "400MB", "--saving-path", tmp_path)
    told = rabbit(*arguments, "--compression", "4bit").out
    assert "split first, into" in told
    assert "-4bit" in told


def test_each_compression_has_a_folder_and_leaves_the_others_valid(
    own_checkpoint: Any, streamed: Any, plain: Any, ids: Any
) -> None:
    folder = own_checkpoint("llama")
    streamed(folder, split="always")
    eight = streamed(folder, compression="8bit")(ids).logits
    streamed(folder, compression="4bit")
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("rabbit_shards/*/*")}
    assert {path.parent.name for path in made} == {"float32", "float32-8bit", "float32-4bit"}
    assert torch.equal(streamed(folder, split="always")(ids).logits, plain(folder)(ids).logits)
    assert torch.equal(streamed(folder, compression="8bit")(ids).logits, eight)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("rabbit_shards/*/*")} == made


def test_originals_may_be_deleted(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama_tied", dtype=torch.bfloat16)
    expected = streamed(folder, compression="4bit")(ids).logits
    streamed(folder, compression="4bit", delete_original=True)
    assert not list(folder.glob("*.safetensors"))
    assert torch.equal(streamed(folder, compression="4bit")(ids).logits, expected)


BNB = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(("made", "asked", "advice"), [
    ({"compression": "4bit"}, {}, 'pass compression="4bit" (`rabbit run {folder} --compression 4bit`)'),
    ({"compression": "8bit"}, {"compression": "4bit"}, 'pass compression="8bit" (`rabbit run {folder} --compression 8bit`)'),
    ({"split": "always"}, {"dtype": "float32"}, 'pass dtype="bfloat16" (`rabbit run {folder} --dtype bfloat16`)'),
    ({"split": "always"}, {"compression": "8bit"}, "pass compression=None"),
    ({"quantization_config": BitsAndBytesConfig(**BNB)}, {}, "pass quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
     'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'),
])  # fmt: skip
def test_an_error_for_deleted_originals_names_the_split_that_is_left(
    own_checkpoint: Any, streamed: Any, made: dict[str, Any], asked: dict[str, Any], advice: str
) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16)
    streamed(folder, delete_original=True, **made)
    (shards,) = (path for path in (folder / "rabbit_shards").iterdir() if path.is_dir())
    with pytest.raises(errors.CheckpointNotFoundError) as caught:
        streamed(folder, **asked)
    assert f"a split of them is in {shards}: " in str(caught.value)
    assert str(caught.value).endswith(advice.format(folder=folder))
    assert [path for path in (folder / "rabbit_shards").iterdir() if path.is_dir()] == [shards]
    streamed(folder, **made)


def test_a_quantised_source_is_compressed_from_its_decoded_weights(tmp_path: Path, streamed: Any, ids: torch.Tensor) -> None:
    folder = rewrite(families.save("llama", tmp_path / "model", torch.bfloat16), to_fp8, FP8)
    model = streamed(folder, compression="8bit")
    weight = read_tensor(streamed(folder)._checkpoint.entries["model.layers.0.mlp.up_proj.weight"])
    entry = model._checkpoint.entries["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(read_tensor(entry.components[0]), entry.encoding.compress(weight)[0])


def test_weights_that_are_not_finite_are_stored_as_they_are(own_checkpoint: Any, streamed: Any, caplog: Any) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16)
    path = next(path for path in folder.glob("*.safetensors") if any("up_proj" in name for name in load_file(path)))
    tensors = load_file(path)
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    model = streamed(folder, compression="8bit")
    assert name not in kinds(model)
    assert f"{name} is not compressed: it has values that are not finite" in caplog.text


def set_kind(rows: Any, tensors: Any) -> None:
    next(iter(rows.values()))["form"] = "int3"


def drop_component(rows: Any, tensors: Any) -> None:
    del tensors[f"{next(iter(rows))}.scales"]


def cut_component(rows: Any, tensors: Any) -> None:
    name = f"{next(iter(rows))}.scales"
    tensors[name] = tensors[name][:-1].clone()


def set_shape(rows: Any, tensors: Any) -> None:
    next(iter(rows.values()))["shape"] = [3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_kind, "is stored as 'int3', this version reads int8_rows"),
        (drop_component, r"\.scales is missing"),
        (cut_component, r"\.scales is \[\d+\] torch.bfloat16, expected \["),
        (set_shape, r"shape \[3\] and torch.bfloat16 is not a matrix"),
    ],
)
def test_an_encoding_that_does_not_match_its_tensors_names_the_shard(
    change: Callable[[Any, Any], None], said: str, own_checkpoint: Any, streamed: Any
) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16)
    model = streamed(folder, compression="8bit")
    path = model._checkpoint.folder / "model.layers.0.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    rows, tensors = json.loads(metadata["encodings"]), load_file(path)
    change(rows, tensors)
    save_file(tensors, path, metadata={**metadata, "encodings": json.dumps(rows)})
    manifest = model._checkpoint.folder / "manifest.json"
    raw, record = json.loads(manifest.read_text()), shard_record(path)
    for row in raw["shards"]:
        if row["name"] == record.name:
            row.update(file_bytes=record.file_bytes, header_xxh3_128=record.header_xxh3_128)
    manifest.write_text(json.dumps(raw))
    with pytest.raises(errors.DamagedShardError, match=rf"model\.layers\.0\.safetensors cannot be read: .*{said}"):
        streamed(folder, compression="8bit")

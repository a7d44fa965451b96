"""GGUF files streamed as they are: the bits of transformers' own load, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
from transformers import AutoTokenizer

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.checkpoints.preparation import prepare
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.quantization.gguf import BLOCKS, PLAIN
from rabbit_engine.quantization.kernels import torch_operations
from rabbit_engine.storage.jsonvalues import sealed, unsealed

Loader = Callable[..., Any]

KINDS = {
    "phi3": "Q8_0",
    "qwen2moe": "Q4_1",
    "qwen3moe": "Q5_0",
    "minimax-m2": "Q3_K",
    "bloom": "Q6_K",
    "gpt2": "Q5_K",
    "mamba": "Q8_0",
}


def require_equal_logits(path: Path, dtype: torch.dtype, plain: Loader, streamed: Loader, ids: torch.Tensor) -> Any:
    before = sorted(path.parent.rglob("*"))
    model = streamed(path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(path.parent, gguf_file=path.name, dtype=dtype)(ids).logits)
    assert sorted(path.parent.rglob("*")) == before
    return model


@pytest.mark.parametrize("architecture", sorted(gguf_files.CONFIGS))
def test_families_stream_in_place_with_the_bits_of_transformers(
    architecture: str, tmp_path: Path, plain: Loader, streamed: Loader, ids: torch.Tensor
) -> None:
    if not gguf_files.is_read(architecture):
        pytest.skip(f"this transformers reads no {architecture}")
    path = gguf_files.write(tmp_path / "m.gguf", architecture, KINDS.get(architecture, "Q4_K"))
    require_equal_logits(path, torch.bfloat16, plain, streamed, ids)


@pytest.mark.parametrize("kind", sorted({*BLOCKS, *PLAIN}))
def test_every_type_streams_in_place_with_the_bits_of_transformers(
    kind: str, tmp_path: Path, plain: Loader, streamed: Loader, ids: torch.Tensor
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", kind, head="Q6_K" if kind in BLOCKS else None)
    model = require_equal_logits(path, torch.float16, plain, streamed, ids)
    assert kind in PLAIN or model.plan.pass_bytes > model.plan.weights_bytes / 3


def test_a_file_without_a_dtype_loads_in_the_dtype_of_transformers(
    tmp_path: Path, plain: Loader, streamed: Loader, ids: Any
) -> None:
    for kind, dtype in (("Q4_0", torch.float32), ("F16", torch.float32)):
        path = gguf_files.write(tmp_path / f"{kind}.gguf", "llama", kind)
        model, reference = streamed(path), plain(tmp_path, gguf_file=path.name)
        assert model.dtype == reference.dtype == dtype
        with torch.no_grad():
            assert torch.equal(model(ids).logits, reference(ids).logits)


def test_experts_are_read_one_by_one(tmp_path: Path, streamed: Loader) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "qwen3moe", "Q8_0")
    model = streamed(path, dtype=torch.bfloat16, profiling_mode=True)
    with torch.no_grad():
        model(torch.tensor([[5]]))
    read = model.profile.bytes_read
    assert 0 < read < 0.8 * model.plan.weights_bytes  # two of four experts of each layer


def test_a_session_answers_as_each_text_alone(tmp_path: Path, streamed: Loader) -> None:
    model = streamed(gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K"), dtype=torch.float32)
    prompts = [[5, 6, 7], [9, 10], [11, 3, 5, 8]]
    alone = [model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :].tolist() for ids in prompts]
    with Session(model) as session:
        replies = session.generate(prompts, max_new_tokens=5, temperature=0)
    assert [list(reply.tokens) for reply in replies] == alone


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_fused_products_are_chosen_by_keyword_and_stay_within_rounding(
    kind: str, tmp_path: Path, streamed: Loader, ids: torch.Tensor
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", kind, head="Q6_K")
    with torch.no_grad():
        token, decoded = ids[:, :1], streamed(path, dtype=torch.float32)
        fused = streamed(path, dtype=torch.float32, fused_products=True)
        exact, close = decoded(token).logits, fused(token).logits
        assert not torch.equal(exact, close)
        assert (exact - close).abs().max() <= 1e-4 * exact.abs().max()
        assert torch.equal(decoded(ids).logits, fused(ids).logits)  # many rows are multiplied by the decoded weight


def test_an_adapter_runs_over_quantised_weights(tmp_path: Path, plain: Loader, streamed: Loader, ids: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K")
    reference = plain(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(reference, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model = streamed(path, dtype=torch.float32)
    model.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted(ids).logits)


def test_torch_operations_give_the_same_bits_without_numba(tmp_path: Path, streamed: Loader, ids: torch.Tensor) -> None:
    model = streamed(gguf_files.write(tmp_path / "m.gguf", "llama", "Q5_K", head="Q6_K"), dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = model(ids).logits
        with torch_operations():
            assert torch.equal(model(ids).logits, compiled)


def test_commands_take_a_file_in_place(tmp_path: Path, rabbit: Any) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K")
    planned = rabbit("plan", path, "--dtype", "bfloat16", "--max-memory", "cpu=4MB")
    assert (planned.code, "streamed from the original files" in planned.out) == (0, True)
    assert rabbit("verify", "--record", path).code == 0
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    assert rabbit("verify", path).code == 1


def test_a_split_of_a_file_holds_the_same_weights(tmp_path: Path, plain: Loader, streamed: Loader, ids: torch.Tensor) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q5_K")
    model = streamed(path, dtype=torch.bfloat16, split="always")
    assert (tmp_path / "rabbit_shards").is_dir()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(tmp_path, gguf_file="m.gguf", dtype=torch.bfloat16)(ids).logits)


def test_types_that_only_transformers_decodes_are_split_and_named(
    tmp_path: Path, plain: Loader, streamed: Loader, ids: torch.Tensor
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "IQ2_S")
    with pytest.raises(
        errors.ConfigurationError, match=r"must be split: token_embd.weight: it is stored as IQ2_S, supported are F32, F16"
    ):
        AutoModel.from_pretrained(path, device="cpu", split="never")
    with torch.no_grad():
        assert torch.equal(streamed(path)(ids).logits, plain(tmp_path, gguf_file="m.gguf")(ids).logits)


def test_a_file_that_is_replaced_while_it_streams_is_named(tmp_path: Path, streamed: Loader, ids: torch.Tensor) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K")
    model = streamed(path, dtype=torch.bfloat16)
    gguf_files.write(tmp_path / "other.gguf", "llama", "Q4_K").replace(path)
    with torch.no_grad(), pytest.raises(errors.DamagedShardError, match=r"m\.gguf"):
        model(ids)


def test_a_file_that_lacks_a_weight_is_named(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q8_0")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_norm", b"blk.1.attn_morn"))
    with pytest.raises(errors.MismatchedWeightsError, match=r"m\.gguf lacks weights of .* model\.layers\.1\.input_layernorm"):
        AutoModel.from_pretrained(path, device="cpu")


def test_a_plan_says_that_nothing_is_split(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K")
    source = prepare(path, SourceConfig(), SplitConfig(dtype=torch.bfloat16), progress=False)
    assert str(source) == "streamed from the original files"
    stored = sum(entry.nbytes for entry in source.entries.values())
    assert stored < path.stat().st_size < 1.1 * stored + 20_000


def test_a_tokenizer_is_converted_once_and_kept(tmp_path: Path, streamed: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K"), tmp_path / "cache"
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(cache))
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = ["t1 t2", "t5t7", "2 1"]
    for _ in range(2):
        tokenizer = streamed(path, dtype=torch.bfloat16).tokenizer
        assert [tokenizer(text).input_ids for text in texts] == [reference(text).input_ids for text in texts]
        assert tokenizer.name_or_path == str(tmp_path)
    (kept,) = (cache / "gguf_tokenizers").iterdir()
    kept.write_text(kept.read_text().replace("t7", "t8"))
    assert streamed(path, dtype=torch.bfloat16).tokenizer("t5t7").input_ids == reference("t5t7").input_ids


def test_the_config_of_a_file_is_read_from_its_header_once(
    tmp_path: Path, streamed: Loader, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K"), tmp_path / "cache"
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(cache))
    first, second = (streamed(path, dtype=torch.bfloat16) for _ in range(2))
    assert first.config.to_dict() == second.config.to_dict()
    assert second.config.name_or_path == str(path)
    assert torch.equal(first(ids).logits, second(ids).logits)
    (kept,) = (cache / "gguf_configs").iterdir()
    attributes = unsealed(json.loads(kept.read_text()))
    kept.write_text(json.dumps(sealed({**attributes, "rms_norm_eps": 0.25})))
    assert streamed(path, dtype=torch.bfloat16).config.rms_norm_eps == 0.25


def test_a_changed_file_or_a_damaged_copy_has_its_config_read_again(
    tmp_path: Path, streamed: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_K"), tmp_path / "cache"
    monkeypatch.setenv("RABBIT_ENGINE_CACHE", str(cache))
    expected = streamed(path, dtype=torch.bfloat16).config
    (kept,) = (cache / "gguf_configs").iterdir()
    kept.write_text(kept.read_text().replace(f'"num_hidden_layers": {expected.num_hidden_layers}', '"num_hidden_layers": 1'))
    assert streamed(path, dtype=torch.bfloat16).config.to_dict() == expected.to_dict()
    gguf_files.write(path, "llama", "Q4_K", num_hidden_layers=1)
    assert streamed(path, dtype=torch.bfloat16).config.num_hidden_layers == 1
    assert len(list((cache / "gguf_configs").iterdir())) == 2

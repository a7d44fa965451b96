"""Checkpoints from the Hub, through huggingface_hub's real client, over a hub of our own on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import matrix
import pytest
import torch
from fake_hub import COMMIT, FakeHub
from safetensors.torch import load_file, save_file

from rabbit_engine import errors
from rabbit_engine.checkpoints import prepare
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.model.runtime import runtime_of

REPO = "someone/tiny-llama"


@pytest.fixture
def hub(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "repo"
    shutil.copytree(checkpoint("llama"), folder, ignore=shutil.ignore_patterns("rabbit_shards", ".*"))
    (folder / "consolidated.00.safetensors").write_bytes(b"not wanted")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "README.md").write_text("not wanted")
    with FakeHub(repos={REPO: folder}).as_the_hub(monkeypatch) as hub:
        yield hub


def test_repo_streams_and_only_needed_files_travel(
    hub: FakeHub, tmp_path: Path, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    model = streamed(REPO, cache_dir=tmp_path / "cache", split="always")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(checkpoint("llama"))(ids).logits)
    names = {name for name, _ in hub.served}
    assert names.isdisjoint({"consolidated.00.safetensors", "pytorch_model.bin", "README.md"})
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert model.name_or_path == REPO
    folder = runtime_of(model).checkpoint.folder
    assert folder == tmp_path / "cache" / "models--someone--tiny-llama" / "rabbit_shards" / COMMIT / "float32"


def test_weights_of_sentence_transformers_steps_travel_too(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    wanted = {"2_Dense/config.json", "2_Dense/model.safetensors", "3_LayerNorm/pytorch_model.bin"}
    for name in (*wanted, "0_Transformer/model.safetensors"):
        (hub.repos[REPO] / name).parent.mkdir(exist_ok=True)
        (hub.repos[REPO] / name).write_text(json.dumps({"file": name}))
    streamed(REPO, cache_dir=tmp_path / "cache")
    names = {name for name, _ in hub.served}
    assert wanted <= names
    assert "0_Transformer/model.safetensors" not in names


def test_second_load_downloads_no_weights_and_works_offline(hub: FakeHub, tmp_path: Path, streamed: Any, ids: Any) -> None:
    first = streamed(REPO, cache_dir=tmp_path / "cache")(ids).logits
    hub.served.clear()
    assert torch.equal(streamed(REPO, cache_dir=tmp_path / "cache")(ids).logits, first)
    hub.repos.clear()
    assert torch.equal(streamed(REPO, cache_dir=tmp_path / "cache", local_files_only=True)(ids).logits, first)
    assert hub.served == []


def test_a_part_of_a_repo_in_a_variant_is_fetched_alone_and_split_by_itself(
    hub: FakeHub, tmp_path: Path, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    part = hub.repos[REPO] / "onnx" / "part"
    shutil.copytree(
        checkpoint("llama_tied"), part, ignore=shutil.ignore_patterns("rabbit_shards", ".*", "*.safetensors", "*index*")
    )
    weights = {key: value for file in checkpoint("llama_tied").glob("*.safetensors") for key, value in load_file(file).items()}
    save_file(weights, part / "model.fp16.safetensors", {"format": "pt"})
    want = plain(part, variant="fp16")(ids).logits
    wanted = {"cache_dir": tmp_path / "cache", "subfolder": "onnx/part", "variant": "fp16"}
    model = streamed(REPO, **wanted, split="always")
    assert torch.equal(model(ids).logits, want)
    assert {name for name, _ in hub.served if name.endswith(".safetensors")} == {"onnx/part/model.fp16.safetensors"}
    shards = tmp_path / "cache" / "models--someone--tiny-llama" / "rabbit_shards"
    assert runtime_of(model).checkpoint.folder == shards / f"{COMMIT}--onnx--part" / "variant.fp16-float32"
    assert torch.equal(streamed(f"https://hf.co/{REPO}/tree/main/onnx/part", **{**wanted, "subfolder": ""})(ids).logits, want)
    assert not torch.equal(streamed(REPO, cache_dir=tmp_path / "cache", split="always")(ids).logits, want)


def test_files_are_fetched_again_as_asked(hub: FakeHub, tmp_path: Path, streamed: Any, ids: Any) -> None:
    first = streamed(REPO, cache_dir=tmp_path / "cache")(ids).logits
    hub.served.clear()
    again = streamed(REPO, cache_dir=tmp_path / "cache", force_download=True, max_memory={"cpu": "1MB"})
    assert torch.equal(again(ids).logits, first)
    names = [name for name, _ in hub.served]
    assert {"config.json", "model.safetensors.index.json"} <= set(names)
    assert len([name for name in names if name.endswith(".safetensors")]) == len(
        list(runtime_of(again).checkpoint.repo.folder.glob("*.safetensors"))
    )


def test_deleted_originals_are_not_downloaded_again(hub: FakeHub, tmp_path: Path, streamed: Any, ids: Any) -> None:
    first = streamed(REPO, cache_dir=tmp_path / "cache", delete_original=True)(ids).logits
    left = [
        p for p in (tmp_path / "cache").rglob("*") if p.is_file() and "rabbit_shards" not in p.parts and p.stat().st_size > 20_000
    ]
    assert left == []
    hub.served.clear()
    for keywords in ({}, {"local_files_only": True}):
        assert torch.equal(streamed(REPO, cache_dir=tmp_path / "cache", **keywords)(ids).logits, first)
    assert hub.served == []


def test_a_damaged_shard_of_deleted_originals_is_rebuilt_as_its_error_says(
    hub: FakeHub, tmp_path: Path, streamed: Any, ids: Any
) -> None:
    model = streamed(REPO, cache_dir=tmp_path / "cache", delete_original=True)
    expected, path = model(ids).logits, runtime_of(model).checkpoint.folder / "model.layers.1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.DamagedShardError, match="; run `rabbit split` with the same options to rebuild it"):
        streamed(REPO, cache_dir=tmp_path / "cache")
    prepare(REPO, SourceConfig(cache_dir=tmp_path / "cache"), SplitConfig(mode="always"), progress=False, repair=True)
    assert torch.equal(streamed(REPO, cache_dir=tmp_path / "cache")(ids).logits, expected)


def test_interrupted_download_resumes(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    hub.cut_after = 10_000
    folder = runtime_of(streamed(REPO, cache_dir=tmp_path / "cache")).checkpoint.repo.folder
    assert 10_000 in [size for _, size in hub.served]
    for original in hub.repos[REPO].glob("model-*.safetensors"):
        assert (folder / original.name).read_bytes() == original.read_bytes()


def test_gated_repo(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    hub.gated.add(REPO)
    with pytest.raises(errors.GatedCheckpointError, match="accept its licence"):
        streamed(REPO, cache_dir=tmp_path / "cache")
    with pytest.raises(errors.GatedCheckpointError, match="has no access"):
        streamed(REPO, cache_dir=tmp_path / "cache", token="hf_bad")
    streamed(REPO, cache_dir=tmp_path / "a", token="hf_good")
    streamed(REPO, cache_dir=tmp_path / "b", hf_token="hf_good")


def test_token_of_the_environment_counts(hub: FakeHub, tmp_path: Path, streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    streamed(REPO, cache_dir=tmp_path / "cache")
    assert set(hub.tokens) == {"Bearer hf_good"}


def test_missing_repo_revision_and_network(hub: FakeHub, tmp_path: Path, streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="someone/nothing is neither a folder on this machine nor a repo"):
        streamed("someone/nothing", cache_dir=tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError, match="has no revision 'v9'"):
        streamed(REPO, revision="v9", cache_dir=tmp_path)
    with pytest.raises(errors.HubUnreachableError, match="not in the cache"):
        streamed(REPO, local_files_only=True, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(errors.HubUnreachableError, match="does not answer"):
        streamed(REPO, cache_dir=tmp_path)


def test_disk_is_counted_before_the_download(
    hub: FakeHub, tmp_path: Path, streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(errors.NotEnoughDiskError, match=f"downloading {REPO}"):
        streamed(REPO, cache_dir=tmp_path / "cache")
    assert not [name for name, _ in hub.served if name.endswith(".safetensors")]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write: /proc")
def test_an_unwritable_shards_folder_is_reported_before_the_download(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    with pytest.raises(errors.ShardsNotWritableError, match="layer_shards_saving_path"):
        streamed(REPO, cache_dir=tmp_path / "cache", layer_shards_saving_path="/proc/rabbit")
    assert not [name for name, _ in hub.served if name.endswith(".safetensors")]


def test_another_commit_is_another_split(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    streamed(REPO, cache_dir=tmp_path / "cache", split="always")
    hub.commit = "f" * 40
    model = streamed(REPO, cache_dir=tmp_path / "cache", split="always")
    assert runtime_of(model).checkpoint.folder.parent.name == "f" * 40


@pytest.mark.network
def test_real_hub(tmp_path: Path, streamed: Any) -> None:
    model = streamed("hf-internal-testing/tiny-random-LlamaForCausalLM", cache_dir=tmp_path)
    assert model.tokenizer.decode(model.generate(model.tokenizer("Hello", return_tensors="pt").input_ids, max_new_tokens=3)[0])


def test_a_converted_family_comes_without_its_code_and_is_known_by_its_name(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    folder = shutil.copytree(matrix.ORACLES / "chatglm2_32k", tmp_path / "chatglm")
    raw = json.loads((folder / "config.json").read_text())
    del raw["_name_or_path"]
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "tokenizer.model"):
        (folder / name).write_text(f"raise SystemExit  # {name}")
    (folder / "quantization.py").write_text("raise SystemExit")
    hub.repos["someone/chatglm2-6b-32k"] = folder
    model = streamed("someone/chatglm2-6b-32k", cache_dir=tmp_path / "cache")
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        assert (model(expected["input_ids"]).logits - expected["logits"]).abs().max() < 1e-4
    names = {name for name, _ in hub.served}
    assert {"tokenizer.model", "tokenization_chatglm.py", "modeling_chatglm.py"} <= names, "read as text"
    assert "quantization.py" not in names


def test_a_relative_cache_survives_a_change_of_folder(
    hub: FakeHub, tmp_path: Path, streamed: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = streamed(REPO, cache_dir="cache")
    before = model(ids).logits
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(model(ids).logits, before)
    assert runtime_of(model).checkpoint.folder.is_absolute()


@pytest.mark.parametrize("index", [True, False])
def test_offline_without_the_weights_says_so(index: bool, hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    cache = tmp_path / "cache"
    streamed(REPO, cache_dir=cache)
    for path in cache.rglob("*.safetensors*"):
        if not index or not path.name.endswith(".json"):
            path.unlink()
    with pytest.raises(errors.HubUnreachableError, match=r"weights of .*tiny-llama are not in the cache, and downloads are off"):
        streamed(REPO, cache_dir=cache, local_files_only=True)


def test_a_branch_of_the_cache_that_climbs_is_refused(hub: FakeHub, tmp_path: Path, streamed: Any) -> None:
    streamed(REPO, cache_dir=tmp_path / "cache")
    (reference,) = (tmp_path / "cache").rglob("refs/main")
    reference.write_text("../../../outside")
    with pytest.raises(errors.DamagedCheckpointError, match="refs/main does not name a commit"):
        streamed(REPO, cache_dir=tmp_path / "cache", local_files_only=True)

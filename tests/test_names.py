"""What people call a model: repo ids, folders, files of one, addresses copied from the Hub, and slips of the pen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rabbit_engine import AutoModel, errors
from rabbit_engine.utils.names import Address, read_name

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("org/name", Address("org/name")),
        (" org/name/ ", Address("org/name")),
        ("gpt2", Address("gpt2")),
        (f"{HUB}/org/name", Address("org/name")),
        (f"{HUB}/gpt2/", Address("gpt2")),
        (f"{HUB}/org/name/tree/v1.5", Address("org/name", revision="v1.5")),
        (f"{HUB}/gpt2/tree/main/part-1.5", Address("gpt2", revision="main", subfolder="part-1.5")),
        (f"{HUB}/org/name/tree/refs%2Fpr%2F1", Address("org/name", revision="refs/pr/1")),
        (f"{HUB}/org/name/tree/refs/pr/1/part", Address("org/name", revision="refs/pr/1", subfolder="part")),
        (f"{HUB}/org/name/blob/main/config.json", Address("org/name", revision="main")),
        (
            f"{HUB}/org/name/blob/main/part/model.fp16-00001-of-00002.safetensors",
            Address("org/name", revision="main", subfolder="part", variant="fp16", use_safetensors=True),
        ),
        (f"{HUB}/org/name/resolve/main/q/m.gguf?download=true", Address("org/name", revision="main", gguf_file="q/m.gguf")),
        ("hf.co/org/name", Address("org/name")),
        ("hf://org/name@dev/part", Address("org/name", revision="dev", subfolder="part")),
    ],
)
def test_an_address_is_the_repo_the_revision_and_the_part(name: str, address: Address) -> None:
    assert read_name(name) == address


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "is empty"),
        (None, "is not a model name"),
        (7, "is not a model name"),
        (f"{HUB}/datasets/org/name", "not the URL of a model"),
        ("https://example.com/org/name", "not a Hub URL"),
        ("s3://bucket/name", "not a Hub URL"),
    ],
)
def test_an_invalid_name_is_refused(name: Any, told: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=told):
        AutoModel.from_pretrained(name)


def test_a_weight_file_selects_its_folder(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder: Path = checkpoint("llama_tied")
    want = streamed(folder)(ids).logits
    file = next(folder.glob("*.safetensors"))
    for name in (folder / "config.json", file, str(file), f"{folder}/", str(folder).replace("/", "\\")):
        assert torch.equal(streamed(name)(ids).logits, want)


def test_a_file_that_nothing_is_loaded_from_is_refused(own_checkpoint: Any, streamed: Any) -> None:
    other = own_checkpoint("llama") / "consolidated.00.pth"
    other.touch()
    with pytest.raises(errors.CheckpointNotFoundError, match="is a file: pass a model folder"):
        streamed(other)


def test_a_mistyped_path_names_the_nearest(tmp_path: Path, streamed: Any) -> None:
    (tmp_path / "Llama-3.2-1B" / "part").mkdir(parents=True)
    for typed in ("lama-3.2-1b", "Llama-3.2-1"):
        with pytest.raises(errors.CheckpointNotFoundError, match=r"does not exist; did you mean .*Llama-3\.2-1B\?"):
            streamed(tmp_path / typed)
    with pytest.raises(errors.CheckpointNotFoundError, match=r"did you mean .*Llama-3\.2-1B\?"):
        streamed(tmp_path / "Llama-3.2-1b" / "part")
    with pytest.raises(errors.CheckpointNotFoundError, match=r"does not exist \(there is no .*another\): give a folder"):
        streamed(tmp_path / "another" / "thing")


def test_a_mistyped_folder_that_could_be_a_repo_id_names_the_nearest(
    tmp_path: Path, streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.HubUnreachableError, match=r"did you mean models/llama-3\?"):
        streamed("models/lama-3", local_files_only=True)


def test_an_address_and_keywords_that_disagree_are_refused(streamed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="selects revision='main', but revision='dev' is given"):
        streamed(f"{HUB}/org/name/tree/main", revision="dev")


@pytest.mark.parametrize("name", ["a" * 5000, "~no_such_user/model", "no\0such"])
def test_a_name_that_no_system_accepts_is_a_rabbit_error(name: str) -> None:
    with pytest.raises(errors.RabbitError):
        AutoModel.from_pretrained(name, device="cpu", local_files_only=True)

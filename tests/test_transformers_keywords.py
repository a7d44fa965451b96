"""Every keyword of transformers' `from_pretrained` is in the table, and does what the table says."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from rabbit_engine import AutoModel, errors
from rabbit_engine.utils.keywords import KEYWORDS, OWN_KEYWORDS

TABLE = {row.name: row for row in KEYWORDS}
OWN = set(inspect.signature(AutoModel.from_pretrained).parameters)
NOT_ASKED = {"cls", "kwargs", "model_args", "pretrained_model_name_or_path", "config_dict"}


def keywords_of(function: Any) -> set[str]:
    """The parameters of a function, what it takes out of its `**kwargs`, and what its docstring lists."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set(inspect.signature(function).parameters)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("pop", "get"):
            of_kwargs = isinstance(node.func.value, ast.Name) and node.func.value.id == "kwargs"
            found |= {node.args[0].value} if of_kwargs and isinstance(node.args[0], ast.Constant) else set()
        elif isinstance(node, ast.List) and node.elts and all(isinstance(e, ast.Constant) for e in node.elts):
            found |= {e.value for e in node.elts if isinstance(e.value, str)}
    return found | set(re.findall(r"^\s+(\w+) ?\(`", inspect.getdoc(function) or "", re.MULTILINE))


@pytest.mark.parametrize(
    "function",
    [
        PreTrainedModel.from_pretrained.__func__,
        _BaseAutoModelClass.from_pretrained.__func__,
        PretrainedConfig._get_config_dict.__func__,
        PretrainedConfig.from_dict.__func__,
    ],
    ids=lambda function: function.__qualname__,
)
def test_the_table_has_every_keyword_of_transformers(function: Any) -> None:
    assert keywords_of(function) - NOT_ASKED <= set(TABLE) | {"pretrained_model_name_or_path"}


def test_supported_keywords_are_parameters_or_attributes_of_the_config() -> None:
    attributes = {"num_labels", "output_attentions", "model_type", "experts_implementation"}
    shorthands = {"load_in_4bit", "load_in_8bit"}
    assert {name for name, row in TABLE.items() if row.treatment == "done"} - OWN == attributes | shorthands
    assert len(TABLE) == len(KEYWORDS)
    assert OWN - set(TABLE) == {*OWN_KEYWORDS, "pretrained_model_name_or_path", "other"}


def test_accepted_keywords_change_nothing(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, recwarn: Any) -> None:
    accepted = {row.name: "anything" for row in KEYWORDS if row.treatment == "accepted"}
    harmless = {row.name: row.harmless[0] for row in KEYWORDS if row.treatment == "refused"}
    model, whole = streamed(checkpoint("llama"), **accepted, **harmless), plain(checkpoint("llama"))
    assert model.config.to_dict() == whole.config.to_dict()
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert not [warning for warning in recwarn if "no meaning" in str(warning.message)]


@pytest.mark.parametrize("row", [row for row in KEYWORDS if row.treatment == "refused"], ids=lambda row: row.name)
def test_a_refused_keyword_says_why(row: Any) -> None:
    asked = {row.name: False if row.name == "weights_only" else object()}
    with pytest.raises(errors.ConfigurationError, match=f"^{row.name}=.* {re.escape(row.reason)}"):
        AutoModel.from_pretrained("anything", device="cpu", **asked)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential", {"": "cpu"}, "cpu"])
def test_maps_of_one_device(device_map: Any, checkpoint: Any, ids: torch.Tensor) -> None:
    with AutoModel.from_pretrained(checkpoint("llama"), device_map=device_map, max_memory={0: "1MB"}) as model:
        assert model(ids).logits.shape == (1, 12, 96)


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_cache": False},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"num_labels": 5},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.1, "pad_token_id": 7},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
@torch.no_grad()
def test_attributes_of_the_config_are_set_as_in_transformers(
    overrides: dict[str, Any], checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    whole, model = plain(checkpoint("llama"), **overrides), streamed(checkpoint("llama"), **overrides)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    got, want = model(ids), whole(ids)
    assert torch.equal(got.logits, want.logits)
    assert (got.attentions is None, got.past_key_values is None) == (want.attentions is None, want.past_key_values is None)


def test_fewer_layers_are_requested_by_an_attribute(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    whole, model = (load(checkpoint("llama"), num_hidden_layers=2) for load in (plain, streamed))
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_a_keyword_that_is_not_an_attribute_of_the_config_is_unknown(checkpoint: Any, streamed: Any) -> None:
    for keywords, nearest in ({"num_hiden_layers": 2}, "num_hidden_layers"), ({"low_cpu_memory_usage": 1}, "low_cpu_mem_usage"):
        with pytest.raises(errors.UnknownKeywordError, match=f"no keyword '{next(iter(keywords))}'.* did you mean '{nearest}'"):
            streamed(checkpoint("llama"), **keywords)


@torch.no_grad()
def test_a_given_config_replaces_the_checkpoints(
    checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    config = AutoConfig.from_pretrained(folder, rms_norm_eps=0.1, attn_implementation="eager")
    before = copy.deepcopy(config.to_dict())
    want = plain(folder, config=config)(ids).logits
    model = streamed(folder, config=config)
    assert torch.equal(model(ids).logits, want)
    assert model.active_attention_implementation == "eager"
    model.config.use_cache = False
    assert config.to_dict() == before
    config.save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert streamed(folder, config=place).config.rms_norm_eps == 0.1
    made = transformers.LlamaConfig(**{k: v for k, v in before.items() if k not in ("architectures", "dtype")})
    assert torch.equal(streamed(folder, config=made, use_cache=False)(ids).logits, plain(folder, config=made)(ids).logits)
    with pytest.raises(errors.ConfigurationError, match="config=7 is not a config"):
        streamed(folder, config=7)


def test_a_given_generation_config_replaces_the_checkpoints(
    checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    given = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    model, whole = (load(checkpoint("llama"), generation_config=given) for load in (streamed, plain))
    assert model.generation_config == whole.generation_config
    assert model.generation_config is not given
    assert torch.equal(model.generate(ids), whole.generate(ids))
    with pytest.raises(errors.ConfigurationError, match="is not a transformers GenerationConfig"):
        streamed(checkpoint("llama"), generation_config={"max_new_tokens": 3})


def test_loading_info_equals_that_of_transformers(own_checkpoint: Any, plain: Any) -> None:
    folder = own_checkpoint("llama_tied")
    path = next(folder.glob("*.safetensors"))
    save_file({**load_file(path), "score.weight": torch.ones(2, 32)}, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        save_file({k: v for file in files for k, v in load_file(file).items()}, folder / "model.safetensors", {"format": "pt"})
    _, want = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for split in ("auto", "always"):
        model, info = AutoModel.from_pretrained(
            folder, device="cpu", max_memory={"cpu": "1MB"}, output_loading_info=True, split=split
        )
        model.close()
        assert info == want


def _moved(folder: Path, to: Path, scale: float = 1.0, variant: str = "") -> None:
    """The checkpoint in another folder, its weights scaled, the files named after a variant."""
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: tensor * scale for name, tensor in load_file(path).items()}
            save_file(tensors, to / _of_variant(path.name, variant), {"format": "pt"})
        elif path.name.endswith("index.json"):
            index = json.loads(path.read_text())
            index["weight_map"] = {key: _of_variant(name, variant) for key, name in index["weight_map"].items()}
            name = path.name.replace(".json", f".{variant}.json") if variant else path.name
            (to / name).write_text(json.dumps(index))
        elif path.is_file():
            shutil.copy(path, to / path.name)


def _of_variant(name: str, variant: str) -> str:
    return name.replace("model", f"model.{variant}", 1) if variant else name


@pytest.mark.parametrize("split", ["auto", "always"])
def test_subfolders_and_variants_are_distinguished(
    split: str, checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    _moved(checkpoint("llama"), tmp_path)
    _moved(checkpoint("llama"), tmp_path, 0.5, "half")
    _moved(checkpoint("llama"), tmp_path / "part", 0.25)
    told: list[torch.Tensor] = []
    for keywords in ({}, {"variant": "half"}, {"subfolder": "part"}, {"variant": "half"}, {}):
        want = plain(tmp_path, **keywords)(ids).logits
        assert torch.equal(streamed(tmp_path, split=split, **keywords)(ids).logits, want)
        told.append(want)
    assert not torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])


def test_a_missing_subfolder_is_named(checkpoint: Any, streamed: Any, tmp_path: Path) -> None:
    _moved(checkpoint("llama"), tmp_path, variant="half")
    with pytest.raises(errors.CheckpointNotFoundError, match="its variants, for variant=: half"):
        streamed(tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError, match="has no subfolder 'pard'"):
        streamed(tmp_path, subfolder="pard")
    with pytest.raises(errors.ConfigurationError, match="is outside the checkpoint"):
        streamed(tmp_path, subfolder="../other")


def test_safetensors_or_pickles_are_taken_as_asked(
    checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    _moved(checkpoint("llama"), tmp_path)
    weights = {name: tensor * 2 for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for choice in (None, False, True, False):
        want = plain(tmp_path, use_safetensors=choice)(ids).logits
        assert torch.equal(streamed(tmp_path, use_safetensors=choice)(ids).logits, want)
    for file in tmp_path.glob("model*"):
        file.unlink()
    with pytest.raises(errors.CheckpointNotFoundError, match=r"none of model\.safetensors, model\.safetensors\.index\.json;"):
        streamed(tmp_path, use_safetensors=True)


def test_stored_names_are_mapped(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    _moved(checkpoint("llama"), tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        save_file({name.replace("model.layers", "blocks"): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    for index in tmp_path.glob("*.index.json"):
        index.write_text(index.read_text().replace("model.layers", "blocks"))
    mapping = {"^blocks": "model.layers"}
    want = plain(tmp_path, key_mapping=mapping)(ids).logits
    for split in ("auto", "always"):
        assert torch.equal(streamed(tmp_path, key_mapping=mapping, split=split)(ids).logits, want)


def test_a_model_is_not_made_from_a_config_alone(checkpoint: Any) -> None:
    with pytest.raises(TypeError, match="would make random weights"):
        AutoModel.from_config(AutoConfig.from_pretrained(checkpoint("llama")))


@pytest.mark.parametrize(
    "keywords",
    [
        {"subfolder": 3},
        {"revision": 3},
        {"variant": 3},
        {"gguf_file": 3},
        {"code_revision": 3},
        {"cache_dir": 5},
        {"layer_shards_saving_path": 5},
        {"key_mapping": 5},
        {"key_mapping": {"(": "x"}},
        {"key_mapping": {"^model": 3}},
    ],
)
def test_a_value_of_the_wrong_type_is_named(keywords: dict[str, Any], checkpoint: Any) -> None:
    name = next(iter(keywords))
    with pytest.raises(errors.ConfigurationError, match=name):
        AutoModel.from_pretrained(checkpoint("llama"), device="cpu", **keywords)

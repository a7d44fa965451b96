"""What callers may ask for: every keyword means something, is named in a warning, or is an error that names the nearest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, GPTQConfig

from rabbit_engine import AutoModel, errors
from rabbit_engine.config import StreamConfig, parse_dtype
from rabbit_engine.devices import parse_device, parse_max_memory, parse_planned_device
from rabbit_engine.utils import keywords, platform

RABBITLLM = {
    "max_seq_len": 512,
    "prefetching": True,
    "prefetch_pin_memory": True,
    "use_gds": True,
    "kv_cache_dir": None,
    "token": "hf_x",
    "profiling_mode": False,
    "delete_original": False,
    "cache_layers": 30,
    "offload_small_layers": False,
    "persister": None,
    "show_layer_progress": True,
    "attn_implementation": "auto",
    "compression": None,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _fresh_warnings() -> None:
    keywords.warn_retired.cache_clear()


def test_a_script_with_rabbitllms_keywords_runs(checkpoint: Any, plain: Any, ids: torch.Tensor) -> None:
    with (
        pytest.warns(UserWarning, match="no effect here") as caught,
        AutoModel.from_pretrained(checkpoint("qwen2"), **RABBITLLM) as model,
    ):
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=True
        )
    assert torch.equal(tokens, plain(checkpoint("qwen2")).generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    said = [str(w.message) for w in caught if "no effect here" in str(w.message)]
    assert sorted(text.split()[0] for text in said) == [
        "cache_layers",
        "offload_small_layers",
        "prefetch_pin_memory",
        "use_gds",
    ]
    assert all(" has no effect here; " in text for text in said)


def test_a_retired_keyword_warns_once(checkpoint: Any, streamed: Any) -> None:
    with pytest.warns(UserWarning, match=r"cache_layers has no effect here; use max_memory="):
        streamed(checkpoint("llama"), cache_layers=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed(checkpoint("llama"), cache_layers=4)


@pytest.mark.parametrize("given", [{"max_memory": {0: "1MB"}}, {"cache_layers": 4}], ids=lambda given: next(iter(given)))
def test_a_warning_points_to_the_line_that_loads(given: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=next(iter(given))) as caught, pytest.raises(errors.CheckpointNotFoundError):
        AutoModel.from_pretrained("/nothing", device="cpu", **given)
    assert caught[0].filename == __file__


def test_max_seq_len_claims_its_part_of_the_budget(checkpoint: Any, streamed: Any) -> None:
    free = streamed(checkpoint("llama"), max_memory={"cpu": "10MB"}).plan
    asked = streamed(checkpoint("llama"), max_memory={"cpu": "10MB"}, max_seq_len=1000).plan
    per_token = 3 * 2 * 2 * 8 * 4  # layers, key and value, heads, width, float32
    assert free.budget.device_bytes == free.budget.weights_bytes == asked.budget.device_bytes == 10**7
    assert asked.budget.reserved_bytes >= 1000 * per_token
    assert asked.budget.weights_bytes == 10**7 - asked.budget.reserved_bytes
    with pytest.raises(errors.BudgetError, match="for the tokens of max_seq_len") as caught:
        streamed(checkpoint("llama"), max_memory={"cpu": 1}, max_seq_len=1000)
    streamed(checkpoint("llama"), max_memory={"cpu": caught.value.smallest_bytes}, max_seq_len=1000)
    with pytest.raises(errors.BudgetError, match="for the tokens of max_seq_len") as caught:
        AutoModel.from_pretrained(checkpoint("llama"), device="cpu", max_seq_len=10**12)
    assert caught.value.smallest_bytes >= 10**12 * per_token  # giving max_memory would not make them free
    with pytest.raises(errors.ConfigurationError, match="max_seq_len='many' is not a number"):
        streamed(checkpoint("llama"), max_seq_len="many")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("max_memry", "max_memory"),
        ("attn_implementaton", "attn_implementation"),
        ("layer_shards_path", "layer_shards_saving_path"),
    ],
)
def test_unknown_keyword_names_the_nearest(wrong: str, nearest: str, checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(errors.UnknownKeywordError, match=f"no keyword '{wrong}', .*; did you mean '{nearest}'"):
        streamed(checkpoint("llama"), **{wrong: 1})
    with pytest.raises(TypeError):
        streamed(checkpoint("llama"), zzz=1)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        AutoModel.from_pretrained("anything", "cuda:0")  # type: ignore[misc]
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModel()


@pytest.mark.parametrize("config", [{"quant_method": "gptq", "bits": 4}, GPTQConfig(bits=4)])
def test_other_quantisers_are_refused_by_name(config: Any, streamed: Any) -> None:
    with pytest.raises(errors.CompressionUnavailableError, match=r"(?i)gptq.* is not supported: pass a Bits"):
        streamed("anything", quantization_config=config)


@pytest.mark.parametrize(
    "keywords",
    [
        {"compression": "4bit", "load_in_4bit": True},
        {"load_in_8bit": True, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"load_in_8bit": True, "load_in_4bit": True},
        {"quantization_config": {"load_in_4bit": "yes"}},
    ],
)
def test_contradictions_about_compression_are_configuration_errors(keywords: Any, streamed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"leave out|cannot be used"):
        streamed("anything", **keywords)


@pytest.mark.parametrize("cut", [None, "fine", {"least_bytes": 1}])
def test_a_cut_of_another_type_is_refused(cut: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"cut=.* is not a rabbit_engine\.config\.Cut"):
        AutoModel.from_pretrained("any/model", device="cpu", cut=cut)


def test_delete_original_and_max_memory_are_checked(checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="must be True or False"):
        streamed(checkpoint("llama"), delete_original="no")
    with pytest.raises(errors.ConfigurationError, match=r"max_memory\['gpu'\] is not a device"):
        streamed(checkpoint("llama"), max_memory={"gpu": "1MB"})
    with pytest.warns(UserWarning, match="sets no CPU limit"):
        streamed(checkpoint("llama"), max_memory={0: "1MB"})


def test_unknown_compression_is_another_error(streamed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="compression='3bit' is not one of"):
        streamed("anything", compression="3bit")


def test_compression_without_a_split_is_refused(streamed: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="compressed weights are stored in some"):
        streamed("anything", compression="4bit", split="never")


def test_a_missing_device_is_an_error(streamed: Any) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(errors.DeviceUnavailableError, match="is not available"):
        streamed("anything", device=missing)
    with pytest.raises(errors.DeviceUnavailableError, match="'meta' is not supported"):
        parse_device("meta")
    with pytest.raises(errors.DeviceUnavailableError, match="not a device torch knows"):
        parse_device("gpu")


@pytest.mark.skipif(torch.xpu.is_available(), reason="there is one")
def test_a_missing_accelerator_can_be_planned_for() -> None:
    with pytest.raises(errors.DeviceUnavailableError, match="sees 0 XPU devices"):
        parse_device("xpu")
    xpu = parse_planned_device("xpu:1", {"xpu:1": 10})
    assert xpu == torch.device("xpu", 1)
    assert parse_max_memory({"xpu:1": 10, "cpu": 20}, xpu) == (10, 20)
    with pytest.raises(errors.DeviceUnavailableError, match="'meta' is not supported"):
        parse_planned_device("meta", {0: 10})


def test_device_map() -> None:
    assert parse_device(None, "auto") == platform.best_device()
    assert parse_device(None, {"": "cpu"}) == parse_device("cpu", "cpu") == torch.device("cpu")
    with pytest.raises(errors.ConfigurationError, match="names 2 devices"):
        parse_device(None, {"a": "cpu", "b": "cuda:0"})
    with pytest.raises(errors.ConfigurationError, match="disagree"):
        parse_device("cpu", "cuda:0")


def test_max_memory_in_transformers_form() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert parse_max_memory(None, cpu) == (None, None)
    assert parse_max_memory({"cpu": "2GiB"}, cpu) == (2**31, 2**31)
    assert parse_max_memory({1: "8GB", "cpu": 1000}, cuda) == (8 * 10**9, 1000)
    assert parse_max_memory({0: "8GB"}, cuda) == (None, None)
    assert parse_max_memory({"0": "8GB"}, torch.device("cuda", 0)) == parse_max_memory({"cuda:0": "8GB"}, torch.device("cuda", 0))
    assert parse_max_memory({torch.device("cuda", 1): "8GB"}, cuda) == (8 * 10**9, None)
    assert parse_max_memory({"cpu": 1e9, "disk": "100GB"}, cpu) == (10**9, 10**9)
    for wrong in ({"gpu": "8GB"}, {"cpu": None}, {0: True}, {"cpu": -1}):
        with pytest.raises(errors.ConfigurationError, match="max_memory"):
            parse_max_memory(wrong, cpu)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigurationError, match=r"max_memory\['cpu'\]: 'lots' is not a size: write 8GiB"):
        parse_max_memory({"cpu": "lots"}, cpu)
    with pytest.raises(errors.ConfigurationError, match="is not a mapping"):
        parse_max_memory("8GiB", cpu)  # type: ignore[arg-type]


def test_dtype() -> None:
    assert parse_dtype("bfloat16") == parse_dtype("torch.bfloat16") == parse_dtype(torch.bfloat16) == torch.bfloat16
    assert parse_dtype("auto") is None
    for spelling, dtype in {"bf16": torch.bfloat16, "FP16": torch.float16, "half": torch.float16, "fp32": torch.float32}.items():
        assert parse_dtype(spelling) == dtype
    for wrong in ("int8", "bf17", "nn"):
        with pytest.raises(errors.ConfigurationError, match="not a floating-point dtype"):
            parse_dtype(wrong)


@pytest.mark.parametrize("value", ["\0", "x" * 5000, "a\ud800b", "a/" + "y" * 300])
@pytest.mark.parametrize(
    "keyword", ["layer_shards_saving_path", "cache_dir", "variant", "subfolder", "revision", "code_revision", "gguf_file"]
)
def test_a_name_that_no_file_can_have_is_refused_by_its_keyword(keyword: str, value: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"^{keyword}=.* cannot be") as caught:
        AutoModel.from_pretrained("any/model", device="cpu", **{keyword: value})
    assert len(str(caught.value)) < 200


def test_a_variant_without_a_name_is_refused() -> None:
    with pytest.raises(errors.ConfigurationError, match="variant=''"):
        AutoModel.from_pretrained("any/model", device="cpu", variant="")


def test_a_config_is_checked_when_made() -> None:
    with pytest.raises(errors.ConfigurationError, match="'flash' is not one of"):
        StreamConfig(device=torch.device("cpu"), attn_implementation="flash")


def test_budget_too_small_says_the_smallest_that_works(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    with pytest.raises(errors.BudgetError, match="give max_memory=") as caught:
        streamed(checkpoint("llama"), max_memory={"cpu": "10kB"})
    smallest = int(str(caught.value).split("max_memory={")[1].split(": ")[1].split("}")[0])
    streamed(checkpoint("llama"), max_memory={"cpu": smallest})(ids)
    with pytest.raises(errors.BudgetError):
        streamed(checkpoint("llama"), max_memory={"cpu": smallest - 1})


def test_progress_and_profile_tell(checkpoint: Any, streamed: Any, ids: torch.Tensor, capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO", logger="rabbit_engine")
    model = streamed(checkpoint("llama"), show_layer_progress=True, profiling_mode=True)
    model(ids)
    assert "layers" in capsys.readouterr().err
    assert "pass 1: " in caplog.text
    assert "attention: sdpa" in caplog.text
    units = dict(model.plan.rows())["streamed"]
    assert units.startswith("4 units, ")
    assert units in caplog.text
    assert (model.profile.passes, model.profile.loads) == (1, 4)

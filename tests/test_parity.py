"""A streamed model gives transformers' own answer: the oracle is the same class, loaded whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from transformers import GenerationMixin, PreTrainedModel

from rabbit_engine.streaming import Placeholder
from rabbit_engine.transformers_bridge.forwards import cache_of

FAMILIES = list(families.FAMILIES)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal(family: str, checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = plain(checkpoint(family))(ids).logits
        assert torch.equal(streamed(checkpoint(family))(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_logits_are_bit_equal_in_bfloat16(family: str, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = families.save(family, tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        model = streamed(folder)
        assert model.dtype == torch.bfloat16
        assert torch.equal(model(ids).logits, plain(folder)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_casts_as_transformers_does(
    dtype: torch.dtype, checkpoint: Any, tmp_path: Path, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = checkpoint("deepseek_v3")  # has a bias that transformers keeps in float32
    model, whole = streamed(folder, dtype=dtype, layer_shards_saving_path=tmp_path), plain(folder, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    kept = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_is_bit_equal(family: str, checkpoint: Any, plain: Any, streamed: Any, padded: Any) -> None:
    with torch.no_grad():
        expected = plain(checkpoint(family))(**padded).logits
        assert torch.equal(streamed(checkpoint(family))(**padded).logits, expected)


def generation_modes(ids: torch.Tensor, padded: Any, assistant: Any) -> dict[str, dict[str, Any]]:
    return {
        "greedy": {"inputs": ids},
        "beam": {"inputs": ids, "num_beams": 3},
        "sampled": {"inputs": ids, "do_sample": True, "top_k": 20},
        "prompt lookup": {"inputs": ids, "prompt_lookup_num_tokens": 3},
        "assisted": {"inputs": ids, "assistant_model": assistant},
        "padded batch": padded,
        "no cache": {"inputs": ids, "use_cache": False},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_equal_in_every_mode(family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any, padded: Any) -> None:
    whole, model = plain(checkpoint(family)), streamed(checkpoint(family))
    for mode, keywords in generation_modes(ids, padded, plain(checkpoint("llama"))).items():
        if family in families.STATEFUL and mode in ("prompt lookup", "assisted"):
            continue
        tokens = []
        for each in (whole, model):
            torch.manual_seed(7)
            tokens.append(each.generate(**{**GREEDY, **keywords}))
        assert torch.equal(*tokens), mode


def test_a_streamed_assistant_with_a_streamed_target(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    target, assistant = streamed(checkpoint("llama")), streamed(checkpoint("llama_tied"))
    expected = plain(checkpoint("llama")).generate(ids, **GREEDY)
    assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), expected)


def test_decoding_is_incremental(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    output = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert lengths == [12] + [1] * 7
    cache = cache_of(output)
    assert cache.get_seq_length() == 12 + 7
    assert cache.layers[2].keys.shape == (1, 2, 19, 8)


def test_dict_in_generate_is_equal(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    keywords = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    expected, got = (load(checkpoint("qwen3")).generate(ids, **keywords) for load in (plain, streamed))
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states[0], expected.hidden_states[0], strict=True))


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_config_requests_come_once(
    what: str, own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama", **{what: True, "attn_implementation": "eager"})
    expected, got = (load(folder, attn_implementation="eager")(ids) for load in (plain, streamed))
    name = what.removeprefix("output_")
    assert len(got[name]) == len(expected[name])
    assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True))


def test_attentions_are_equal_when_eager(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    expected, got = (load(checkpoint("llama"), attn_implementation="eager") for load in (plain, streamed))
    with torch.no_grad():
        pairs = zip(got(ids, output_attentions=True).attentions, expected(ids, output_attentions=True).attentions, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_it_is_the_transformers_class(checkpoint: Any, plain: Any, streamed: Any) -> None:
    whole, model = plain(checkpoint("qwen3_moe")), streamed(checkpoint("qwen3_moe"))
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, GenerationMixin)
    assert isinstance(model, type(whole))
    assert (type(model).__name__, type(model).__module__) == (type(whole).__name__, type(whole).__module__)
    assert not model.is_custom_code()
    assert model.config.to_dict() == whole.config.to_dict() | {"_name_or_path": model.config.to_dict().get("_name_or_path")}
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert model.get_experts_implementation() == whole.get_experts_implementation()
    assert model.num_parameters() == whole.num_parameters()
    assert model.get_memory_footprint() == whole.get_memory_footprint()


def test_generation_config_of_the_checkpoint_counts(own_checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    folder = own_checkpoint("llama")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 0, "eos_token_id": 17}')
    assert torch.equal(streamed(folder).generate(ids), plain(folder).generate(ids))


def test_ties_are_kept(checkpoint: Any, streamed: Any) -> None:
    tied, untied = (streamed(checkpoint(family), max_memory=None) for family in ("llama_tied", "llama"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
def test_whether_the_head_stays_or_is_streamed_changes_nothing(
    family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    whole = plain(checkpoint(family))
    needed = streamed(checkpoint(family)).plan
    assert "lm_head" in needed.streamed
    seen = set()
    for budget in range(needed.budget.device_bytes, needed.budget.device_bytes + needed.weights_bytes, needed.weights_bytes // 6):
        model = streamed(checkpoint(family), max_memory={"cpu": budget})
        seen.add(isinstance(model.lm_head.weight, Placeholder))
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert seen == {True, False}
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


def test_inputs_embeds_and_logits_to_keep(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    whole, model = plain(checkpoint("qwen2")), streamed(checkpoint("qwen2"))
    with torch.no_grad():
        embeds = whole.get_input_embeddings()(ids)
        assert torch.equal(model.get_input_embeddings()(ids), embeds)
        got = model(inputs_embeds=embeds, logits_to_keep=2).logits
        assert torch.equal(got, whole(inputs_embeds=embeds, logits_to_keep=2).logits)
    assert got.shape == (1, 2, 96)


def test_loss_is_equal(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = plain(checkpoint("phi3"))(ids, labels=ids).loss
        assert torch.equal(streamed(checkpoint("phi3"))(ids, labels=ids).loss, expected)


@pytest.mark.parametrize(
    "mode", [{"prefill_chunk_size": 5}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_other_modes(mode: dict[str, Any], checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    expected, got = (load(checkpoint("llama")).generate(ids, **GREEDY, **mode) for load in (plain, streamed))
    assert torch.equal(got, expected)


def test_hooks_see_the_same_as_without_streaming(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "streamed": []}
    for name, load in (("plain", plain), ("streamed", streamed)):
        model = load(checkpoint("llama"))
        for module in (model.model.layers[1], model.model.layers[2].mlp.up_proj, model.lm_head):
            module.register_forward_hook(
                lambda _m, _a, out, name=name: seen[name].append(out if torch.is_tensor(out) else out[0])
            )
        with torch.no_grad():
            model(ids)
    assert len(seen["plain"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["streamed"], strict=True))


def test_a_first_use_shows_no_deprecation_warnings(checkpoint: Any, streamed: Any, ids: torch.Tensor, caplog: Any) -> None:
    """Neither a warning nor a line of transformers' log: both say each thing once a process, so what was said is forgotten."""
    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.set_verbosity_warning()
    root = transformers.utils.logging.get_logger("transformers")
    root.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            streamed(checkpoint("llama")).generate(ids, **GREEDY)
    finally:
        root.removeHandler(caplog.handler)
        transformers.utils.logging.set_verbosity_error()
    assert [str(warning.message) for warning in told if issubclass(warning.category, (FutureWarning, DeprecationWarning))] == []
    assert [line for line in caplog.messages if "deprecated" in line] == []

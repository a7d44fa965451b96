"""What callers do to a model after loading it: ties, sizes, counts and compilers do it no harm, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rabbit_engine import errors
from rabbit_engine.config import DEFAULT_CUT, Cut
from rabbit_engine.streaming import TiedRows

HARMLESS: dict[str, Callable[[Any], Any]] = {
    "tie_weights": lambda model: model.tie_weights(),
    "init_weights": lambda model: model.init_weights(),
    "init_weights of the part without a head": lambda model: model.base_model.init_weights(),
    "initialize_weights": lambda model: model.initialize_weights(),
    "post_init": lambda model: model.post_init(),
    "resize to the same size": lambda model: model.resize_token_embeddings(96),
    "resize to a multiple of the same size": lambda model: model.resize_token_embeddings(90, pad_to_multiple_of=32),
    "resize to nothing": lambda model: model.resize_token_embeddings(),
    "the same input embeddings": lambda model: model.set_input_embeddings(model.get_input_embeddings()),
    "the same output embeddings": lambda model: model.set_output_embeddings(model.get_output_embeddings()),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "train and eval": lambda model: model.train().eval(),
    "gradient_checkpointing_disable": lambda model: model.gradient_checkpointing_disable(),
    "enable_input_require_grads": lambda model: (model.enable_input_require_grads(), model.disable_input_require_grads()),
}


@pytest.fixture(params=["whole head", "head in blocks"])
def tied(request: Any, checkpoint: Any, streamed: Any) -> Any:
    """A streamed model with tied embeddings, whose head moves whole or in blocks of rows."""
    cut = Cut(least_bytes=1024, most_bytes=4096) if request.param == "head in blocks" else DEFAULT_CUT
    model = streamed(checkpoint("llama_tied"), cut=cut)
    assert isinstance(model.lm_head.weight, TiedRows) == (request.param == "head in blocks")
    return model


@torch.no_grad()
def test_preparing_or_initialising_weights_does_not_harm_a_tied_model(
    tied: Any, checkpoint: Any, plain: Any, ids: torch.Tensor
) -> None:
    want = plain(checkpoint("llama_tied"))(ids).logits
    for name, call in HARMLESS.items():
        call(tied)
        assert torch.equal(tied(ids).logits, want), name


def test_counts_are_those_of_the_model_in_memory(tied: Any, checkpoint: Any, plain: Any, ids: torch.Tensor) -> None:
    whole = plain(checkpoint("llama_tied")).requires_grad_(False)  # streamed weights are not trained
    counts: dict[str, Callable[[Any], Any]] = {
        "parameters": lambda model: model.num_parameters(),
        "trainable": lambda model: model.num_parameters(only_trainable=True),
        "without embeddings": lambda model: model.num_parameters(exclude_embeddings=True),
        "footprint": lambda model: model.get_memory_footprint(),
        "footprint of parameters": lambda model: model.get_memory_footprint(return_buffers=False),
        "names": lambda model: [(name, weight.shape) for name, weight in model.named_parameters()],
        "names of the part without a head": lambda model: [name for name, _ in model.model.named_parameters()],
        "keys": lambda model: [(name, weight.shape, weight.dtype) for name, weight in model.state_dict().items()],
        "buffers": lambda model: [name for name, _ in model.named_buffers()],
    }
    for name, count in counts.items():
        assert count(tied) == count(whole), name
    tied.close()
    assert tied.num_parameters() == whole.num_parameters()


@torch.no_grad()
def test_a_module_that_contains_the_model_moves_where_the_model_is(tied: Any, ids: torch.Tensor) -> None:
    want = tied(ids).logits
    whole = nn.Sequential(tied, nn.Linear(96, 4).double())
    whole.to("cpu").cpu().float().to(torch.float32)
    assert torch.equal(whole[0](ids).logits, want)
    assert whole[1].weight.dtype == torch.float32
    moves: list[Callable[[Any], Any]] = [
        lambda one: one.to("meta"),
        lambda one: one.half(),
        lambda one: one.double(),
        lambda one: one.to_empty(device="cpu"),
        lambda one: one.share_memory(),
    ]
    for move in moves:
        with pytest.raises(errors.CannotMoveError, match=r"a streamed model stays on cpu in torch\.float32"):
            move(whole)


def test_a_bias_that_two_modules_share_counts_once(tmp_path: Path, ids: torch.Tensor, streamed: Any) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=True)).save_pretrained(tmp_path)
    whole = transformers.BertLMHeadModel.from_pretrained(tmp_path).eval().requires_grad_(False)
    model = streamed(tmp_path)
    assert model.num_parameters() == whole.num_parameters()
    assert model.num_parameters(only_trainable=True) == 0
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_other_embeddings_are_refused_while_weights_are_streamed(tied: Any, ids: torch.Tensor) -> None:
    want = tied(ids).logits
    for size in (90, 97, 128):
        with pytest.raises(errors.CannotResizeError, match=f"from 96 to {size} tokens"):
            tied.resize_token_embeddings(size)
    with pytest.raises(errors.CannotResizeError, match="from 96 to 128 tokens"):
        tied.resize_token_embeddings(96, pad_to_multiple_of=64)
    with pytest.raises(errors.CannotResizeError, match="replace the embeddings"):
        tied.set_input_embeddings(nn.Embedding(96, 32))
    with pytest.raises(errors.CannotResizeError, match="replace the embeddings"):
        tied.set_output_embeddings(nn.Linear(32, 96))
    assert torch.equal(tied(ids).logits, want)


def test_a_model_that_stays_in_memory_is_resized_as_transformers_does(
    checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor
) -> None:
    whole, model = plain(checkpoint("llama_tied")), streamed(checkpoint("llama_tied"), max_memory={"cpu": "10MB"})
    for one in (whole, model):
        torch.manual_seed(0)
        one.resize_token_embeddings(100)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert (model.config.vocab_size, model.num_parameters()) == (100, whole.num_parameters())


def _compiled_layers(model: Any) -> Any:
    model.model.layers[0].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(model.forward, backend="eager"),
        lambda model: torch.compile(lambda ids: model(ids), backend="eager"),
        lambda model: (model.compile(backend="eager"), model)[1],
        _compiled_layers,
    ],
    ids=["model", "forward", "function", "in place", "layer"],
)
@torch.no_grad()
def test_a_compiler_leaves_streamed_parts_as_they_are(compiled: Any, checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama_tied"))
    want = model(ids).logits
    assert torch.equal(compiled(model)(ids).logits, want)
    assert torch.equal(model(ids).logits, want)


def test_generate_with_a_static_cache_and_a_compile_config(tied: Any, ids: torch.Tensor) -> None:
    from transformers import CompileConfig

    settings = {"max_new_tokens": 4, "do_sample": False}
    want = tied.generate(ids, **settings)
    config = CompileConfig(backend="eager")
    assert torch.equal(tied.generate(ids, **settings, cache_implementation="static", compile_config=config), want)


def test_a_trace_is_refused(tied: Any, ids: torch.Tensor) -> None:
    with pytest.raises(errors.CannotExportError, match="would record the current contents of the slots"):
        torch.jit.trace(lambda given: tied(given).logits, (ids,))


@torch.no_grad()
def test_what_lm_evaluation_harness_asks_of_a_model_is_answered_as_in_memory(
    tied: Any, checkpoint: Any, plain: Any, padded: dict[str, torch.Tensor]
) -> None:
    """`HFLM(pretrained=model)`: eval, tie_weights, log-likelihoods of a padded batch, and a continuation.

    scripts/check_clients.py runs the harness itself.
    """
    told = []
    for model in (tied, plain(checkpoint("llama_tied"))):
        model.eval()
        model.tie_weights()
        assert (model.config.model_type, model.device.type) == ("llama", "cpu")
        logits = torch.log_softmax(model(padded["input_ids"]).logits, dim=-1)
        likelihoods = logits[:, :-1].gather(2, padded["input_ids"][:, 1:, None])
        told.append((likelihoods, model.generate(**padded, max_length=14, do_sample=False, use_cache=True, pad_token_id=0)))
    assert all(torch.equal(*pair) for pair in zip(*told, strict=True))

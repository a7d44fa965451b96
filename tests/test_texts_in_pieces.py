"""Texts whose layers are never whole in memory: the answers of transformers, with scores that differ by rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from long_texts import BLOCK, answer, have_all_in_tiers, prompt
from tiny import words

from rabbit_engine import Session
from rabbit_engine.decoding.lookup import Lookup
from rabbit_engine.errors import BudgetError, PromptTooLongError
from rabbit_engine.model import mixin
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning import demand as demands
from rabbit_engine.planning import far_attention, known_probes
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, Ways, best_way, need_bytes
from rabbit_engine.planning.probe import Curve, Probe
from rabbit_engine.streaming.caches.pieces import LayerInPieces, LayerPieces
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

ATTENDING = [
    "llama",
    "gemma2",
    "gemma3",
    "qwen2",
    "qwen3",
    "gpt2",
    "phi3",
    "mixtral",
    "gpt_oss",
    "qwen3_next",
    "jamba",
    "llama4",
]
"""Plain, with windows, softcaps, sinks, learnt positions, experts, recurrent states, attention in chunks."""

OTHERS = ["bloom", "falcon", "mpt", "deepseek_v2", "deepseek_v3"]
"""Compute attention themselves, or expand what their caches hold."""


@pytest.fixture
def pieces(made: list[TieredCache], monkeypatch: pytest.MonkeyPatch) -> list[TieredCache]:
    """Every text of `generate` has all layers that can be so in pieces."""
    have_all_in_tiers(monkeypatch, pieces=True)
    return made


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens attention went through in pieces, each time."""
    counts: list[int] = []
    native = LayerPieces.blocks

    def counted(self: LayerPieces) -> Any:
        counts.append(self.tokens)
        return native(self)

    monkeypatch.setattr(LayerPieces, "blocks", counted)
    return counts


def require_close(found: Any, expected: Any) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=5e-6 * max(1, float(theirs[theirs.isfinite()].abs().max())))


@pytest.mark.parametrize("family", ATTENDING)
def test_answers_are_those_of_a_dynamic_cache(
    checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int], family: str
) -> None:
    folder = checkpoint(family)
    model = streamed(folder)
    require_close(answer(model, prompt()), answer(plain(folder), prompt()))
    (cache,) = pieces
    growing = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    assert all(isinstance(layer.states, LayerInPieces) for layer in growing)
    assert len(growing) == runtime_of(model).partition.probe.growing_layers > 0
    assert len(uses) >= 11 * len(growing)  # the prompt is all near
    assert 41 - 2 * BLOCK < max(uses) < 53


@pytest.mark.parametrize("family", OTHERS)
def test_classes_that_compute_with_keys_themselves_have_whole_layers(
    checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int], family: str
) -> None:
    folder = checkpoint(family)
    model = streamed(folder)
    assert runtime_of(model).partition.probe.far_heads == 0
    require_close(answer(model, prompt()), answer(plain(folder), prompt()))
    assert pieces[0].text.bytes_read > 0
    assert uses == []


def test_a_class_that_fails_without_its_keys_loads_as_before(
    checkpoint: Any, streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise TypeError("of the class's own")

    monkeypatch.setattr(known_probes, "_known", {})
    monkeypatch.setattr(far_attention, "attention_over_blocks", fail)
    probe = runtime_of(streamed(checkpoint("olmo2"))).partition.probe
    assert (probe.failure, probe.growing_layers, probe.far_heads) == ("", 3, 0)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "drawn": {"do_sample": True, "temperature": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "guessed": {"prompt_lookup_num_tokens": 4},
    "in chunks": {"prefill_chunk_size": 8},
    "eager": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_way_of_generating(
    checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int], family: str, way: str
) -> None:
    folder = checkpoint(family)
    kernel = {"attn_implementation": "eager"} if way == "eager" else {}
    found, expected = (answer(load(folder, **kernel), prompt(), **WAYS[way]) for load in (streamed, plain))
    assert torch.equal(found.sequences, expected.sequences)
    assert len(uses) >= 6


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_speculated(checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int], family: str) -> None:
    """More guesses at once than a tail has tokens: what is dropped lies in blocks."""
    folder = checkpoint(family)
    ids = torch.cat([prompt(17), prompt(17), prompt(9)], dim=1)
    found = answer(streamed(folder), ids, speculate=Lookup(nodes=16), max_new_tokens=24)
    assert torch.equal(found.sequences, answer(plain(folder), ids, max_new_tokens=24).sequences)
    assert uses


def test_a_padded_batch(checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int]) -> None:
    folder, ids = checkpoint("llama"), prompt(41, 3)
    mask = torch.ones_like(ids)
    mask[1, :9], mask[2, :30] = 0, 0
    require_close(*(answer(model, ids, attention_mask=mask) for model in (streamed(folder), plain(folder))))
    assert uses


def test_a_returned_cache_goes_on_and_is_copied(
    checkpoint: Any, streamed: Any, plain: Any, pieces: list[TieredCache], uses: list[int]
) -> None:
    folder = checkpoint("llama")
    model, own = streamed(folder), plain(folder)
    first, its = answer(model, prompt()), answer(own, prompt())
    for cache in (first.past_key_values, copy.deepcopy(first.past_key_values)):
        theirs, before = copy.deepcopy(its.past_key_values), len(uses)
        ids = torch.cat([first.sequences, prompt(5)], dim=1)
        require_close(answer(model, ids, past_key_values=cache), answer(own, ids, past_key_values=theirs))
        assert len(uses) > before
    for mine, other in zip(pieces[0].layers, theirs.layers, strict=True):  # whole where it is looked at
        assert mine.keys.shape == other.keys.shape
        assert torch.allclose(mine.keys, other.keys, atol=1e-5)


def test_a_text_is_in_pieces_only_where_whole_layers_do_not_fit(
    tmp_path: Path, streamed: Any, plain: Any, made: list[TieredCache], uses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have 2,000 tokens, and ends before."""
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=6, max_position_embeddings=4096, head_dim=64)
    for name, tokens in (("_TAIL_TOKENS", 3 * BLOCK), ("BLOCK_TOKENS", BLOCK), ("PIECE_TOKENS", 3 * BLOCK)):
        monkeypatch.setattr(demands, name, tokens)
    model, ids = streamed(folder), prompt()
    asked = {"max_new_tokens": 2000, "stopping_criteria": [lambda tokens, _: torch.full(tokens.shape[:1], tokens.shape[1] >= 53)]}
    expected, runtime = answer(plain(folder), ids, **asked), runtime_of(model)
    for found in (Demand(41, 2000, tiered=5), Demand(41, 2000, tiered=4, pieces=True)):
        need = need_bytes(runtime.partition.probe, found) + KEPT_FREE_BYTES
        monkeypatch.setattr(type(runtime.assembly), "free_bytes", lambda _, need=need: need)
        require_close(answer(model, ids, **asked), expected)
        layers = [layer.states for layer in made.pop().layers if isinstance(layer, TieredLayer)]
        assert len(layers) == found.tiered
        assert (len(uses) > 0) == isinstance(layers[0], LayerInPieces) == found.pieces
    with pytest.raises(PromptTooLongError):  # attention over blocks has no weights to show
        answer(model, ids, output_attentions=True, **asked)


def test_a_session_has_texts_in_pieces(
    checkpoint: Any, streamed: Any, plain: Any, made: list[TieredCache], uses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    model, own = streamed(folder), plain(folder)
    monkeypatch.setattr("rabbit_engine.sessions.generation.make_cache", mixin.make_cache)
    ids = [prompt(200)[0].tolist(), prompt(9)[0].tolist()]
    model.tokenizer = words(96)
    with Session(model, max_requests=2) as session:
        layers = session._room.probe.growing_layers
        demand = type(session._room).demand

        def in_pieces(self: Any, prompt: int, answer: int) -> Demand:
            return replace(demand(self, prompt, answer), tiered=layers, pieces=True)

        monkeypatch.setattr(type(session._room), "demand", in_pieces)
        replies = session.generate(ids, max_new_tokens=8)
    answers = [answer(own, torch.tensor([each]), max_new_tokens=8).sequences[0, len(each) :] for each in ids]
    assert [reply.text for reply in replies] == [model.tokenizer.decode(each) for each in answers]
    assert len(made) == 2
    assert max(uses) > 190


PROBE = Probe(
    cache_token_bytes=80_000,
    growing_layers=20,
    growing_token_bytes=4000,
    int8_token_bytes=2000,
    far_heads=4,
    layers=Curve(0, 10_000, 0),
    vocabulary=1,
)


def test_whole_layers_come_first_as_they_keep_the_bits() -> None:
    text, ways = Demand(100_000, 0), Ways(parts=True, disk_bytes=10**12, pieces=True)
    chunk = 256
    whole = need_bytes(PROBE, replace(text, chunk=chunk, tiered=20))
    least = need_bytes(PROBE, replace(text, chunk=chunk, tiered=20, pieces=True))
    assert best_way(PROBE, text, whole, ways) == replace(text, chunk=chunk, tiered=20)
    assert best_way(PROBE, text, whole - 1, ways).pieces
    assert best_way(PROBE, text, least, ways) == replace(text, chunk=chunk, tiered=20, pieces=True)
    assert best_way(PROBE, text, least - 1, ways) == text
    assert best_way(PROBE, text, whole - 1, replace(ways, pieces=False)) == text
    encoded = best_way(PROBE, text, least, replace(ways, encoded=True, holds=True))
    assert encoded == replace(text, chunk=chunk, tiered=20, encoded=True, pieces=True)
    for free in range(least, whole, (whole - least) // 7):
        assert need_bytes(PROBE, best_way(PROBE, text, free, ways)) <= free


def test_max_seq_len_plans_for_pieces_last(
    tmp_path: Path, streamed: Any, made: list[TieredCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demands, "PIECE_TOKENS", 3 * BLOCK)
    folder = families.save("llama", tmp_path / "model", num_hidden_layers=12, max_position_embeddings=40_000, head_dim=128)
    with pytest.raises(BudgetError) as small:
        streamed(folder, max_memory={"cpu": 1})
    least = small.value.smallest_bytes
    notes = []
    kept = streamed(folder, max_memory={"cpu": 10**10}, max_seq_len=40_000).plan.reserved_bytes
    for share in (1.0, 0.5, 0.2):
        model = streamed(folder, max_memory={"cpu": least + int(kept * share)}, max_seq_len=40_000)
        notes.append(next(note for note in model.plan.notes if note.startswith("keys and values")))
    assert [("in memory" in note, "never whole" in note) for note in notes] == [
        (True, False),
        (False, False),
        (True, True),
    ]  # "never whole in memory"

"""On a CUDA device: the answers of transformers there, from every tier; the memory of the plan; no slot reused too early."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import families
import gguf
import matrix
import pytest
import torch
from conftest import smallest
from interrupting import interrupt_at
from peft import PeftModel
from safetensors.torch import load_file
from talking import END, make_tokenizer
from test_encodings import dequantised, random_fp8
from test_gguf_blocks import random_blocks
from test_lossless import compressed, weights
from test_matrix import oracle
from test_parity import generation_modes
from test_quantised import quantised
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.quantization import Fp8Blocks, Mxfp4
from rabbit_engine.quantization.gguf import BLOCKS, GgufBlocks
from rabbit_engine.quantization.lossless import Lossless

pytestmark = pytest.mark.gpu
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "head_dim": 512, "max_position_embeddings": 64}
"""Layers of 190 MB in bfloat16: copies take longer than the kernels that wait for them."""

EXPERTS_BOUND = 1e-4
"""float32: transformers groups the experts of a pass in its own kernels on a GPU; ours run one by one."""


def from_disk(folder: Path, **keywords: Any) -> dict[int | str, int | str]:
    """The smallest `max_memory` that works: nothing stays in host memory either."""
    with pytest.raises(errors.BudgetError) as caught:
        AutoModel.from_pretrained(folder, device="cuda", max_memory={0: 1, "cpu": 1}, **keywords)
    return {**smallest(folder, device="cuda", **keywords), "cpu": caught.value.smallest_bytes}


def on_device(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def logits_are_those_of(whole: Any, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Equal, or where experts are read on demand within rounding."""
    with torch.no_grad():
        got, expected = model(**inputs).logits, whole(**on_device(inputs)).logits
    bound = EXPERTS_BOUND if model.plan.experts.layers else 0
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("row", matrix.NATIVE, ids=lambda row: row.models)
def test_every_family_of_the_table_is_as_in_transformers(
    row: matrix.Row, checkpoint: Any, streamed: Any, ids: Any, padded: Any
) -> None:
    folder = checkpoint(row.family)
    whole = oracle(folder).to("cuda")
    model = streamed(folder, device="cuda", max_memory=from_disk(folder))
    assert model.plan.streamed
    for inputs in ({"input_ids": ids}, padded):
        logits_are_those_of(whole, model, inputs)
    for mode in ({"input_ids": ids}, {"input_ids": ids, "num_beams": 3}, padded):
        moved = {name: given.cuda() if isinstance(given, torch.Tensor) else given for name, given in mode.items()}
        assert torch.equal(model.generate(**mode, **GREEDY), whole.generate(**moved, **GREEDY))


@pytest.mark.parametrize("row", matrix.IMAGE_TEXT, ids=lambda row: row.models)
def test_every_image_text_family_is_as_in_transformers(row: matrix.Row, checkpoint: Any, streamed: Any) -> None:
    whole, model = oracle(checkpoint(row.family), image=True).to("cuda"), streamed(checkpoint(row.family), device="cuda")
    prompt = families.picture(row.family)
    logits_are_those_of(whole, model, prompt)
    assert torch.equal(model.generate(**prompt, **GREEDY), whole.generate(**on_device(prompt), **GREEDY))


@pytest.mark.parametrize("row", matrix.CONVERTED, ids=lambda row: row.models)
def test_converted_families_answer_as_their_authors_code(row: matrix.ConvertedRow, tmp_path: Path, streamed: Any) -> None:
    folder = matrix.ORACLES / row.folders[0]
    expected = load_file(folder / "expected.safetensors")
    model = streamed(folder, device="cuda", dtype="float32", layer_shards_saving_path=tmp_path)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits.cpu()
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-3)
    steps = expected["greedy"].shape[1] - expected["input_ids"].shape[1]
    got = model.generate(expected["input_ids"], max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got.cpu(), expected["greedy"])


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_equal(family: str, dtype: torch.dtype, tmp_path: Path, plain: Any, streamed: Any, ids: Any) -> None:
    folder = families.save(family, tmp_path, dtype=dtype)
    whole, model = plain(folder).to("cuda"), streamed(folder, device="cuda")
    logits_are_those_of(whole, model, {"input_ids": ids})
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("in_host", [0, 200_000, 10**9])
def test_experts_on_demand_are_within_rounding(
    family: str, in_host: int, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    """From none on the device to all of them, and from none in host memory."""
    folder = checkpoint(family)
    whole, least = plain(folder).to("cuda"), from_disk(folder)
    low, high = int(least[0]), streamed(folder, device="cuda").plan.weights_bytes
    for budget in range(low, high, max(1, (high - low) // 4)):
        model = streamed(folder, device="cuda", max_memory={0: budget, "cpu": int(least["cpu"]) + in_host})
        for _ in range(3):
            logits_are_those_of(whole, model, {"input_ids": ids})
        assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_tokens_are_equal_in_every_mode(family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any, padded: Any) -> None:
    whole, model = plain(checkpoint(family)).to("cuda"), streamed(checkpoint(family), device="cuda")
    modes = generation_modes(ids.cuda(), on_device(padded), plain(checkpoint("llama")).to("cuda"))
    for kind in ("static", "offloaded"):
        modes[kind] = {"inputs": ids.cuda(), "cache_implementation": kind, "disable_compile": True}
    for mode, keywords in modes.items():
        tokens = []
        for each in (whole, model):
            torch.manual_seed(7)
            tokens.append(each.generate(**{**GREEDY, **keywords}))
        assert torch.equal(*tokens), mode


class Streamer:
    """Collects the tokens of one text, the prompt's first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_tokens_that_are_returned(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    streamer = Streamer()
    returned = streamed(checkpoint("llama"), device="cuda").generate(ids, streamer=streamer, **GREEDY)
    assert streamer.tokens == returned[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_decodes_to_the_bits_of_the_cpu(scales: torch.dtype, dtype: torch.dtype) -> None:
    """Every code, and every exponent of a scale that a byte can hold."""
    weight = random_fp8(256 * 8, 16)
    exponents = (torch.arange(512).reshape(256, 2) % 255).to(torch.uint8)
    made = exponents.view(scales) if scales.itemsize == 1 else (torch.rand(256, 2) + 1e-4).to(scales)
    expected, out = dequantised(weight, made, dtype), torch.empty(256 * 8, 16, dtype=dtype, device="cuda")
    Fp8Blocks().decode([weight.cuda(), made.cuda()], out)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("most", [200, 254])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_decodes_to_the_bits_of_the_cpu(most: int, dtype: torch.dtype) -> None:
    """Every code with every exponent; above 240 the decoder looks values up."""
    rows = most + 1
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, rows, 1, 1)
    scales = torch.arange(rows, dtype=torch.uint8).view(1, rows, 1).repeat(1, 1, 16)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    out = torch.empty(1, 16 * 32, rows, dtype=dtype, device="cuda")
    Mxfp4().decode([blocks.cuda(), scales.cuda()], out)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gguf_blocks_decode_to_the_bits_of_the_package_gguf(kind: str, dtype: torch.dtype) -> None:
    raw = random_blocks(kind, 24, 512)
    expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])).to(dtype)
    out = torch.empty(24, 512, dtype=dtype, device="cuda")
    GgufBlocks(kind).decode([torch.from_numpy(raw).cuda()], out)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("name", list(weights()))
def test_lossless_weights_come_back(name: str) -> None:
    components = compressed(weights()[name])
    out = torch.empty_like(weights()[name], device="cuda")
    Lossless().decode([component.cuda() for component in components], out)
    assert torch.equal(out.cpu().view(torch.int16), weights()[name].view(torch.int16))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_a_quantised_checkpoint_is_what_transformers_dequantises(family: str, tmp_path: Path, streamed: Any, ids: Any) -> None:
    """Decoded when it is used, and all at load: the same bits, which are transformers' but for the order of experts' sums."""
    folder, whole = quantised(family, tmp_path / "model")
    passing, resident = (
        streamed(folder, device="cuda", max_memory=from_disk(folder)),
        streamed(folder, device="cuda", max_memory=None),
    )
    assert passing.plan.scratch_bytes > 0
    assert not resident.plan.streamed
    with torch.no_grad():
        got, expected = passing(ids).logits, whole.to("cuda")(ids.cuda()).logits
        for _ in range(3):
            assert torch.equal(passing(ids).logits, got)
        torch.testing.assert_close(resident(ids).logits, got, rtol=0, atol=0 if family == "llama" else 0.1)
    if family == "llama":
        assert torch.equal(got, expected)
        assert torch.equal(passing.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))
    else:
        assert torch.nn.functional.cosine_similarity(got.flatten().float(), expected.flatten().float(), dim=0) > 0.9995


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_split_checkpoint_is_equal(family: str, checkpoint: Any, plain: Any, streamed: Any, tmp_path: Path, ids: Any) -> None:
    keywords = {"split": "always", "layer_shards_saving_path": tmp_path, "dtype": "bfloat16"}
    whole, model = (
        plain(checkpoint(family), dtype=torch.bfloat16).to("cuda"),
        streamed(checkpoint(family), device="cuda", **keywords),
    )
    with torch.no_grad():
        got, expected = model(ids).logits, whole(ids.cuda()).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if family == "llama" else 0.1)


@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_lora_is_equal(way: str, adapter: Path, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    answers = []
    for model in (plain(adapter.parent / "llama").to("cuda"), streamed(adapter.parent / "llama", device="cuda")):
        without = model.generate(ids.cuda(), **GREEDY)
        if way == "load_adapter":
            model.load_adapter(str(adapter))
        adapted = model if way == "load_adapter" else PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            answers.append((without, adapted(ids.cuda()).logits, adapted.generate(input_ids=ids.cuda(), **GREEDY)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert not torch.equal(answers[0][0], answers[0][2])


@pytest.mark.parametrize("way", ["default", "another stream", "threads"])
@pytest.mark.parametrize("in_host", [0, 10**9])
def test_many_passes_over_wide_layers_never_see_a_slot_too_early(
    in_host: int, way: str, tmp_path: Path, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16, **WIDE)
    whole, least = plain(folder).to("cuda"), from_disk(folder)
    model = streamed(folder, device="cuda", max_memory={**least, "cpu": int(least["cpu"]) + in_host}, profiling_mode=True)
    assert (model.plan.pass_bytes > 0) == (in_host == 0)
    with torch.no_grad():
        expected, seen = whole(ids.cuda()).logits, []

    def repeat() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()) if way != "default" else torch.cuda.stream(None):
            for _ in range(4):
                seen.append(torch.equal(model(ids).logits, expected))

    if way == "threads":
        for _ in range(3):
            thread = threading.Thread(target=repeat)
            thread.start()
            thread.join()
    else:
        repeat()
    assert seen == [True] * (12 if way == "threads" else 4)
    assert {span.lane.split()[0] for span in runtime_of(model).trace.spans()} >= {"copy", "compute"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_interrupt_anywhere_leaves_the_next_answer_right(
    family: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    folder = checkpoint(family)
    whole, model = plain(folder).to("cuda"), streamed(folder, device="cuda", max_memory=from_disk(folder))
    ended = 0
    with torch.no_grad():
        for line in range(1, 400, 37):
            ended += interrupt_at(line, lambda: model(ids))
            logits_are_those_of(whole, model, {"input_ids": ids})
    assert ended > 5


def test_memory_is_that_of_the_plan_and_close_returns_it(tmp_path: Path, ids: torch.Tensor) -> None:
    """The first round also allocates the workspaces of cuBLAS, which stay with the process; a closed model has its buffers."""
    folder = families.save("llama", tmp_path, dtype=torch.bfloat16, **WIDE)
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = AutoModel.from_pretrained(folder, device="cuda", max_memory=smallest(folder, device="cuda"))
        model.generate(ids, **GREEDY)
        peak, plan = torch.cuda.max_memory_allocated() - before, model.plan
        model.close()
        left = torch.cuda.memory_allocated() - before
        del model
        gc.collect()
        dropped = torch.cuda.memory_allocated() - before
    assert peak < plan.device_bytes + 16 * 2**20
    assert peak < 0.6 * plan.weights_bytes
    assert left < 2**14
    assert dropped == 0


def test_a_budget_that_the_device_does_not_have_is_refused_by_name(checkpoint: Any) -> None:
    with pytest.raises(errors.BudgetError, match=r"cuda:0 needs .* give max_memory=\{0: \d+\} or more"):
        AutoModel.from_pretrained(checkpoint("llama"), device="cuda", max_memory={0: 1})


def test_without_a_device_the_gpu_is_used(checkpoint: Any, plain: Any, ids: torch.Tensor) -> None:
    with AutoModel.from_pretrained(checkpoint("llama")) as model:
        assert model.device == torch.device("cuda", 0)
        assert not model.plan.streamed
        logits_are_those_of(plain(checkpoint("llama")).to("cuda"), model, {"input_ids": ids})


def test_the_doctor_and_the_benchmark_measure_the_gpu(rabbit: Any, checkpoint: Any, tmp_path: Path) -> None:
    done = rabbit("doctor", "--quick", "--folder", tmp_path)
    assert done.code == 0
    assert torch.cuda.get_device_name(0) in done.out
    done = rabbit(
        "bench", checkpoint("llama"), "--rounds", "1", "--max-memory", f"0={smallest(checkpoint('llama'), device='cuda')[0]}"
    )
    assert done.code == 0, done.err
    assert torch.cuda.get_device_name(0) in done.out


@pytest.mark.parametrize("exact", [True, False])
def test_a_session_serves_many_texts_in_one_pass(checkpoint: Any, streamed: Any, exact: bool) -> None:
    """Seeded drawing too: the device's generator travels with its fiber."""
    model = streamed(checkpoint("llama"), device="cuda:0")
    asked = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    options = {**GREEDY, "eos_token_id": END}
    alone = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]
    torch.manual_seed(3)
    drawn = model.generate(torch.tensor([asked[0]]), **{**options, "do_sample": True})[0, 4:].tolist()
    model.tokenizer = make_tokenizer()
    with Session(model, exact=exact) as session:
        before = model.profile.passes
        found = [list(reply.tokens) for reply in session.generate(asked, max_new_tokens=8, temperature=0)]
        assert model.profile.passes - before < 2 * 8
        seeded = list(session.generate([asked[0]], max_new_tokens=8, seed=3)[0].tokens)
    if exact:
        assert found == alone
        assert seeded == drawn
    else:
        assert [len(tokens) for tokens in found] == [len(tokens) for tokens in alone]

"""SmolLM2 compared with transformers' own load of it. In one file, so that only one worker loads it, which takes 13 s of CPU."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from smol import user
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

from rabbit_engine import AutoModel, Lookup, Session


@pytest.fixture(scope="module")
def whole(smollm: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm.parent, gguf_file=smollm.name).eval()


@pytest.fixture(scope="module")
def model(smollm: Path, smollm_shards: Path) -> Iterator[Any]:
    with AutoModel.from_pretrained(
        smollm, device="cpu", max_memory={"cpu": "150MB"}, layer_shards_saving_path=smollm_shards
    ) as model:
        assert model.plan.device_bytes < 0.3 * model.plan.weights_bytes
        yield model


def test_real_model_answers_as_transformers_does(whole: Any, model: Any) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected, got = (each.generate(**inputs, max_new_tokens=16, do_sample=False) for each in (whole, model))
    assert torch.equal(got, expected)
    assert "Paris" in model.tokenizer.decode(got[0, inputs["input_ids"].shape[1] :])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)


ORDER = (
    "Copy this order exactly, line by line: 40 boxes of A4 paper, item PW-1120, 18.50 EUR each; 6 toner cartridges, item TN-77, "
    "64.00 EUR each; 12 folders, item FD-9, 2.10 EUR each."
)


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "drawn"])
def test_real_text_with_guesses_is_that_of_transformers(drawn: dict[str, Any], whole: Any, model: Any) -> None:
    inputs = model.tokenizer.apply_chat_template(user(ORDER), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    how = {"max_new_tokens": 48, "do_sample": False, **drawn}
    torch.manual_seed(7)
    expected = whole.generate(**inputs, **how)
    before = model.profile
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)
    torch.manual_seed(7)
    found = model.generate(**inputs, **how, streamer=streamer, speculate=Lookup(nodes=16))
    assert torch.equal(found, expected)
    assert "".join(streamer) == model.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :])
    assert model.profile.passes - before.passes < 32
    assert model.profile.speculation.accepted > before.speculation.accepted


def test_its_file_streams_in_place_in_a_third_of_the_bytes_with_the_bits_of_transformers(
    whole: Any, smollm: Path, tmp_path: Path
) -> None:
    path = tmp_path / smollm.name
    path.symlink_to(smollm)
    ids = torch.randint(0, 49000, (1, 16), generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(whole)
    for weight in reference.parameters():
        weight.data = weight.data.bfloat16()
    with (
        torch.no_grad(),
        AutoModel.from_pretrained(path, device="cpu", dtype=torch.bfloat16, max_memory={"cpu": "64MB"}) as model,
    ):
        assert torch.equal(model(ids).logits, reference(ids).logits)
        assert 0 < model.plan.pass_bytes < sum(weight.nbytes for weight in reference.parameters()) / 3
        kept = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(kept, reference.generate(ids, max_new_tokens=4, do_sample=False))
    assert [path.name for path in tmp_path.iterdir()] == [smollm.name]


def test_text_iterator_streamer_in_a_thread(whole: Any, model: Any) -> None:
    inputs = model.tokenizer("The capital of France is", return_tensors="pt")
    texts = []
    for each in (whole, model):
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, timeout=300)
        thread = threading.Thread(
            target=each.generate, kwargs={**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        )
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert "Paris" in texts[1]


def test_pipeline_gives_the_same_text(whole: Any, model: Any) -> None:
    texts = [
        pipeline("text-generation", model=each, tokenizer=model.tokenizer)("Water boils at", max_new_tokens=8, do_sample=False)
        for each in (whole, model)
    ]
    assert texts[0] == texts[1]


def test_airllms_readme_example_runs(whole: Any, model: Any) -> None:
    input_text = ["What is the capital of United States?"]
    input_tokens = model.tokenizer(
        input_text, return_tensors="pt", return_attention_mask=False, truncation=True, max_length=128, padding=False
    )
    generation_output = model.generate(input_tokens["input_ids"], max_new_tokens=20, use_cache=True, return_dict_in_generate=True)
    expected = whole.generate(input_tokens["input_ids"], max_new_tokens=20)
    assert model.tokenizer.decode(generation_output.sequences[0]) == model.tokenizer.decode(expected[0])


def test_chat_answers_as_transformers_does(whole: Any, model: Any) -> None:
    question = "What is the capital of France?"
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    expected = whole.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    with Session(model, max_new_tokens=8) as session:
        reply = session.chat(question)
    assert str(reply) == model.tokenizer.decode(expected, skip_special_tokens=True) == "The capital of France is Paris."
    assert reply.finish_reason == "stop"
    assert reply.prompt_tokens == prompt.shape[1]
    assert 0 <= reply.queued_s <= reply.first_token_s <= reply.seconds

"""transformers' pipelines over streamed models, in the smallest budget: the results of transformers' own model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import aligned
from PIL import Image
from test_tasks import HEADS, PIXELS, SIZES, own, save
from tiny import pieces_of_words
from torch.utils.data import Dataset
from transformers import pipeline

from rabbit_engine import AutoModel, errors

TEXTS = ["w7 w8 w9 w10", "w30 w31", "w50 w7 w12 w13 w14 w15"]
CANDIDATES = ["w20", "w21 w22"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
NLI = {**SIZES, "id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
NAMES = {**SIZES, "id2label": {0: "O", 1: "B-PER", 2: "I-PER"}}

PIPELINES: list[tuple[str, str, dict[str, Any]]] = [
    ("text-classification", "BertForSequenceClassification", NLI),
    ("text-classification", "LlamaForSequenceClassification", SIZES),
    ("token-classification", "RobertaForTokenClassification", NAMES),
    ("feature-extraction", "BertModel", SIZES),
    ("feature-extraction", "Gemma3TextModel", {**SIZES, **HEADS}),
    ("text-generation", "LlamaForCausalLM", SIZES),
    ("zero-shot-classification", "BertForSequenceClassification", NLI),
    ("fill-mask", "BertForMaskedLM", SIZES),
]
CALLS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{}, {"top_k": None}, {"function_to_apply": "none"}],
    "token-classification": [{}, {"aggregation_strategy": "simple"}, {"aggregation_strategy": "max"}],
    "feature-extraction": [{}],
    "fill-mask": [{"top_k": 3}, {"targets": ["w8", "w9"]}],
    "text-generation": [GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "return_full_text": False}],
    "zero-shot-classification": [{"candidate_labels": CANDIDATES}, {"candidate_labels": CANDIDATES, "multi_label": True}],
}


class Texts(Dataset[str]):
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> str:
        return TEXTS[index]


def sentences() -> Any:
    """A tokenizer of texts up to 40 tokens."""
    return pieces_of_words(96, model_max_length=40)


def texts_for(task: str) -> list[str]:
    return [f"{text} [MASK]" for text in TEXTS] if task == "fill-mask" else TEXTS


def stream(texts: list[str]) -> Iterator[str]:
    yield from texts


def plain_values(result: Any) -> Any:
    """Tensors as lists, so that results compare."""
    if isinstance(result, torch.Tensor):
        return result.tolist()
    if isinstance(result, dict):
        return {name: plain_values(value) for name, value in result.items()}
    return [plain_values(item) for item in result] if isinstance(result, list | tuple) else result


@pytest.mark.parametrize(("task", "cls", "sizes"), PIPELINES, ids=[f"{row[0]} {row[1]}" for row in PIPELINES])
def test_a_pipeline_gives_the_results_of_transformers_own_model(
    task: str, cls: str, sizes: dict[str, Any], tmp_path: Path, streamed: Any
) -> None:
    folder = save(cls, getattr(transformers, cls).config_class.__name__, sizes, tmp_path)
    ours = pipeline(task, model=streamed(folder), tokenizer=sentences())
    theirs = pipeline(task, model=own(folder, cls), tokenizer=sentences(), device="cpu")
    texts = texts_for(task)
    for options in CALLS[task]:
        ways: list[Callable[[Any], Any]] = [
            lambda pipe, options=options: pipe(texts[0], **options),
            lambda pipe, options=options: pipe(texts, **options),
            lambda pipe, options=options: pipe(texts, batch_size=2, **options),
            lambda pipe, options=options: list(pipe(stream(texts), batch_size=2, **options)),
        ]
        for way in ways:
            found, expected = plain_values(way(ours)), plain_values(way(theirs))
            assert found
            assert found == expected, options


def test_pairs_long_texts_and_datasets(tmp_path: Path, streamed: Any) -> None:
    folder = save("RobertaForTokenClassification", "RobertaConfig", NAMES, tmp_path)
    pipes = [
        pipeline("token-classification", model=model, tokenizer=sentences(), stride=4, aggregation_strategy="first", device="cpu")
        for model in (streamed(folder), own(folder, "RobertaForTokenClassification"))
    ]
    long = " ".join(TEXTS * 8)
    found, expected = (pipe(long) for pipe in pipes)
    assert found == expected
    assert max(entity["end"] for entity in found) > len(long) * 0.8
    for workers in (0, 1):
        found, expected = (list(pipe(Texts(), batch_size=3, num_workers=workers)) for pipe in pipes)
        assert found == expected


def test_pairs_of_texts(tmp_path: Path, streamed: Any) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", NLI, tmp_path)
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    found, expected = (
        pipeline("text-classification", model=model, tokenizer=sentences(), device="cpu")(pair)
        for model in (streamed(folder), own(folder, "BertForSequenceClassification"))
    )
    assert found == expected


def test_chats_and_assistants(tmp_path: Path, streamed: Any) -> None:
    folder = save("LlamaForCausalLM", "LlamaConfig", SIZES, tmp_path / "model")
    small = save("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_hidden_layers": 1}, tmp_path / "small")
    talking = sentences()
    talking.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    talking.save_pretrained(small)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    model, whole = streamed(folder), own(folder, "LlamaForCausalLM")
    for options in ({}, {"assistant_model": str(small)}, {"assistant_model": own(small, "LlamaForCausalLM")}):
        ours, theirs = (pipeline("text-generation", model=each, tokenizer=talking, **options) for each in (model, whole))
        assert ours(chats[0], **GREEDY) == theirs(chats[0], **GREEDY)
        if not options:
            assert ours(chats, batch_size=3, **GREEDY) == theirs(chats, batch_size=3, **GREEDY)


def test_images(tmp_path: Path, streamed: Any) -> None:
    folder = save("ViTForImageClassification", "ViTConfig", PIXELS, tmp_path)
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "navy")]
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    ours, theirs = (
        pipeline("image-classification", model=model, image_processor=processor, device="cpu")
        for model in (streamed(folder), own(folder, "ViTForImageClassification"))
    )
    assert ours(pictures[0]) == theirs(pictures[0])
    assert ours(pictures, batch_size=2) == theirs(pictures, batch_size=2)


def test_text_about_images(tmp_path: Path, streamed: Any) -> None:
    seeing = sentences()
    seeing.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**PIXELS, projection_dim=32),
        text_config=transformers.LlamaConfig(**{**SIZES, "vocab_size": 104}),
        image_token_index=96,
    )
    torch.manual_seed(0)
    made = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    made.save_pretrained(tmp_path)
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=seeing,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    ours, theirs = (
        pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
        for model in (streamed(tmp_path), aligned(made.eval()))
    )
    for colour in ("red", "navy"):
        asked = {"text": "w7 <image> w8 w9", "images": Image.new("RGB", (8, 8), colour), "max_new_tokens": 5}
        found, expected = ours(**asked), theirs(**asked)
        assert found == expected
        assert len(found[0]["generated_text"]) > len(asked["text"])


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu"), None])
def test_the_device_of_a_pipeline_is_that_of_the_model(device: Any, tmp_path: Path, streamed: Any) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", NLI, tmp_path)
    model = streamed(folder)
    if device is None and torch.accelerator.is_available():
        with pytest.raises(errors.CannotMoveError, match=r"device=model\.device"):
            pipeline("text-classification", model=model, tokenizer=sentences())
        device = model.device
    pipe = pipeline("text-classification", model=model, tokenizer=sentences(), device=device, dtype="float32")
    assert (pipe.device, pipe.model) == (model.device, model)
    with pytest.raises(errors.CannotMoveError, match=r"a pipeline over it takes device=model\.device"):
        pipeline("text-classification", model=model, tokenizer=sentences(), device="meta")


def test_a_pipeline_over_a_closed_model_says_so(tmp_path: Path) -> None:
    folder = save("BertForSequenceClassification", "BertConfig", NLI, tmp_path)
    with AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": 1_000_000}) as model:
        pipe = pipeline("text-classification", model=model, tokenizer=sentences(), device="cpu")
        assert pipe("w7")
    with pytest.raises(errors.RabbitError, match="closed"):
        pipe("w7")

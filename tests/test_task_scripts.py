"""Users' scripts for tasks give the same values with the model classes imported from rabbit_engine, and nothing else changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import smallest
from test_tasks import BART, SIZES, save
from tiny import pieces_of_words

MEAN_POOLING = """
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from transformers import AutoModel

def mean_pooling(output, mask):
    mask = mask.unsqueeze(-1).expand(output.last_hidden_state.size()).float()
    return torch.sum(output.last_hidden_state * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModel.from_pretrained(NAME, **OPTIONS)
encoded = tokenizer(SENTENCES, padding=True, truncation=True, max_length=16, return_tensors="pt")
with torch.no_grad():
    output = model(**encoded)
result = F.normalize(mean_pooling(output, encoded["attention_mask"]), p=2, dim=1)
"""

CONFIG_FIRST = """
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers import AutoModelForSequenceClassification

config = AutoConfig.from_pretrained(NAME)
assert config.num_labels == 3 and config.architectures[0].endswith("ForSequenceClassification")
config.problem_type = "multi_label_classification"
length = min(config.max_position_embeddings, AutoTokenizer.from_pretrained(NAME).model_max_length)
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME, config=config, **OPTIONS)
model.eval()
encoded = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(model.device)
with torch.inference_mode():
    scores = model(**encoded).logits.sigmoid()
result = [{model.config.id2label[i]: float(v) for i, v in enumerate(row)} for row in scores]
"""

CROSS_ENCODER = """
import torch
from transformers import AutoTokenizer
from transformers import AutoModelForSequenceClassification

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSequenceClassification.from_pretrained(NAME, **OPTIONS).eval()
pairs = [[SENTENCES[0], document] for document in SENTENCES]
with torch.no_grad():
    inputs = tokenizer(pairs, padding=True, truncation=True, return_tensors="pt", max_length=32)
    scores = model(**inputs, return_dict=True).logits.view(-1).float()
result = sorted(zip(scores.tolist(), range(len(pairs))), reverse=True)
"""

ENTITIES_IN_WINDOWS = """
import torch
from transformers import AutoTokenizer
from transformers import AutoModelForTokenClassification

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForTokenClassification.from_pretrained(NAME, **OPTIONS)
text = " ".join(SENTENCES * 4)
windows = tokenizer(text, truncation=True, max_length=12, stride=4, padding=True, return_overflowing_tokens=True,
                    return_offsets_mapping=True, return_tensors="pt")
offsets = windows.pop("offset_mapping")
windows.pop("overflow_to_sample_mapping")
with torch.no_grad():
    labels = model(**windows).logits.argmax(-1)
result = sorted({(text[a:b], int(a), model.config.id2label[int(label)])
                 for row, spans in zip(labels, offsets) for label, (a, b) in zip(row, spans) if a < b})
"""

ANSWERS = """
import torch
from transformers import AutoTokenizer
from transformers import AutoModelForQuestionAnswering

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForQuestionAnswering.from_pretrained(NAME, **OPTIONS)
inputs = tokenizer(SENTENCES[0], SENTENCES[1], return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
start = int(outputs.start_logits.argmax())
end = start + int(outputs.end_logits[0, start:].argmax())
result = tokenizer.decode(inputs.input_ids[0, start : end + 1])
"""

SUMMARIES = """
from transformers import AutoTokenizer
from transformers import AutoModelForSeq2SeqLM

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSeq2SeqLM.from_pretrained(NAME, **OPTIONS)
inputs = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
ids = model.generate(**inputs, num_beams=2, max_new_tokens=8, no_repeat_ngram_size=2, length_penalty=2.0)
result = tokenizer.batch_decode(ids, skip_special_tokens=True)
"""

SENTENCES = ["w7 w8 w9 w10 w11", "w30 w31", "w50 w7 w12 w13 w14 w15 w9"]
RANKING, NAMES = {**SIZES, "num_labels": 1}, {**SIZES, "id2label": {0: "O", 1: "B-PER", 2: "I-PER"}}
SMALL = {"vocab_size": 96, "dim": 32, "n_heads": 4, "hidden_dim": 48, "n_layers": 3}
SCRIPTS = {
    "mean pooling": (MEAN_POOLING, "BertModel", "BertConfig", SIZES),
    "config first": (CONFIG_FIRST, "BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 3}),
    "cross encoder": (CROSS_ENCODER, "RobertaForSequenceClassification", "RobertaConfig", RANKING),
    "entities in windows": (ENTITIES_IN_WINDOWS, "BertForTokenClassification", "BertConfig", NAMES),
    "answers": (
        ANSWERS,
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        {**SIZES, "dim": 32, "n_heads": 4, "hidden_dim": 48},
    ),
    "summaries": (SUMMARIES, "BartForConditionalGeneration", "BartConfig", BART),
}


def run(script: str, folder: Path, options: dict[str, Any]) -> Any:
    values: dict[str, Any] = {"NAME": str(folder), "SENTENCES": SENTENCES, "OPTIONS": options}
    exec(compile(script, "script.py", "exec"), values)
    if hasattr(values["model"], "close"):
        values["model"].close()
    return values["result"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_gives_the_same_values(name: str, tmp_path: Path) -> None:
    script, cls, config, sizes = SCRIPTS[name]
    folder = save(cls, config, sizes, tmp_path)
    pieces_of_words(96, model_max_length=40).save_pretrained(folder)
    changed = re.sub(r"from transformers import (AutoModel\w*)", r"from rabbit_engine import \1", script)
    assert changed != script
    found = run(changed, folder, {"device": "cpu", "max_memory": smallest(folder)})
    expected = run(script, folder, {})
    if isinstance(expected, torch.Tensor):
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)
        assert torch.allclose(found.norm(dim=1), torch.ones(len(SENTENCES)))
    elif isinstance(expected[0], dict):
        assert [row.keys() for row in found] == [row.keys() for row in expected]
        assert [list(row.values()) for row in found] == [pytest.approx(list(row.values()), abs=1e-6) for row in expected]
    elif name == "cross encoder":
        assert [index for _, index in found] == [index for _, index in expected]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-5)
    else:
        assert found == expected
    assert len(found)

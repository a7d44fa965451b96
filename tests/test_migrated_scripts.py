"""Scripts written for AirLLM, RabbitLLM and transformers with bitsandbytes run with only their import changed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_compression import WIDE, with_decoded_weights
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

IMPORTS = {
    "from airllm import AutoModel": "from rabbit_engine import AutoModel",
    "from rabbitllm import AutoModel": "from rabbit_engine import AutoModel",
    "from transformers import AutoModelForCausalLM,": (
        "from rabbit_engine import AutoModel as AutoModelForCausalLM\nfrom transformers import"
    ),
}

AIRLLM = """
from airllm import AutoModel

MAX_LENGTH = 128
model = AutoModel.from_pretrained("garage-bAInd/Platypus2-70B-instruct", compression='{compression}'{more})

input_tokens = model.tokenizer(
    ['What is the capital of United States?'],
    return_tensors="pt",
    return_attention_mask=False,
    truncation=True,
    max_length=MAX_LENGTH,
    padding=False,
)
generation_output = model.generate(
    input_tokens['input_ids'].cuda(),
    max_new_tokens=20,
    use_cache=True,
    return_dict_in_generate=True,
)
output = model.tokenizer.decode(generation_output.sequences[0])
print(output)
"""

RABBITLLM = """
import torch
from rabbitllm import AutoModel

device = "cuda:0" if torch.cuda.is_available() else "cpu"
model = AutoModel.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", device=device, compression="{compression}"{more})
messages = [
    {{"role": "system", "content": "You are a helpful assistant."}},
    {{"role": "user", "content": "What is the capital of France?"}},
]
text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
tokens = model.tokenizer([text], return_tensors="pt", truncation=True, max_length=512)
input_ids = tokens["input_ids"].to(device)
attention_mask = tokens.get("attention_mask")
attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
torch.manual_seed(7)
generation_output = model.generate(
    input_ids,
    attention_mask=attention_mask,
    max_new_tokens=20,
    use_cache=True,
    do_sample=True,
    temperature=0.6,
    top_p=0.95,
    return_dict_in_generate=True,
)
start = tokens["input_ids"].shape[1]
print(model.tokenizer.decode(generation_output.sequences[0][start:], skip_special_tokens=True))
"""

BITSANDBYTES = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

model_id = "mistralai/Mistral-7B-Instruct-v0.1"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, {keywords})
inputs = tokenizer("What is the capital of France?", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

NF4 = (
    'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)"
)
OF_AIRLLM = (
    "",
    ", profiling_mode=True, hf_token='hf_x', prefetching=True",
    ", layer_shards_saving_path='shards'",
    ", delete_original=True",
)
OF_RABBITLLM = (
    "",
    ", attn_implementation='auto', max_seq_len=64, prefetching=True, prefetch_pin_memory=True, use_gds=True, kv_cache_dir=None,"
    " token='hf_x', layer_shards_saving_path='shards', profiling_mode=False, delete_original=False",
)


def save(folder: Path, family: str, dtype: torch.dtype, **sizes: Any) -> Path:
    """A tiny checkpoint with a tokenizer of whole words, where a script finds it by the name of its repository."""
    families.save(family, folder, dtype, **sizes)
    words = re.findall(r"\w+|[^\w\s]", "What is the capital of United States France? You are a helpful assistant. user system:")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), 96)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script in `tmp_path` with its imports changed, and return its names. Without a GPU, `cuda()` returns the tensor."""
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)

    def execute(script: str, changes: Mapping[str, str] = IMPORTS) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        for before, after in changes.items():
            script = script.replace(before, after)
        exec(compile(script, "script", "exec"), names)
        return names

    return execute


@pytest.mark.parametrize("more", OF_AIRLLM)
@pytest.mark.parametrize("compression", ["4bit", "8bit"])
def test_airllms_example_with_compression_runs_unchanged(
    compression: str, more: str, tmp_path: Path, run: Any, plain: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "garage-bAInd" / "Platypus2-70B-instruct", "llama", torch.float32, **WIDE)
    whole = plain(folder)
    found = run(AIRLLM.format(compression=compression, more=more))
    with found["model"] as model:
        prompt = found["input_tokens"]["input_ids"]
        expected = with_decoded_weights(model, whole).generate(prompt, max_new_tokens=20)[0]
        assert found["generation_output"].sequences[0].tolist() == expected.tolist()
        assert capsys.readouterr().out.strip() == model.tokenizer.decode(expected)
    assert bool(list(folder.glob("*.safetensors"))) == ("delete_original" not in more)
    (place,) = tmp_path.rglob(f"float32-{compression}")
    assert place.is_relative_to(tmp_path / "shards") == ("saving_path" in more)


@pytest.mark.parametrize("more", OF_RABBITLLM)
@pytest.mark.parametrize("compression", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore:.*no effect here")
def test_rabbitllms_example_with_compression_runs_unchanged(
    compression: str, more: str, tmp_path: Path, run: Any, streamed: Any
) -> None:
    folder = save(tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct", "qwen2", torch.float32, **WIDE)
    found = run(RABBITLLM.format(compression=compression, more=more))
    with found["model"]:
        torch.manual_seed(7)
        steps = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
        inputs = {"attention_mask": found["attention_mask"].cpu()}
        # decoded weights may sample another token: products of four bits round their states
        expected = streamed(folder, compression=compression).generate(found["input_ids"].cpu(), **inputs, **steps)
        assert found["generation_output"].sequences.tolist() == expected.tolist()


SHORT_AND_LONG = {
    f'quantization_config={NF4}, device_map="auto"': "",
    'quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="auto", torch_dtype="auto"': "",
    'quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, device_map="auto"': "",
    'load_in_4bit=True, device_map="auto", low_cpu_mem_usage=True': "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "load_in_8bit=True, torch_dtype=torch.bfloat16": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
}
"""Keywords of scripts; and what transformers 5 takes in their place, where it does not take them."""


@pytest.mark.parametrize("keywords", SHORT_AND_LONG)
def test_scripts_with_bitsandbytes_give_the_text_of_transformers(keywords: str, tmp_path: Path, run: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    save(tmp_path / "mistralai" / "Mistral-7B-Instruct-v0.1", "mistral", torch.bfloat16, **sizes)
    names = run(BITSANDBYTES.format(keywords=SHORT_AND_LONG[keywords] or keywords), changes={})
    found = run(BITSANDBYTES.format(keywords=keywords))
    with found["model"] as model:
        assert found["output"].tolist() == names["output"].tolist()
        assert model.config.quantization_config.to_dict() == names["model"].config.quantization_config.to_dict()
    assert len(list(tmp_path.rglob("bfloat16-bnb-*"))) == 1

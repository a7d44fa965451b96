"""A tiny model that has words: Llama with 96 tokens, one for every character of ASCII and three special ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};[a]{% endif %}"
)
PAD, BOS, END = 0, 1, 95
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": END,
}


def make_tokenizer(template: str | None = TEMPLATE, added: tuple[str, ...] = ()) -> Any:
    """Every character is a token: chr(33 + i) has the id 2 + i; others, such as a space, are <pad>."""
    letters = {chr(33 + index): 2 + index for index in range(93)}
    backend = Tokenizer(models.BPE({"<pad>": PAD, "<s>": BOS, **letters, "</s>": END}, [], unk_token="<pad>"))
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def save(folder: Path, template: str | None = TEMPLATE, added: tuple[str, ...] = (), **config: Any) -> Path:
    """The checkpoint in `folder`: weights as large as they make an answer of many different characters."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 128, **config}))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer(template, added).save_pretrained(folder)
    return folder

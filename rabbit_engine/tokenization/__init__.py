"""Tokenizers that `AutoTokenizer` does not load from a folder: of families that it has no class for, and of GGUF files.

`build_tokenizer` builds those of converted families from their original files without running their code. ChatGLM2 and 3,
InternLM, InternLM2 and Baichuan use a sentencepiece model, GLM-4 and QWen a tiktoken file.
"""

from rabbit_engine.tokenization.build import build_tokenizer
from rabbit_engine.tokenization.gguf import load_gguf_tokenizer

__all__ = ["build_tokenizer", "load_gguf_tokenizer"]

"""Tokenizers of families that transformers has no class for, built from their original files without running their code.

`build_tokenizer` is the only public function. ChatGLM2 and 3, InternLM, InternLM2 and Baichuan use a sentencepiece model,
GLM-4 and QWen a tiktoken file.
"""

from rabbit_engine.tokenization.build import build_tokenizer

__all__ = ["build_tokenizer"]

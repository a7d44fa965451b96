"""Converted families: the config, weights and tokenizer of each become those of a class in transformers."""

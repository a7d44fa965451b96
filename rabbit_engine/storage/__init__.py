"""Bytes on disk: direct reads, safetensors headers and tensors, and checked JSON."""

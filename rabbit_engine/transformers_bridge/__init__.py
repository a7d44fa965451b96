"""Everything private or unstable of transformers that is used here, one small module an interface.

The rest of the package imports only what transformers documents; `tests/test_bridge.py` says what each module relies on.
"""

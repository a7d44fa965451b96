"""All uses of private or unstable parts of transformers, one small module per interface.

The rest of the package imports only what transformers documents; `tests/test_bridge.py` tests what each module relies on.
"""

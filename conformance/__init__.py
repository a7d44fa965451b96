"""transformers' own model tests over streamed models: run by `make conformance`, never by a plain `pytest`."""

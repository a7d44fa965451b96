"""transformers' own model tests on streamed models: run by `make conformance`, never by a plain `pytest`."""

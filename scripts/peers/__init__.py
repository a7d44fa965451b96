"""One runner per peer, each run by that peer's own Python from the parent folder: `python -m peers.airllm_4 MODEL --tokens 3`.

A runner loads the model, decodes greedily after a prompt and prints one JSON line. It imports only its peer, that peer's
dependencies and the standard library.
"""

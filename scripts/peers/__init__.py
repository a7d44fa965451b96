"""One runner a peer, each run by that peer's own Python from the folder above: `python -m peers.airllm_4 MODEL --tokens 3`.

A runner loads the model, decodes greedily behind a prompt and prints one JSON line. Beside its peer it imports only the standard
library and what that peer brings.
"""

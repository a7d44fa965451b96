"""Uses of a model other than generating text: embeddings."""

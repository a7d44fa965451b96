"""What a head's output means: embeddings."""

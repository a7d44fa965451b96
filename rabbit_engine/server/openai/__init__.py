"""OpenAI's API: chat, completions and embeddings."""

"""An OpenAI-compatible service over a session. Needs the extra `serve`."""

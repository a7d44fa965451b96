"""Labels, ranks and scores in the forms of vLLM's, Jina's and Cohere's servers."""

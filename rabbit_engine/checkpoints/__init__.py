"""From a model's name to its files: the Hub, file formats, shards, the splitter, and streaming in place."""

"""A collection of embeddings: make it, search it, show it."""

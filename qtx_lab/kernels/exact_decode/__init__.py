"""Exact attention of few queries: all keys and values of a cache are read once."""

"""Sampled attention of many queries, with gradients, drawn page by page."""

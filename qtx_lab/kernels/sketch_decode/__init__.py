"""Decoding by draws from a sketch of the keys."""

"""Decoding by systematic draws from exact logits."""

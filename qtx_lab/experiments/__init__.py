"""Runs keep what was done; sweeps, listings, figures and reports are made of them."""

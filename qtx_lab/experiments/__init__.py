"""Runs, which record what was done, and the sweeps, listings, figures and reports that are made of them."""

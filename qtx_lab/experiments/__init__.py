"""Runs, which record what was done, and the sweeps, listings, figures and reports that are made of them."""

from ..errors import naming_the_extra

with naming_the_extra("qtx_lab.experiments"):  # whatever part of it is used first
    import duckdb  # noqa: F401

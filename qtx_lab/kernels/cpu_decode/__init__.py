"""Decoding from a cache on the CPU in one compiled pass, beside plain torch.

`reference` is the plain torch, `rows` the pass that numba compiles, `launch` calls it from torch and
`threads` spreads it over torch's threads. Only `reference` can be imported without numba.
"""

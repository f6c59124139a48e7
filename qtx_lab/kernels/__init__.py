"""Kernels for sampled attention, each beside its plain-torch reference; triton is loaded when a kernel runs.

They take and give tensors; `qtx_lab.attention` and `qtx_lab.cache` make estimates of the results. There is a
folder for each operation:

- `decode`: few queries, drawn along whole rows by their exact logits.
- `prefill`: many queries, drawn page by page, with gradients.
- `sketch_decode`: few queries, drawn by a sketch of the keys.
- `exact_decode`: the newest tokens of a cache, exactly, its keys and values read once; caches in blocks, too.
- `cpu_decode`: a cache's queries on the CPU, compiled by numba.

The random number of a draw is made in `blocks.comb_offset`, for a page in `prefill.triton.page_offsets`, and
for the rounding of masses in `blocks.store_masses`, all by `philox.words`. In each, `launch` is the way in.
The Triton kernels are in `triton`, the same draws in plain torch in `reference`, and the method in a few
lines in `oracle`. The key at a point of a row is found in `mean_kernel` of `decode` and `draw_kernel` of
`sketch_decode`; `draw_page` of `prefill` counts the draws of every key of a page.
"""

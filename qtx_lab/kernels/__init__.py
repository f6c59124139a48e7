"""Kernels for sampled attention, each beside its plain-torch reference; triton is loaded when a kernel runs.

They take and give tensors; `qtx_lab.attention` and `qtx_lab.cache` make estimates of the results. There is a
folder for each operation:

- `decode`: few queries, drawn along whole rows by their exact logits.
- `prefill`: many queries, drawn page by page, with gradients.
- `sketch_decode`: few queries, drawn by a sketch of the keys.
- `exact_decode`: the newest tokens of a cache, exactly, its keys and values read once.
- `cpu_decode`: a cache's queries on the CPU, compiled by numba.

The random number of a draw is made in `blocks.comb_offset`, for a page in `prefill.triton.page_offsets`, and
for the rounding of masses in `blocks.store_masses`, all by `philox.words`. In each, `launch` is the way in.
The Triton kernels are in `triton` (those of `sketch_decode` in `triton_scan`, `triton_plan` and
`triton_weigh`), the same draws in plain torch in `reference`, and the method in a few lines in `oracle`. The
key at a point of a row is found in `mean_kernel` of `decode` and `locate_sketch_kernel` of `sketch_decode`;
`draw_page` of `prefill` counts the draws of every key of a page.

`decode`, `sketch_decode` and `exact_decode` take softcaps, windows, sequences of different lengths, sinks,
caches in blocks of which a table says where they are (`block_tables`), and caches of 8 bits with a scale.
What an operation does not take is refused by name before any work:

- `sketch_decode` takes no mask, whose bytes for each row and key are as many as those of a small sketch.
  Beside an order of the keys it takes no window, and lengths for one query a head only: to look up where each
  key lies would read 8 bytes more a key. `SketchTable.in_order_of_keys` is the sketch without an order. Lines
  of a sketch lie side by side even where keys are in blocks: it is fitted to one sequence, and no other
  shares any of it.
- `exact_decode` takes no mask, and windows to the left alone; all of its queries are causal.
- `prefill` takes masks and causality, and nothing of the above: it reads all keys, which are those of a
  prompt.
"""

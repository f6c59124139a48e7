"""IBM's devices: the engine that posts jobs, and the ledger that never loses one."""

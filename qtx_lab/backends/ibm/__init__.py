"""IBM's devices: what runs circuits there, the jobs, their records on disk, and what asks IBM's client.

`engine` runs circuits, `jobs` follows what was submitted, `ledger` keeps the records on disk, and `remote`
talks to IBM through IBM's client. `client_internals` holds the few uses of that client's private attributes.
"""

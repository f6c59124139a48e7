"""IBM's devices: what runs circuits there, the jobs, their records on disk, and what asks IBM's client.

`engine` runs circuits within what `budget` allows, `jobs` follows what was submitted, and `ledger` keeps the
records on disk. `remote` talks to IBM through IBM's client, for an account that `accounts` has looked at.
`target` plans without an account. `client_internals` holds the few uses of that client's private attributes.
"""

"""`python -m qtx_lab.cli` is `qtx-lab`."""

from . import main

main()

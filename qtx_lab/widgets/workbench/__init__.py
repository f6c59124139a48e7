"""`Workbench`: the whole lab in one notebook cell."""

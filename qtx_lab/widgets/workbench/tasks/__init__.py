"""What the workbench's workers do, a file for each kind of work; `registry` names all of it."""

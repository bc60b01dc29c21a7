"""FLOOR 5: the programs that people start. cli.py is the `mesh` command."""

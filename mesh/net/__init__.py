"""FLOOR 2: bytes and addresses, no protocol. transport.py holds the contracts."""

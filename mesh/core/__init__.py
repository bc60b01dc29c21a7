"""FLOOR 0: the protocol as pure state. Events in, effects out; no input, output, clock or chance.

A reader starts with messages.py (what nodes say), events.py (what happens, what is asked for) and
protocol.py (who handles what).
"""

"""What others do for the same work, in the terms of an operator's contract.

A file for each operator, in which `PEERS` maps a name to a function that takes what the reference
takes, and `serves(name, case)` tells which cases it serves.
"""

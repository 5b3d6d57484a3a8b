"""The training loop, the tasks it runs, and their parts.

Imports `errors`, `io`, `config`, `distributed`, `models` and `data`.
"""

"""Local and remote files, and nothing of what they contain.

Imports `errors` only.
"""

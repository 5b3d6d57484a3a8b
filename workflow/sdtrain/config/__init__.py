"""Typed configuration: schema, loading, fingerprints, command line, documentation.

Imports `errors` and `io`, and no torch: planning stays fast.
"""

"""Everything between a table of URLs and a batch: tables, shards, samples, latents.

Imports `errors`, `io`, `config`, `distributed` and `models`.
"""

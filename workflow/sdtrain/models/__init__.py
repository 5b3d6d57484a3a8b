"""Model components: construction, LoRA, autoencoder, feature networks, download, pipelines.

Imports `errors`, `io`, `config` and `distributed`.
"""

"""The workflow's view: plan, Snakemake invocations, SLURM jobs, status.

Imports `errors`, `io`, `config`, `data.predicates` and `evaluation.registry`, and no torch: planning stays fast.
"""

"""The workflow's view: plan, Snakemake invocations, SLURM jobs, status.

Imports `errors`, `io`, `config` and `data.predicates`, and no torch: planning stays fast.
"""

"""What the workflow asks: plan, invocations, SLURM jobs, status.

Imports `errors`, `io`, `config` and `data.predicates`, and no torch: planning stays fast.
"""

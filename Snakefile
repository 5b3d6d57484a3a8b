# Trains Stable Diffusion, from a table of image URLs to an evaluated model: `snakemake --profile profiles/local`, or
# `snakemake --profile slurm --config run=sd-v2-base`. Experiments are described in configs/, machines in profiles/.
from snakemake.utils import min_version

min_version("9.27")


include: "workflow/rules/common.smk"
include: "workflow/rules/freeze.smk"
include: "workflow/rules/components.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"


localrules:
    all,
    data,
    stages,
    freeze,


# The whole run: data, training, evaluation and report
rule all:
    default_target: True
    input:
        f"results/runs/{RUN}/report.html",


# The shards and latents that the run trains on
rule data:
    input:
        [plan.trained_on(RUN, stage) for stage in plan.load_run(RUN).stages],


# The trained stages, without their evaluation
rule stages:
    input:
        [plan.milestone_result(RUN, stage) for stage in plan.load_run(RUN).stages],


check_rule_names()

# From a table of image URLs to an evaluated Stable Diffusion: `snakemake --profile profiles/local`, or
# `snakemake --profile slurm --config run=sd-v2-base`. What a run is stands in configs/, what a machine is in profiles/.
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


# Everything: the run, trained, measured and reported
rule all:
    default_target: True
    input:
        f"results/runs/{RUN}/report.html",


# The shards that the run trains on
rule data:
    input:
        [plan.trained_on(RUN, stage) for stage in plan.load_run(RUN).stages],


# The trained stages, without their evaluation
rule stages:
    input:
        [plan.milestone_result(RUN, stage) for stage in plan.load_run(RUN).stages],

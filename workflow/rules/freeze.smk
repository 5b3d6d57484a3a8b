# Each step reads a file of what it depends on, written when it was planned: a later edit reaches no waiting job.


rule freeze:
    output:
        "{where}/config/{step}.yaml",
    log:
        "logs/{where}/config/{step}.log",
    conda:
        "../../envs/train.yaml"
    params:
        text=plan.slice_of,
    shell:
        "printf '%s' {params.text:q} > {output}.tmp 2> {log} && mv {output}.tmp {output}"

# Writes the frozen slice of the configuration that each step reads, so that a later edit does not affect a waiting job.


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

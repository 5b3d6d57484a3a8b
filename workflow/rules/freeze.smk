# Each step reads a file of what it depends on, written when it was planned: a later edit reaches no waiting job.


rule freeze:
    output:
        "{where}/config/{step}.yaml",
    log:
        "logs/{where}/config/{step}.log",
    params:
        text=slice_of,
    run:
        settings.write_text(output[0], params.text)

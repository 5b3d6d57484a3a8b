# Parts that runs share: fetched once, or trained here.


rule download_component:
    input:
        plan.folder_files,
        config="resources/components/config/{component}.yaml",
    output:
        "resources/components/{component}.json",
    log:
        "logs/components/{component}.log",
    benchmark:
        "logs/components/{component}.tsv"
    wildcard_constraints:
        component=f"(?!({'|'.join(TRAINED)})$)[^/]+",
    conda:
        "../../envs/train.yaml"
    shell:
        "python workflow/scripts/download_component.py"
        " config={input.config}"
        " name={wildcards.component}"
        " output={output}"
        " 2>&1 | tee {log}"


rule train_autoencoder:
    input:
        config="resources/components/config/{component}.yaml",
        train=lambda w: f"results/data/{plan.load_component(w.component).train.data}/train/shards/manifest.json",
        held_out=lambda w: f"results/data/{plan.load_component(w.component).train.data}/held_out/shards/manifest.json",
    output:
        "resources/components/{component}.json",
    log:
        "logs/components/{component}.log",
    benchmark:
        "logs/components/{component}.tsv"
    wildcard_constraints:
        component="|".join(TRAINED) or "(?!)",  # where none is trained, none matches
    conda:
        "../../envs/train.yaml"
    threads: 2
    shell:
        "python workflow/scripts/train_autoencoder.py"
        " config={input.config}"
        " train={input.train}"
        " held_out={input.held_out}"
        " output={output}"
        " 2>&1 | tee {log}"

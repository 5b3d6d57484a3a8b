# Parts that runs share: fetched once, or trained here.


def folder_files(wildcards):
    """The files of a component that is a local folder: an edit of one copies it again."""
    entry = load_component(wildcards.component)
    found = Path(entry.path).rglob("*") if entry.source == "folder" else []
    return sorted(str(f) for f in found if f.is_file())


rule download_component:
    input:
        folder_files,
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
        train=lambda w: f"results/data/{load_component(w.component).train.data}/train/shards/manifest.json",
        held_out=lambda w: f"results/data/{load_component(w.component).train.data}/held_out/shards/manifest.json",
    output:
        "resources/components/{component}.json",
    log:
        "logs/components/{component}.log",
    benchmark:
        "logs/components/{component}.tsv"
    wildcard_constraints:
        component="|".join(TRAINED),
    threads: 2
    conda:
        "../../envs/train.yaml"
    shell:
        "python workflow/scripts/train_autoencoder.py"
        " config={input.config}"
        " train={input.train}"
        " held_out={input.held_out}"
        " output={output}"
        " 2>&1 | tee {log}"

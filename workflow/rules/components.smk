# Model components that runs share: downloaded once, or trained here.


# runs on the machine where Snakemake runs: compute nodes often have no internet access
localrules:
    download_component,


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
        component=rf"(?!({'|'.join(TRAINED)})\.json$)[^/]+",
    conda:
        "../../envs/train.yaml"
    shell:
        "python workflow/scripts/download_component.py"
        " config={input.config}"
        " name={wildcards.component}"
        " output={output}"
        " 2>&1 | tee {log}"


# Runs on one GPU or a CPU by default. For more ranks, set the launcher in the profile's set-resources, for example
#   tasks_per_node: 8
#   launch: "'torchrun --standalone --nproc_per_node $JOB_TASKS_PER_NODE'"
# Each rank then takes batch_size images per step. Checkpoints, log and sample images are in
# resources/components/training/{component}; the finished component is moved into place atomically.
rule train_autoencoder:
    input:
        plan.perceptual_record,
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
        component="|".join(TRAINED) or "(?!)",  # matches nothing if no component is trained
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        **gpu_job(),
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/train_autoencoder.py"
        " config={input.config}"
        " train={input.train}"
        " held_out={input.held_out}"
        " output={output}"
        " wait_minutes=20"
        " distributed.world_size=$((JOB_NODES * JOB_TASKS_PER_NODE))"
        " 2>&1 | tee {log} || workflow/scripts/requeue.sh resources/components/training/{wildcards.component}/requeue"

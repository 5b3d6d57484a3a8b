# What a milestone can do: images, distances, scores, and the report of them all.
RESULT = "results/runs/{run}/{stage}/{images}"


def held_out(wildcards):
    return f"results/data/{load_run(wildcards.run).data}/held_out/shards/manifest.json"


def training_images(wildcards):
    return f"results/data/{load_run(wildcards.run).data}/train/shards/manifest.json"


def features(wildcards):
    return f"resources/components/{load_run(wildcards.run).evaluation.features}"


def text_encoder(wildcards):
    return load_stage(wildcards.run, wildcards.stage).model.text_encoder.pretrained


def alignment(wildcards):
    """The model of the clip-score: a CLIP component, or the map fitted on the dataset's own features."""
    run = load_run(wildcards.run)
    if run.evaluation.alignment != "fitted":
        return f"resources/components/{run.evaluation.alignment}"
    text = Path(text_encoder(wildcards)).name
    return f"results/data/{run.data}/alignment/{run.evaluation.features}-{text}.safetensors"


rule sample:
    input:
        config="results/runs/{run}/config/evaluate.yaml",
        stage="results/runs/{run}/{stage}/config/train.yaml",
        trained=f"{RESULT}/train.json",
        held_out=held_out,
    output:
        f"{RESULT}/samples.json",
    log:
        "logs/runs/{run}/{stage}/{images}/sample.log",
    benchmark:
        "logs/runs/{run}/{stage}/{images}/sample.tsv"
    conda:
        "../../envs/train.yaml"
    shell:
        "python workflow/scripts/sample.py"
        " config={input.config}"
        " stage={input.stage}"
        " trained={input.trained}"
        " held_out={input.held_out}"
        " output={output}"
        " 2>&1 | tee {log}"

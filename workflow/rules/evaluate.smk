# Evaluates each milestone (sample images, measure metrics) and writes the report.
from sdtrain.evaluation.registry import METRICS


localrules:
    report,


RESULT = "results/runs/{run}/{stage}/{images}"


rule sample:
    input:
        config="results/runs/{run}/config/evaluate.yaml",
        stage="results/runs/{run}/{stage}/config/train.yaml",
        trained=f"{RESULT}/train.json",
        held_out=plan.held_out_images,
    output:
        f"{RESULT}/samples.json",
    log:
        "logs/runs/{run}/{stage}/{images}/sample.log",
    benchmark:
        "logs/runs/{run}/{stage}/{images}/sample.tsv"
    conda:
        "../../envs/train.yaml"
    resources:
        **gpu_job(),
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/sample.py"
        " config={input.config}"
        " stage={input.stage}"
        " trained={input.trained}"
        " held_out={input.held_out}"
        " output={output}"
        " 2>&1 | tee {log}"


rule reference_features:
    input:
        lambda w: f"{plan.feature_network(w)}.json",
        config="results/runs/{run}/config/evaluate.yaml",
        stage="results/runs/{run}/{stage}/config/train.yaml",
        train=plan.train_images,
        held_out=plan.held_out_images,
    output:
        "results/runs/{run}/{stage}/reference.safetensors",
    log:
        "logs/runs/{run}/{stage}/reference_features.log",
    benchmark:
        "logs/runs/{run}/{stage}/reference_features.tsv"
    conda:
        "../../envs/train.yaml"
    resources:
        **gpu_job(),
    params:
        features=plan.feature_network,
        resolution=lambda w: plan.load_stage(w.run, w.stage).dataset.params.resolution,
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/reference_features.py"
        " config={input.config}"
        " train_manifest={input.train}"
        " held_out_manifest={input.held_out}"
        " resolution={params.resolution}"
        " features={params.features}"
        " filters_from={input.stage}"
        " output={output}"
        " 2>&1 | tee {log}"


rule fit_alignment:
    input:
        "resources/components/{features}.json",
        "resources/components/{text}.json",
        train="results/data/{dataset}/train/shards/manifest.json",
        held_out="results/data/{dataset}/held_out/shards/manifest.json",
    output:
        "results/data/{dataset}/alignment/{features}-{text}.safetensors",
    log:
        "logs/data/{dataset}/alignment/{features}-{text}.log",
    benchmark:
        "logs/data/{dataset}/alignment/{features}-{text}.tsv"
    wildcard_constraints:
        features="|".join(plan.load_components()),
        text="|".join(plan.load_components()),
    conda:
        "../../envs/train.yaml"
    resources:
        **gpu_job(),
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/fit_alignment.py"
        " features=resources/components/{wildcards.features}"
        " text=resources/components/{wildcards.text}"
        " manifest={input.train}"
        " held_out={input.held_out}"
        " output={output}"
        " 2>&1 | tee {log}"


rule measure:
    input:
        plan.measured_from,
        config="results/runs/{run}/config/evaluate.yaml",
        samples=f"{RESULT}/samples.json",
    output:
        f"{RESULT}/{{metric}}.json",
    log:
        "logs/runs/{run}/{stage}/{images}/{metric}.log",
    benchmark:
        "logs/runs/{run}/{stage}/{images}/{metric}.tsv"
    wildcard_constraints:
        metric="|".join(metric.record for metric in METRICS),
    conda:
        "../../envs/train.yaml"
    resources:
        **gpu_job(),
    params:
        given=plan.measure_arguments,
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/measure.py"
        " metric={wildcards.metric}"
        " config={input.config}"
        " samples={input.samples}"
        " {params.given}"
        " output={output}"
        " 2>&1 | tee {log}"


rule report:
    input:
        plan.measured,
        lambda w: plan.yields(w.run),
    output:
        metrics="results/runs/{run}/metrics.json",
        html="results/runs/{run}/report.html",
        text="results/runs/{run}/metrics.txt",
    log:
        "logs/runs/{run}/report.log",
    benchmark:
        "logs/runs/{run}/report.tsv"
    conda:
        "../../envs/train.yaml"
    params:
        rows=lambda w: ",".join(plan.rows(w)),
        data=plan.data_folder,
    shell:
        "python workflow/scripts/report.py"
        " run={wildcards.run}"
        " rows={params.rows}"
        " data={params.data}"
        " output={output.metrics}"
        " html={output.html}"
        " text={output.text}"
        " 2>&1 | tee {log}"

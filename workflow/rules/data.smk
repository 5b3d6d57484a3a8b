# Makes image shards from a table of URLs or from existing shards, then latents from image shards. Shards are made in
# partitions, one job each (`shards.parts` jobs); the folder of a partition's manifest names the rule that makes it.


localrules:
    gather_shards,
    yields,


rule fetch_table:
    input:
        config="results/data/{dataset}/config/fetch_table.yaml",
    output:
        "results/data/{dataset}/table.parquet",
    log:
        "logs/data/{dataset}/fetch_table.log",
    benchmark:
        "logs/data/{dataset}/fetch_table.tsv"
    conda:
        "../../envs/data.yaml"
    shell:
        "python workflow/scripts/fetch_table.py config={input.config} output={output} 2>&1 | tee {log}"


rule select_samples:
    input:
        config="results/data/{dataset}/config/select_samples.yaml",
        table="results/data/{dataset}/table.parquet",
    output:
        train="results/data/{dataset}/train/selected.parquet",
        held_out="results/data/{dataset}/held_out/selected.parquet",
        yields="results/data/{dataset}/yields.json",
    log:
        "logs/data/{dataset}/select_samples.log",
    benchmark:
        "logs/data/{dataset}/select_samples.tsv"
    conda:
        "../../envs/data.yaml"
    shell:
        "python workflow/scripts/select_samples.py"
        " config={input.config}"
        " table={input.table}"
        " train={output.train}"
        " held_out={output.held_out}"
        " yields={output.yields}"
        " 2>&1 | tee {log}"


# Prints how many samples each filter keeps and the expected download size: `snakemake --profile … yields`
rule yields:
    input:
        plan.yields(RUN),
    log:
        f"logs/runs/{RUN}/yields.log",
    conda:
        "../../envs/data.yaml"
    params:
        samples_per_shard=lambda w, input: plan.load_data(plan.load_run(RUN).data).shards.samples_per_shard,
        parts=lambda w, input: plan.load_data(plan.load_run(RUN).data).shards.parts,
    shell:
        "python workflow/scripts/show_yields.py"
        " yields={input}"
        " samples_per_shard={params.samples_per_shard}"
        " parts={params.parts}"
        " 2>&1 | tee {log}"


rule build_shards:
    input:
        config="results/data/{dataset}/config/build_shards.yaml",
        selection="results/data/{dataset}/{split}/selected.parquet",
    output:
        "results/data/{dataset}/{split}/built/{part}-of-{parts}.json",
    log:
        "logs/data/{dataset}/{split}/built/{part}-of-{parts}.log",
    benchmark:
        "logs/data/{dataset}/{split}/built/{part}-of-{parts}.tsv"
    conda:
        "../../envs/data.yaml"
    threads: lambda w: plan.load_data(w.dataset).shards.processes
    shell:
        "python workflow/scripts/build_shards.py"
        " config={input.config}"
        " selection={input.selection}"
        " part={wildcards.part}"
        " parts={wildcards.parts}"
        " output={output}"
        " 2>&1 | tee {log}"


rule reshard:
    input:
        plan.existing_shards,
        config="results/data/{dataset}/config/reshard.yaml",
    output:
        "results/data/{dataset}/{split}/resharded/{part}-of-{parts}.json",
    log:
        "logs/data/{dataset}/{split}/resharded/{part}-of-{parts}.log",
    benchmark:
        "logs/data/{dataset}/{split}/resharded/{part}-of-{parts}.tsv"
    conda:
        "../../envs/data.yaml"
    threads: 2
    shell:
        "python workflow/scripts/reshard.py"
        " config={input.config}"
        " split={wildcards.split}"
        " part={wildcards.part}"
        " parts={wildcards.parts}"
        " output={output}"
        " 2>&1 | tee {log}"


rule index_shards:
    input:
        plan.existing_shards,
        config="results/data/{dataset}/config/index_shards.yaml",
    output:
        "results/data/{dataset}/{split}/indexed/{part}-of-{parts}.json",
    log:
        "logs/data/{dataset}/{split}/indexed/{part}-of-{parts}.log",
    benchmark:
        "logs/data/{dataset}/{split}/indexed/{part}-of-{parts}.tsv"
    conda:
        "../../envs/data.yaml"
    threads: 2
    shell:
        "python workflow/scripts/index_shards.py"
        " config={input.config}"
        " split={wildcards.split}"
        " part={wildcards.part}"
        " parts={wildcards.parts}"
        " output={output}"
        " 2>&1 | tee {log}"


rule gather_shards:
    input:
        plan.parts,
    output:
        "results/data/{dataset}/{split}/shards/manifest.json",
    log:
        "logs/data/{dataset}/{split}/shards/gather_shards.log",
    conda:
        "../../envs/data.yaml"
    params:
        folder=lambda w, input: str(Path(input[0]).parent),
        parts=lambda w, input: len(input),
    shell:
        "python workflow/scripts/gather_shards.py"
        " folder={params.folder}"
        " parts={params.parts}"
        " output={output}"
        " 2>&1 | tee {log}"


# Reads and checks all training and held-out shards: `snakemake --profile … verify`
rule verify:
    input:
        plan.manifests(),
    log:
        f"logs/runs/{RUN}/verify.log",
    conda:
        "../../envs/data.yaml"
    threads: 2
    shell:
        "python workflow/scripts/verify.py manifests='{input}' 2>&1 | tee {log}"


rule precompute_latents:
    input:
        config="results/data/{dataset}/config/precompute_latents.yaml",
        images="results/data/{dataset}/{split}/shards/manifest.json",
        vae="resources/components/{component}.json",
        text=plan.text_record,
    output:
        "results/data/{dataset}/{split}/latents/{component}-{resolution}px/manifest.json",
    log:
        "logs/data/{dataset}/{split}/latents/{component}-{resolution}px.log",
    benchmark:
        "logs/data/{dataset}/{split}/latents/{component}-{resolution}px.tsv"
    conda:
        "../../envs/train.yaml"
    resources:
        **gpu_job(),
    params:
        text=plan.text_argument,
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/precompute_latents.py"
        " config={input.config}"
        " vae=resources/components/{wildcards.component}"
        " {params.text}"
        " resolution={wildcards.resolution}"
        " images={input.images}"
        " output={output}"
        " 2>&1 | tee {log}"

# From a table of URLs to shards of images, and of latents.


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
        "python workflow/scripts/fetch_table.py" " config={input.config}" " output={output}" " 2>&1 | tee {log}"


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


rule build_shards:
    input:
        config="results/data/{dataset}/config/build_shards.yaml",
        selection=lambda w: selection_of(w.dataset, w.split),
    output:
        "results/data/{dataset}/{split}/shards/manifest.json",
    log:
        "logs/data/{dataset}/{split}/shards/build_shards.log",
    benchmark:
        "logs/data/{dataset}/{split}/shards/build_shards.tsv"
    conda:
        "../../envs/data.yaml"
    threads: lambda w: load_data(w.dataset).shards.processes
    shell:
        "python workflow/scripts/build_shards.py"
        " config={input.config}"
        " split={wildcards.split}"
        " selection={input.selection}"
        " output={output}"
        " 2>&1 | tee {log}"


rule precompute_latents:
    input:
        config="results/data/{dataset}/config/precompute_latents.yaml",
        images="results/data/{dataset}/{split}/shards/manifest.json",
        vae="resources/components/{component}.json",
    output:
        "results/data/{dataset}/{split}/latents/{component}-{resolution}px/manifest.json",
    log:
        "logs/data/{dataset}/{split}/latents/{component}-{resolution}px.log",
    benchmark:
        "logs/data/{dataset}/{split}/latents/{component}-{resolution}px.tsv"
    conda:
        "../../envs/train.yaml"
    shell:
        "python workflow/scripts/precompute_latents.py"
        " config={input.config}"
        " vae=resources/components/{wildcards.component}"
        " resolution={wildcards.resolution}"
        " images={input.images}"
        " output={output}"
        " 2>&1 | tee {log}"

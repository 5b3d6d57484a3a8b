# One rule trains every stage up to every milestone; each milestone resumes from the previous one.


rule train:
    input:
        lambda w: plan.components_of(plan.load_stage(w.run, w.stage).model),
        plan.earlier_result,
        config="results/runs/{run}/{stage}/config/train.yaml",
        data=lambda w: plan.trained_on(w.run, w.stage),
    output:
        "results/runs/{run}/{stage}/{images}/train.json",
    log:
        "logs/runs/{run}/{stage}/{images}/train.log",
    benchmark:
        "logs/runs/{run}/{stage}/{images}/train.tsv"
    priority: 10
    conda:
        "../../envs/train.yaml"
    threads: 2
    resources:
        **gpu_job(launch="torchrun --standalone --nproc_per_node $JOB_TASKS_PER_NODE"),
    params:
        milestones=lambda w: str([m for m in plan.milestones(w.run, w.stage) if m <= int(w.images)]),
    shell:
        f"{COUNTS}"
        "{resources.launch} workflow/scripts/train.py"
        " config={input.config}"
        " experiment.stop_at={wildcards.images}"
        " experiment.wait_minutes=20"
        " distributed.world_size=$((JOB_NODES * JOB_TASKS_PER_NODE))"
        " 'experiment.milestones={params.milestones}'"
        " 2>&1 | tee {log} || workflow/scripts/requeue.sh results/runs/{wildcards.run}/{wildcards.stage}/requeue"

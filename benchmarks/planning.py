"""Measure the CPU time of planning the demo with 190 shard partitions against a bare workflow with as many jobs."""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PARTS, ROUNDS, GOAL = 190, 5, 1.85  # GOAL: times the bare workflow, at most
ROOT = Path(__file__).resolve().parents[1]
BARE = """
rule all:
    input: expand("out/{{n}}.txt", n=range({jobs}))

rule job:
    output: "out/{{n}}.txt"
    shell: "touch {{output}}"
"""


def cpu_seconds(folder: Path, snakefile: Path) -> tuple[float, str]:
    """Return user and system time of a dry run in `folder`, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["snakemake", "--snakefile", snakefile, "--directory", folder, "--dry-run", "--quiet", "rules", "-c", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout + done.stderr


def main() -> None:
    """Run the benchmark; the argument is the root of another checkout to plan with, by default this one."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    with tempfile.TemporaryDirectory() as temporary:
        planned, bare = Path(temporary, "planned"), Path(temporary, "bare")
        bare.mkdir()
        shutil.copytree(root / "configs", planned / "configs")
        (planned / "resources").symlink_to(root / "resources")
        data = planned / "configs/data/emoji.yaml"
        text = data.read_text(encoding="utf-8")
        assert "  parts: 2" in text
        data.write_text(text.replace("  parts: 2", f"  parts: {PARTS}"), encoding="utf-8")
        _, output = cpu_seconds(planned, root / "Snakefile")
        jobs = int(next(line.split()[1] for line in reversed(output.splitlines()) if line.startswith("total")))
        (bare / "Snakefile").write_text(BARE.format(jobs=jobs - 1), encoding="utf-8")
        times = [
            (cpu_seconds(planned, root / "Snakefile")[0], cpu_seconds(bare, bare / "Snakefile")[0])
            for _ in range(ROUNDS)
        ]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{jobs} jobs, median of {ROUNDS} rounds: {mine:.2f} s of CPU time")
    print(f"bare workflow: {theirs:.2f} s; ratio {mine / theirs:.2f} (goal {GOAL})")


if __name__ == "__main__":
    main()

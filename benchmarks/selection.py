"""Measure select_samples: rows a second against reading the same columns with pyarrow, and peak memory."""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from omegaconf import OmegaConf

from sdtrain.config import schema_data
from sdtrain.data import selection
from sdtrain.data.tables import write_parquet

ROWS, BATCH, ROUNDS = 2_000_000, 65536, 5
SELECTION = {  # keeps about 15 % of the rows
    "filters": {
        "original_width": ">=900",
        "original_height": ">=800",
        "pwatermark": "<=0.5",
        "language": "in [en, de]",
    },
    "held_out": {"column": "url", "fraction": 0.01},
}


def write_table(path: Path, rows: int) -> None:
    """Write a table like LAION's: addresses, captions, sizes and scores."""
    rng, words = np.random.default_rng(0), np.array("a red photo of the new house with free shipping in black".split())
    languages = np.array(["en", "de", "fr"])
    captions = pa.array([" ".join(some) for some in words[rng.integers(0, len(words), (BATCH, 9))]])
    names = [pa.field("url", pa.string()), pa.field("caption", pa.string()), pa.field("language", pa.string())]
    names += [pa.field(name, pa.int64()) for name in ("original_width", "original_height", "hash")]
    names += [pa.field(name, pa.float64()) for name in ("similarity", "punsafe", "aesthetic", "pwatermark")]
    with write_parquet(path, pa.schema(names)) as file:
        for begin in range(0, rows, BATCH):
            n = min(BATCH, rows - begin)
            width, height = rng.integers(200, 1600, (2, n))
            scores, hashes = rng.uniform(0, 1, (4, n)), rng.integers(0, 2**62, n)
            numbers = hashes.astype(str)
            urls = np.char.add(
                np.char.add("https://images.example.org/products/", numbers), "/large_1024x1024.jpg?v=1571609590"
            )
            watermark = pa.array(scores[3], mask=scores[2] < 0.02)
            texts = pc.binary_join_element_wise(captions[:n], pa.array(numbers), " ")  # all different
            columns = [urls, texts, languages[rng.integers(0, 3, n)], width, height, hashes, *scores[:3], watermark]
            file.write(pa.table(columns, schema=file.schema))


def read(path: Path) -> None:
    """Read every column and drop it."""
    for _ in ds.dataset(path).to_batches(batch_size=BATCH):
        pass


def select(path: Path) -> None:
    """Select from the table in this process."""
    config = OmegaConf.merge(OmegaConf.structured(schema_data.SelectConfig), SELECTION)
    selection.select(config, path, path.with_name("train.parquet"), path.with_name("out.parquet"))


def seconds(work, path: Path) -> float:
    """Return the seconds that `work` takes on a table."""
    begin = time.perf_counter()
    work(path)
    return time.perf_counter() - begin


def peak_memory(path: Path) -> float:
    """Return the peak memory, in MB, of a process that only selects from the table."""
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    if len(sys.argv) > 1:
        select(Path(sys.argv[1]))
        return print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small.parquet"), Path(folder, "large.parquet")
        write_table(small, ROWS // 10)
        write_table(large, ROWS)
        ratios = []
        for number in range(ROUNDS):  # alternately, so that a slower machine slows both
            plain, ours = seconds(read, large), seconds(select, large)
            ratios.append(plain / ours)
            rates = f"read {ROWS / plain:,.0f} rows/s, select {ROWS / ours:,.0f} rows/s"
            print(f"round {number + 1}: {rates}, ratio {ratios[-1]:.2f}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")
        memory = [peak_memory(path) for path in (small, large)]
        print(f"peak memory: {memory[0]:.0f} MB for {ROWS // 10:,} rows, {memory[1]:.0f} MB for {ROWS:,}")


if __name__ == "__main__":
    main()

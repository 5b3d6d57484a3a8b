"""Run a function on several ranks: processes of one gloo group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "diffusers.models.unets.unet_2d_condition",
    "sdtrain.training.parallel",
]


def run_ranks(function: Callable, size: int, *arguments, timeout: float = 120) -> list:
    """Return the results of `function(rank, *arguments)`, defined in a test module, on each of `size` ranks.

    Raises AssertionError with the traceback of a rank that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(Path(folder), rank, size, function, arguments)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            process.kill()
        results = []
        for rank in range(size):
            file = Path(folder, str(rank))
            assert file.exists(), f"rank {rank} came to no end"
            error, value = pickle.loads(file.read_bytes())
            assert not error, f"rank {rank}: {error}"
            results.append(value)
        return results


def _rank(folder: Path, rank: int, size: int, function: Callable, arguments: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    result = "", None
    try:
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        result = "", function(rank, *arguments)
        dist.barrier()
    except BaseException:
        result = traceback.format_exc(), None
    aside = folder / f".{rank}"
    aside.write_bytes(pickle.dumps(result))
    aside.replace(folder / str(rank))
    os._exit(0)

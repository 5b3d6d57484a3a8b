"""Test data (small pictures with captions, tars of them, a tokenizer) and functions that run the commands."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "square",
    "circle",
    "stripe",
    "on",
    "white",
    "black",
    "a",
    "photo",
    "of",
]
SHARD_SIZES = (17, 5, 19)
ROOT = Path(__file__).resolve().parents[1]


@functools.cache  # its processes unpickle objects of the module in sys.modules
def load_script(name: str):
    """Return a command of workflow/scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "workflow/scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command of workflow/scripts in a new process, from the root of the repository."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, f"workflow/scripts/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def call_script(name: str, arguments: list[str], replaces: int | None = None) -> None:
    """Run a command of workflow/scripts in this process.

    With `replaces`, kill -9 the process after so many renames, just before the next: random kills rarely occur there.
    """
    count = iter(range(10**9))

    def replace(*paths):
        if next(count) == replaces:
            os.kill(os.getpid(), signal.SIGKILL)
        os_replace(*paths)

    os_replace, os.replace = os.replace, os.replace if replaces is None else replace
    load_script(name).main([name, *arguments])


def kill_script(name: str, arguments: list[str], *, after: float | None = None, replaces: int | None = None) -> bool:
    """Start a command in a new process; kill -9 it `after` seconds, or at a rename as in `call_script`.

    Return whether it was killed; False if it succeeded before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sdtrain.config.cli", "sdtrain.data.tables", "tqdm", "PIL.Image"]
    )  # so that starts are fast
    process = context.Process(target=call_script, args=(name, arguments, replaces))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"{name}: ended with {process.exitcode}"
    return process.exitcode != 0


def make_tokenizer():
    """Return a CLIP tokenizer, 16 tokens long, whose byte-pair merges contain only WORDS."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    merges = list(dict.fromkeys(merges))
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        *letters,
        *(c + "</w>" for c in letters),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def draw(number: int) -> tuple[Image.Image, str]:
    """Return a small picture and its caption; sizes and shapes vary with the number."""
    rng = np.random.default_rng(number)
    width, height = (int(v) for v in rng.integers(32, 72, 2))
    colour = ("red", "green", "blue")[number % 3]
    shape = ("square", "circle")[number // 3 % 2]
    image = Image.new("RGB", (width, height), "white")
    side = int(rng.integers(12, 24))
    left, top = int(rng.integers(width - side)), int(rng.integers(height - side))
    patch = Image.new("RGB", (side, side), colour)
    mask = Image.new("L", (side, side), 255)
    if shape == "circle":
        y, x = np.ogrid[:side, :side]
        inside = (x - side / 2 + 0.5) ** 2 + (y - side / 2 + 0.5) ** 2 <= side**2 / 4
        mask = Image.fromarray(np.uint8(inside * 255))
    image.paste(patch, (left, top), mask)
    return image, f"a {colour} {shape}"


def jpeg(image: Image.Image) -> bytes:
    """Return the bytes of an image's JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Write a tar of (key, {extension: bytes}) with the standard library."""
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def make_sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Return sample `number` of `image_shards`: image, caption and metadata (width, height, pwatermark, group)."""
    image, caption = draw(number)
    meta = {
        "caption": caption,
        "original_width": image.width,
        "original_height": image.height,
        "pwatermark": round(number % 10 / 10, 1),
        "group": "even" if number % 2 == 0 else "odd",
    }
    return f"{number:09d}", {"jpg": jpeg(image), "txt": caption.encode(), "json": json.dumps(meta).encode()}

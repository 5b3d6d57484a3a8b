"""Yields as text: how many rows a selection, or samples a set of shards, keeps of each filter, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def show_yields(result: Mapping[str, Any], samples_per_shard: int, parts: int) -> str:
    """Return the yields of a selection (`yields.json`) or of a manifest, and the number of shards."""
    if "shards" in result:  # a manifest: its shards exist already
        return f"{show_shards(result)}\nshards: {len(result['shards']):,}"
    train = count_shards(result["train"], samples_per_shard, parts)
    held_out = count_shards(result["held_out"], samples_per_shard, 1)
    several = f" in {parts} parts" if parts > 1 else ""
    counts = f"shards of {samples_per_shard:,}{several}: train {train:,}, held out {held_out:,}"
    return f"{show_selection(result)}\n{counts}"


def show_selection(result: Mapping[str, Any]) -> str:
    """Return the yields of a selection as text: a table of its filters, then what else was dropped and is kept."""
    lines = [f"rows: {result['rows']:,}", *_filter_table(result["predicates"])]
    if without_url := result.get("without_url"):
        lines.append(f"rows without a url dropped: {without_url:,}")
    if duplicates := result.get("duplicates"):
        lines.append(f"duplicates of {duplicates['column']} dropped: {duplicates['dropped']:,}")
    if limit := result.get("rows_limit"):
        few = "" if result["kept"] >= limit else f"; only {result['kept']:,} are left, and all are kept"
        lines.append(f"random rows requested: {limit:,}{few}")
    lines.append(f"kept {result['kept']:,}: train {result['train']:,}, held out {result['held_out']:,}")
    if sizes := result.get("bytes"):
        train, held_out = show_bytes(sizes["train"]), show_bytes(sizes["held_out"])
        lines.append(f"expected download: train {train}, held out {held_out} (from {result['size_from']})")
    return "\n".join(lines)


def show_shards(manifest: Mapping[str, Any]) -> str:
    """Return as text what is kept of existing shards: the manifest's `yields`, `dropped` and `samples`."""
    lines = list(_filter_table(manifest.get("yields") or [])) or ["no filter was applied"]
    lines += [f"dropped, {reason}: {count:,}" for reason, count in manifest["dropped"].items() if count]
    return "\n".join([*lines, f"kept {manifest['samples']:,}"])


def _filter_table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Yield the lines of a table of filters, one a row, with the counts of Predicates.judge."""
    if rows:
        import pandas as pd  # takes half a second

        table = pd.DataFrame(rows)
        table.index = pd.Index(table.pop("column") + " " + table.pop("predicate"))
        table.columns = table.columns.str.replace("_", " ")
        yield from table.to_string(formatters=["{:,}".format] * table.shape[1]).splitlines()


def count_shards(rows: int, size: int, parts: int) -> int:
    """Return the number of shards of `size` rows if each of `parts` equal parts ends with a shard of its own."""
    edges = [part * rows // parts for part in range(parts + 1)]
    return sum(-((begin - end) // size) for begin, end in zip(edges, edges[1:], strict=False))


def show_bytes(size: float) -> str:
    """Return a size with its unit: 1.2 MB for 1234567."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"

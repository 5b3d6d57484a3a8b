"""Download one component of configs/components.yaml to resources/components atomically, with a record of its files."""

import sys
from pathlib import Path

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.errors import SDTrainError, one_line_errors
from sdtrain.io.files import write_json
from sdtrain.models.components import make_snapshot


def seconds(text: str) -> float:
    """Return the argument `timeout` as a number."""
    try:
        return float(text)
    except ValueError:
        raise SDTrainError(f"timeout: must be a number of seconds, got {text!r}") from None


def main(argv: list[str]) -> None:
    """Run the command."""
    component, own = command_line(argv, schema_data.ComponentConfig, __doc__, name=None, output=None, timeout="30")
    with one_line_errors(f"component {own['name']}: "):
        record = make_snapshot(component, own["name"], Path(own["output"]), seconds(own["timeout"]))
        write_json(own["output"], record)
    size = sum(file["bytes"] for file in record["files"].values()) / 1e6
    print(f"{own['name']}: {len(record['files'])} files, {size:.1f} MB, from {record['from']} ({record['version']})")


if __name__ == "__main__":
    main(sys.argv)

"""Gather the metrics of a run into metrics.json, a table for the terminal and a self-contained report.html.

`rows` are the milestones to show, in order: stage1/0,stage1/32000,stage2/10000. Their records are in `folder`; `data`
is the folder of the dataset, if the run has one.
"""

import sys
from pathlib import Path

from sdtrain.config.cli import command_line
from sdtrain.errors import one_line_errors
from sdtrain.evaluation.report import read_row, render, summary, terminal_table
from sdtrain.io.files import write_json, write_text


def main(argv: list[str]) -> None:
    """Run the command."""
    required = dict.fromkeys(("run", "rows", "output", "html", "text"))
    _, own = command_line(argv, None, __doc__, **required, folder="", data="")
    folder = Path(own["folder"] or f"results/runs/{own['run']}")
    with one_line_errors():
        rows = [read_row(folder, name) for name in own["rows"].split(",")]
        metrics = summary(own["run"], rows)
        page = render(metrics, folder, rows, Path(own["data"]) if own["data"] else None)
        text = f"{terminal_table(metrics['rows'])}\n\n{own['html']}\n"
        write_text(own["html"], page)
        write_text(own["text"], text)
        write_json(own["output"], metrics)
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv)

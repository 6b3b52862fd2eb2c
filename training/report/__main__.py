"""Write a run's report: one HTML file, to be opened without a network.

    python -m training.report output/demo              writes output/demo/report.html
    python -m training.report output/demo --output my.html

Works on any run, a failed or unfinished one too; train.py does it at the end of every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training.report.page import REPORT, write_report
from training.utils.arguments import Parser
from training.utils.errors import UserError, run_program
from training.utils.run.files import check_page
from training.utils.run.folders import LATEST, output_root, shown


def main(argv: Sequence[str]) -> int:
    """Parse, read, write; returns the exit code."""
    parser = Parser(
        prog="python -m training.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", default="", help="the run's folder (default: the latest run)")
    parser.add_argument("--output", default="", help="the file to write (default: report.html in the run's folder)")
    options = parser.parse_args(argv)
    run = Path(options.run_dir).expanduser() if options.run_dir else output_root() / LATEST
    target = Path(options.output).expanduser() if options.output else run / REPORT
    check_page(target, "--output")
    try:
        file = write_report(run, target)
    except OSError as error:
        raise UserError(f"the report can not be written to {target}: {error.strerror}") from error
    print(f"open {shown(file)}   ({file.stat().st_size / 1024:.0f} KB, no network needed)")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

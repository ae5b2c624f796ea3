"""Runs every benchmark, each in a process of its own, on one model. Options it does not know go to all of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="The other options: extract.py --help.")
    parser.add_argument("--work", help="keep models and outputs here [a temporary directory]")
    parser.add_argument("--mergekit", help="the mergekit-extract-lora to use [installs one]")
    parser.add_argument("--layers", help="of the model of extract.py and merge.py")
    options, shared = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="surgery-benchmark-") as temporary:
        shared += ["--work", options.work or temporary]
        layers = ["--layers", options.layers] if options.layers else []
        mergekit = ["--mergekit", options.mergekit] if options.mergekit else []
        own = {"extract": [*layers, *mergekit], "extract_memory": [], "merge": layers}
        codes = [
            subprocess.run([sys.executable, HERE / f"{name}.py", *shared, *extra]).returncode
            for name, extra in own.items()
        ]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()

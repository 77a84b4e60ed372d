"""`python -m poemerge.zoo OUT [--full] [--processes N]`: builds a zoo in OUT; the command of data/zoo/dvc.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

from poemerge.zoo.build import build_zoo
from poemerge.zoo.settings import DEMO, FULL

parser = argparse.ArgumentParser(prog="python -m poemerge.zoo", description=__doc__)
parser.add_argument("out", type=Path)
parser.add_argument("--full", action="store_true")
parser.add_argument("--processes", type=int)
arguments = parser.parse_args()
build_zoo(arguments.out, FULL if arguments.full else DEMO, processes=arguments.processes)

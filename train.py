"""Trains what a YAML file describes: `python train.py fit --config configs/quickstart.yaml`."""

import sys

from draftsmith.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""`accelerate launch -m latentdiff.train`: the command `latentdiff train`, on any number of processes."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

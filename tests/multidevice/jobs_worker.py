"""Runs sample.py several times in one process, with the lists of arguments that are given; prints the exit statuses last."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import sample

if __name__ == "__main__":
    print(json.dumps([sample.main(arguments) for arguments in json.loads(sys.argv[1])]))

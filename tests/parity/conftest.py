"""Lets the tests here import their helpers `oracle` and `cases`: test folders are no packages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

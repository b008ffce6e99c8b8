"""Puts the repository on the path, so that tests read `tests.report.sample` however they start."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

"""Collects the errors of a process that a test starts; Python imports this at its start (see ../errors.py)."""

import os
import sys

if folder := os.environ.get("GMASK_RECORD_ERRORS"):
    sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..")))
    from record.errors import watch

    sys.path.pop(0)
    watch(folder)

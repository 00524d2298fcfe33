"""Tests. Low-rank layers go by rules, not by measurements: numbers stay the same, and the user's cache as it was."""

import os

os.environ.setdefault("COMPAWARE_TUNE", "off")

"""The tests; their folders mirror the code, and support/ holds what they share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent  # the clone that is tested

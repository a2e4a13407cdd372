"""The code files that travel to the Hub with every checkpoint, by their names there."""

from pathlib import Path

ROOMS = ("configuration", "modeling_vlm", "processing")
CODE = {path.name for room in ROOMS for path in (Path(__file__).parents[2] / room).glob("*_prefix_vlm.py")}

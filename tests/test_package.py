"""Imports: who may import whom, and what a bare import may load."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import keras_vitnt

# What of ours each module may import.
ALLOWED = {
    "positions": set(),
    "images": set(),
    "training": set(),
    "report": set(),
    "vit": {"positions"},
    "tnt": {"vit"},
    "variants": {"vit"},
    "models": {"tnt", "variants", "vit", "weights"},
    "names": {"models", "variants"},
    "checkpoints": set(),
    "schemes": set(),
    "fitting": {"positions", "schemes"},
    "weights": {"checkpoints", "fitting", "schemes"},
    "saving": {"schemes", "weights"},
    "pretrained": {
        *("checkpoints", "fitting", "images", "models", "names", "schemes", "variants"),
        "weights",
    },
    "datasets": {"images"},
    "edge_vit": set(),
    "edge_tnt": {"edge_vit"},
    "edge": {"edge_tnt", "edge_vit", "tnt", "vit"},
    "gate": set(),
    "quantize": {"edge"},
    "sources": {"checkpoints", "datasets", "gate", "images", "pretrained"},
    "conversion": {"edge", "gate", "images", "quantize"},
    "checks": {"edge", "gate", "images", "quantize"},
    "export": {
        *("checks", "conversion", "datasets", "edge", "gate", "images", "quantize", "sources"),
        *("vit", "weights"),
    },
    "runs": {"explain", "export", "images", "report", "sources"},
    "explain": {"tnt", "vit"},
    "benchmark": {"tnt", "vit"},
}
FREE = {"__init__", "__main__", "cli", "commands"}


def test_imports_point_down():
    folder = Path(keras_vitnt.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - FREE
    assert modules == set(ALLOWED)
    for name, allowed in ALLOWED.items():
        tree = ast.parse((folder / f"{name}.py").read_text())
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        used = {node.module or alias.name for node in relative for alias in node.names}
        assert used <= allowed, f"{name} imports {used - allowed}"


def test_what_the_readme_trains_can_be_trained():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    block = re.search(r"```python\n(.*?)# model.fit", text, re.DOTALL)[1]
    names = {}
    exec(block, names)
    photos = np.zeros((2, 32, 32, 3), "float32")
    assert "accuracy" in names["model"].fit(photos, np.zeros(2), verbose=0).history


LIGHT = """
import sys, time
import keras
before = set(sys.modules)  # Keras itself loads some of these where they are installed
start = time.perf_counter()
import keras_vitnt
seconds = time.perf_counter() - start
heavy = {"matplotlib", "sklearn", "tensorflow_datasets", "ai_edge_litert", "rich"}
if keras.backend.backend() != "tensorflow":
    heavy.add("tensorflow")
loaded = heavy & (set(sys.modules) - before)
assert not loaded, loaded
print(seconds)
"""


def test_import_is_light():
    result = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stderr[-2000:]

"""The suite runs on the backend of KERAS_BACKEND; every run is repeatable."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny models compile for seconds and run for milliseconds.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import keras
import pytest


@pytest.fixture(autouse=True)
def repeatable():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def pytest_collection_modifyitems(config, items):
    """What looks only at the conversion process, TensorFlow on every backend, runs there once."""
    if keras.backend.backend() != "tensorflow":
        once = [item for item in items if item.get_closest_marker("conversion")]
        config.hook.pytest_deselected(items=once)
        items[:] = [item for item in items if item not in once]

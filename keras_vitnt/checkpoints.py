"""A path or hub name -> named arrays, read one at a time, and what their configuration says.

Nothing here runs code that a file brings: torch files are read with `weights_only=True`, NumPy's
without pickled objects, Keras' in safe mode.
"""

import argparse
import json
import math
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

# In a folder or hub repository, the first of these that is there.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_FILES = ("config.json", "preprocessor_config.json")
# Training checkpoints hold the weights under one of these; the averaged ones are released.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


class Checkpoint(NamedTuple):
    """An opened source.

    Attributes:
        source: what the user passed.
        shapes: the shape of each array, by its name in the file.
        read: reads an array by name, floating point.
        config: what JSON files beside it and metadata inside it say.
        skipped: what else the file holds -> why it is not among the arrays.
    """

    source: str
    shapes: dict
    read: callable
    config: dict
    skipped: dict = {}


def open_checkpoint(source):
    """Open a checkpoint; arrays are read later, one at a time.

    Args:
        source: path of a `.safetensors`, `.npz`, `.pth`, `.pt`, `.bin` or `.pth.tar` file, of an
            `.index.json` of shards, of a folder with one, of Keras' `.keras` or `.weights.h5`;
            or "hf:owner/name[@revision]".

    Raises:
        FileNotFoundError, ValueError: for a missing, foreign, damaged or unsafe file.
        ImportError: if the extra that reads this kind of file is not installed.
    """
    path = from_hub(source) if on_hub(source) else Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds none of {', '.join(WEIGHT_FILES)}.")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    reader = next((reader for suffix, reader in READERS if path.name.endswith(suffix)), None)
    if reader is None:
        suffixes = ", ".join(suffix for suffix, _ in READERS)
        raise ValueError(f"{path}: expected a checkpoint named *{suffixes}.")
    try:
        shapes, read, config, *skipped = reader(path)
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # zip, JSON, pickle, header and dtype errors of five libraries
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source} cannot be read as a checkpoint: {reason}") from error
    if path.name in WEIGHT_FILES:  # the layout of hub repositories; elsewhere it may be another's
        config |= beside(path)
    return Checkpoint(str(source), shapes, read, config, *skipped)


def is_checkpoint(source):
    """Whether a path or name is one that `open_checkpoint` reads, apart from Keras' own files."""
    names = [suffix for suffix, _ in READERS if suffix not in (".keras", ".weights.h5")]
    folder = any((Path(source).expanduser() / name).is_file() for name in WEIGHT_FILES)
    return on_hub(source) or str(source).endswith(tuple(names)) or folder


def on_hub(source):
    return str(source).startswith("hf:")


def beside(path):
    """What the JSON files beside a checkpoint say."""
    found = {}
    for name in CONFIG_FILES:
        file = path.parent / name
        if file.is_file():
            try:
                found |= dict(json.loads(file.read_text()))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file} holds no JSON object: {error}") from error
    return found


def floating(name, dtype):
    if not (np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16):
        raise ValueError(f"{name} is {dtype}, expected floating point numbers")


def read_safetensors(path):
    from safetensors import safe_open

    file = safe_open(path, framework="numpy", backend="pread")
    shapes = {}
    for name in file.keys():
        part = file.get_slice(name)
        if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} is {part.get_dtype()}, expected floating point numbers")
        shapes[name] = tuple(part.get_shape())
    return shapes, file.get_tensor, dict(file.metadata() or {})


def shard_names(index):
    """The files that an index names, each a plain name beside it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise ValueError(f"{index} names {foreign[0]}, which is not a file beside it.")
    return names


def read_shards(path):
    """An index of shards, each a file of its own."""
    files = {}
    for name in shard_names(path):
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names the shard {name}, which is not beside it.")
        files[name] = dict(READERS)[Path(name).suffix](path.parent / name)
    shards = json.loads(path.read_text())["weight_map"]
    shapes = {}
    for name, shard in shards.items():
        if name not in files[shard][0]:
            raise ValueError(f"the index says that {name} is in {shard}, but it is not")
        shapes[name] = files[shard][0][name]
    extra = [f"{n} in {s}" for s in files for n in files[s][0] if shards.get(n) != s]
    if extra:
        raise ValueError(f"the index does not name {', '.join(extra)}")
    config = next(iter(files.values()))[2]
    return shapes, lambda name: files[shards[name]][1](name), config


def read_npz(path):
    if not zipfile.is_zipfile(path):  # or NumPy would propose to unpickle it
        raise ValueError("it is damaged, or no .npz file: those are zip archives")
    file = np.load(path, allow_pickle=False)
    if damaged := file.zip.testzip():  # before anything is assigned
        raise ValueError(f"{damaged} is damaged")
    shapes = {}
    for name in file.files:
        with file.zip.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = header(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which may run code; refused")
        if dtype != "V2":
            floating(name, dtype)
        if math.prod(shape) * dtype.itemsize > file.zip.getinfo(f"{name}.npy").file_size:
            raise ValueError(f"{name} is shorter than its shape {shape}")
        shapes[name] = shape

    def read(name):
        array = file[name]
        # Saved without ml_dtypes, bfloat16 comes back as two nameless bytes.
        return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array

    return shapes, read, {}


def read_torch(path):
    try:
        import torch
    except ImportError as error:
        message = f'{path} needs torch to be read: pip install "keras-vitnt[torch]".'
        raise ImportError(message) from error
    try:
        # Training scripts leave their arguments there: attributes of a Namespace, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a file from before torch 1.6 cannot be mapped into memory
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        wants = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not wants and "TorchScript" not in str(error):
            raise ValueError("it is no file of torch.save") from error
        raise ValueError(
            "it holds more than arrays, and loading that may run code"
            + (f" (it asks for {wants[1]})" if wants else "")
            + "; save only its state_dict, where you trust it"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected a state_dict")
    wrapper = next((name for name in WRAPPERS if isinstance(found.get(name), dict)), None)
    arrays = found[wrapper] if wrapper else found
    shapes = {}
    for name, tensor in arrays.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, expected an array")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, expected floating point numbers")
        shapes[name] = tuple(tensor.shape)

    def read(name):
        tensor = arrays[name].detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    rest = {name: f"beside {wrapper}" for name in found if wrapper and name != wrapper}
    return shapes, read, {}, rest


def read_keras(path):
    """A model of ours, by the paths of its variables."""
    import keras

    model = keras.models.load_model(path, compile=False)
    arrays = {v.path: v for v in model.weights if "seed_generator" not in v.path}
    shapes = {name: tuple(v.shape) for name, v in arrays.items()}
    encoder = model.get_layer("encoder")
    config = {"grid": encoder.grid}
    return shapes, lambda name: keras.ops.convert_to_numpy(arrays[name]), config


def read_h5(path):
    import h5py

    file = h5py.File(path)
    shapes, skipped = {}, {}

    def visit(name, part):
        if not isinstance(part, h5py.Dataset):
            return
        if part.external or part.is_virtual:
            raise ValueError(f"{name} stands in another file; refused")
        if not np.issubdtype(part.dtype, np.floating) or name.startswith("optimizer/"):
            skipped[name] = "of the optimizer or a random generator"
        else:
            shapes[name] = part.shape

    file.visititems(visit)
    return shapes, lambda name: file[name][()], {}, skipped


READERS = (
    (".safetensors", read_safetensors),
    (".index.json", read_shards),
    (".npz", read_npz),
    (".pth", read_torch),
    (".pt", read_torch),
    (".bin", read_torch),
    (".pth.tar", read_torch),
    (".keras", read_keras),
    (".weights.h5", read_h5),
)


def from_hub(source):
    """Fetch "hf:owner/name[@revision]" through huggingface_hub's cache: -> folder.

    The hub's own settings hold: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.

    Raises:
        ValueError: if it is no such name, or the repository or its weights are not there.
        ConnectionError: if the hub cannot be reached and the cache has no copy.
    """
    name = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if not name:
        raise ValueError(f"{source!r}: expected hf:owner/name or hf:owner/name@revision.")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        message = f'{source} needs huggingface_hub: pip install "keras-vitnt[hub]".'
        raise ImportError(message) from error
    repository, revision = name.groups()

    def fetch(file):
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        except hub.errors.LocalEntryNotFoundError:  # unreachable, and no copy
            cached = hub.try_to_load_from_cache(repository, file, revision=revision)
            if cached is hub._CACHED_NO_EXIST:  # once reached, the hub said that it has none
                return None
            raise
        except hub.errors.EntryNotFoundError:
            return None

    try:
        weights = next(filter(None, map(fetch, WEIGHT_FILES)), None)
        shards = shard_names(weights) if weights and weights.suffix == ".json" else ()
        for file in (*shards, *CONFIG_FILES):
            fetch(file)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"{source}: no such repository or revision, or it is private (set HF_TOKEN)."
        ) from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{source} is not in the cache and the hub cannot be reached "
            f"({hub.constants.ENDPOINT}; HF_HUB_OFFLINE, HF_ENDPOINT)."
        ) from error
    except ValueError as error:  # of an index
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:  # of the HTTP library, which the hub's errors do not wrap
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(f"{source}: the download broke off: {reason}") from error
    if weights is None:
        raise ValueError(f"{source} holds none of {', '.join(WEIGHT_FILES)}.")
    return weights.parent

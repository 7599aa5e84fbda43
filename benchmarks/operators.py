"""What each kind of operator costs in a LiteRT file, as XNNPACK itself reports it.

    python benchmarks/operators.py model.tflite
    python benchmarks/operators.py model.tflite --threads 1 --each

XNNPACK joins, drops and adds operators, so these are its own, not the file's; what it leaves to
others (the cast of uint8 pixels) is not among them. LiteRT's profiler has no Python interface: this
calls that of C, as LiteRT 2.3 has it (`litert/c/litert_profiler.h`), on Linux.
"""

import argparse
import collections
import ctypes
from pathlib import Path

import ai_edge_litert
import numpy as np
from ai_edge_litert.interpreter import Interpreter

CPU = 1  # kLiteRtHwAcceleratorCpu
WRITE = 1  # kLiteRtTensorBufferLockModeWrite
TYPES = {np.float32: 1, np.uint8: 3}  # LiteRtElementType
INSIDE_DELEGATE = 8  # of LiteRtProfilerEventType


class TensorType(ctypes.Structure):
    """LiteRtRankedTensorType: the lowest seven bits of `bits` are the rank."""

    _fields_ = [
        ("element", ctypes.c_int32),
        ("bits", ctypes.c_uint32),
        ("dimensions", ctypes.c_int32 * 8),
        ("strides", ctypes.c_uint32 * 8),
    ]


class Event(ctypes.Structure):
    """ProfiledEventData."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int32),
        ("start", ctypes.c_uint64),
        ("microseconds", ctypes.c_uint64),
        ("memory", ctypes.c_size_t * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int32),
    ]


# Or LiteRT would write past these.
assert ctypes.sizeof(TensorType) == 72 and ctypes.sizeof(Event) == 104


class Profiled:
    """An open file; a call of it gives [(operator, microseconds)] in their order."""

    def __init__(self, path, threads):
        self.library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).parent / "libLiteRt.so"))
        environment = self.new("LiteRtCreateEnvironment", 0, None)
        model = self.new("LiteRtCreateModelFromFile", environment, str(path).encode())
        options = self.new("LiteRtCreateOptions")
        self.do("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        self.kept = []  # what LiteRT does not copy
        self.add(options, b"runtime_options_string", b"enable_profiling = true\n")
        self.add(options, b"xnnpack", b"num_threads = %d\n" % threads)
        self.model = self.new("LiteRtCreateCompiledModel", environment, model, options)
        self.profiler = self.new("LiteRtCompiledModelGetProfiler", self.model)
        plain = Interpreter(str(path))
        inputs, outputs = plain.get_input_details(), plain.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0]["dtype"] not in TYPES:
            raise SystemExit(f"{path} needs one input, float32 or uint8, and one output.")
        given, found = inputs[0], outputs[0]
        self.inputs = self.buffer("Input", environment, given)
        self.outputs = self.buffer("Output", environment, found)
        written = ctypes.c_void_p(self.inputs[0])
        address = self.new("LiteRtLockTensorBuffer", written, last=(WRITE,))
        x = np.random.default_rng(0).integers(0, 256, given["shape"]).astype(given["dtype"])
        x = x if x.dtype == "uint8" else x / x.dtype.type(255)
        ctypes.memmove(address, x.ctypes.data, x.nbytes)
        self.do("LiteRtUnlockTensorBuffer", written)

    def do(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} of LiteRT's C interface failed: status {status}.")

    def new(self, name, *arguments, last=()):
        """What a function of LiteRT writes through its pointer."""
        made = ctypes.c_void_p()
        self.do(name, *arguments, ctypes.byref(made), *last)
        return made

    def add(self, options, name, text):
        text = ctypes.create_string_buffer(text)
        keep = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        self.kept += [text, keep]
        made = self.new("LiteRtCreateOpaqueOptions", name, text, keep)
        self.do("LiteRtAddOpaqueOptions", options, made)

    def buffer(self, kind, environment, detail):
        """An array of one buffer."""
        needed = f"LiteRtGetCompiledModel{kind}BufferRequirements"
        needed = self.new(needed, self.model, ctypes.c_size_t(0), ctypes.c_size_t(0))
        shape = detail["shape"]
        of = TensorType(TYPES[detail["dtype"]], len(shape), tuple(shape))
        made = "LiteRtCreateManagedTensorBufferFromRequirements"
        made = self.new(made, environment, ctypes.byref(of), needed)
        return (ctypes.c_void_p * 1)(made)

    def __call__(self):
        self.do("LiteRtResetProfiler", self.profiler)
        self.do("LiteRtStartProfiler", self.profiler)
        zero, one = ctypes.c_size_t(0), ctypes.c_size_t(1)
        self.do("LiteRtRunCompiledModel", self.model, zero, one, self.inputs, one, self.outputs)
        self.do("LiteRtStopProfiler", self.profiler)
        count = ctypes.c_int()
        self.do("LiteRtGetNumProfilerEvents", self.profiler, ctypes.byref(count))
        events = (Event * count.value)()
        self.do("LiteRtGetProfilerEvents", self.profiler, count, events)
        return [(e.tag.decode(), e.microseconds) for e in events if e.kind == INSIDE_DELEGATE]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:4]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="a .tflite with one input and one output")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--each", action="store_true", help="each operator, not each kind")
    options = parser.parse_args()
    profiled = Profiled(options.file, options.threads)
    for _ in range(5):
        profiled()
    rounds = [profiled() for _ in range(options.rounds)]
    names = [name for name, _ in rounds[0]]
    medians = np.median([[us for _, us in events] for events in rounds], axis=0) / 1000
    if options.each:
        rows = [(name, 1, ms) for name, ms in zip(names, medians)]
    else:
        totals, counts = collections.Counter(), collections.Counter(names)
        for name, ms in zip(names, medians):
            totals[name] += ms
        rows = [(name, counts[name], ms) for name, ms in totals.most_common()]
    print("| operator of XNNPACK | count | milliseconds | share |\n| --- | ---: | ---: | ---: |")
    for name, count, ms in [*rows, ("all", len(names), medians.sum())]:
        print(f"| {name} | {count} | {ms:.2f} | {ms / medians.sum():.1%} |")


if __name__ == "__main__":
    main()

"""MNN, float32 ("high" precision). `sparse`: the converter looks for weights whose zeros its sparse kernels can use.

Its wheel for x86 holds AVX2 kernels only.
"""

from pathlib import Path

PACKAGE, REQUIREMENTS, FORM = "MNN", "MNN==3.6.1 numpy==2.4.6", "onnx"


def load(model: Path, x, threads: int, cache: Path, sparse: bool = False):
    import _tools  # the converter itself: its wrapper, MNN.tools.mnnconvert, installs a logger and sends events
    import MNN

    command = ["mnnconvert", "-f", "ONNX", "--modelFile", str(model), "--MNNModel", "model.mnn"]
    _tools.mnnconvert(command + ["--detectSparseSpeedUp"] * sparse)
    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
    options = {"runtime_manager": runtime, "shape_mutable": False, "dynamic": False}
    module = MNN.nn.load_module_from_file("model.mnn", ["input"], ["output"], **options)
    expr = MNN.expr
    value = expr.placeholder(list(x.shape), expr.NCHW)

    def infer():
        value.write(x)
        return expr.convert(module.forward([value])[0], expr.NCHW).read()

    infer.keeps = runtime
    infer.settings = {"precision": "high", "detectSparseSpeedUp": sparse}
    return infer

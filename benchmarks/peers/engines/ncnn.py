"""ncnn, its model converted by pnnx, float32 (no half-precision storage or arithmetic)."""

from pathlib import Path

PACKAGE, REQUIREMENTS, FORM = "ncnn", "ncnn==1.0.20261020 pnnx==20261020 numpy==2.4.6", "onnx"


def load(model: Path, x, threads: int, cache: Path):
    import os
    import subprocess
    import sys

    import ncnn
    import numpy as np

    # The pnnx package's Python part wants torch; its program does not, and lies beside it. It writes beside its input.
    pnnx = next(Path(folder) / "pnnx/pnnx" for folder in sys.path if (Path(folder) / "pnnx/pnnx").is_file())
    os.symlink(model, "model.onnx")
    command = [pnnx, "model.onnx", f"inputshape={list(x.shape)}".replace(" ", ""), "fp16=0"]
    command += ["ncnnparam=model.param", "ncnnbin=model.bin"]
    subprocess.run(command, stdout=sys.stderr, check=True)
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    for name in dir(net.opt):
        if name.startswith(("use_fp16_", "use_bf16_")):
            setattr(net.opt, name, False)
    blobs, workspace = ncnn.UnlockedPoolAllocator(), ncnn.PoolAllocator()  # as its own benchmark does
    net.opt.blob_allocator, net.opt.workspace_allocator = blobs, workspace
    if net.load_param("model.param") or net.load_model("model.bin"):
        raise ValueError("ncnn could not load what pnnx converted")

    def infer():
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x[0]))
            failed, output = extractor.extract("out0")
            if failed:
                raise ValueError(f"ncnn stopped with {failed}")
            return np.array(output)[None]

    infer.keeps = net, blobs, workspace
    infer.settings = {"fp16": False, "winograd": net.opt.use_winograd_convolution}
    return infer

"""LiteRT (TensorFlow Lite's successor) with its XNNPACK delegate, float32, the network converted by LiteRT Torch.

`sparse` fails: XNNPACK has sparse kernels, and LiteRT asks for them when a file holds sparse weights (DENSIFY), but
XNNPACK ignores that on x86 CPUs with AVX (`xnn_is_chw_compatible_config`): its sparse kernels there are SSE's.
"""

from pathlib import Path

PACKAGE, FORM = "ai-edge-litert", "pt2"
REQUIREMENTS = (
    "ai-edge-litert==2.3.0 litert-torch==0.10.0 litert-converter==0.5.0 ai-edge-quantizer==0.10.0 torch==2.13.0 "
    "torchao==0.18.0 jax==0.10.2 jaxlib==0.10.2 jaxtyping==0.3.11 wadler-lindig==0.1.8 opt-einsum==3.4.0 "
    "numpy==2.4.6 scipy==1.17.1 ml-dtypes==0.6.0 absl-py==2.5.1 backports.strenum==1.2.8 filelock==4.2.11 "
    "flatbuffers==25.12.19 fsspec==2026.9.0 immutabledict==4.3.1 jinja2==3.1.6 lark==1.3.1 markupsafe==3.0.4 "
    "mpmath==1.4.1 multipledispatch==1.0.0 networkx==3.6.1 packaging==26.3 protobuf==7.36.2 PyYAML==6.0.3 "
    "rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 pygments==2.21.0 safetensors==0.8.0 setuptools==65.5.0 "
    "sympy==1.14.0 tabulate==0.10.0 tqdm==4.70.1 typing-extensions==4.16.0 xdsl==0.28.0"
)


def convert(model: Path, file: Path, shape: str) -> None:
    import litert_torch
    import torch

    image = torch.zeros([int(size) for size in shape.split(",")])
    litert_torch.convert(torch.export.load(model).module(), (image,)).export(str(file))


def load(model: Path, x, threads: int, cache: Path, sparse: bool = False):
    import hashlib
    import os
    import shutil
    import subprocess
    import sys
    from importlib.metadata import version

    if sparse:
        raise ValueError("Expected sparse=False: XNNPACK ignores it on x86 with AVX; no other CPU was tried. Got True.")

    from ai_edge_litert.interpreter import Interpreter

    # Conversion takes a minute and a lot of memory: in a process of its own, and kept. No thread count is in the file.
    digest = hashlib.sha256(model.read_bytes()).hexdigest()[:32]
    file = cache / f"{digest}-{version(PACKAGE)}-{version('litert-torch')}.tflite"
    if not file.exists():
        shape = ",".join(map(str, x.shape))
        subprocess.run([sys.executable, "-I", __file__, model, "model.tflite", shape], check=True)
        shutil.copyfile("model.tflite", half := file.with_suffix(f".{os.getpid()}"))
        os.replace(half, file)
    interpreter = Interpreter(str(file), num_threads=threads)  # by itself it hands XNNPACK what that takes
    interpreter.allocate_tensors()
    (entry,), (end,) = interpreter.get_input_details(), interpreter.get_output_details()

    def infer():
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(end["index"])

    nodes = interpreter._get_ops_details()  # those of the file, then one for each part that a delegate took over
    parts = [node for node in nodes if node["op_name"] == "DELEGATE"]
    made = {int(index) for node in nodes if node["op_name"] != "DELEGATE" for index in node["outputs"]}
    # It took all if one part yields the output and nothing that it reads comes from a node.
    whole = len(parts) == 1 and end["index"] in parts[0]["outputs"] and not made & set(map(int, parts[0]["inputs"]))
    infer.settings = {"delegate": "XNNPACK" if parts else None, "parts": len(parts), "whole": whole, "sparse_layers": 0}
    infer.settings["nodes"] = len(nodes) - len(parts)
    return infer


if __name__ == "__main__":
    import sys

    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

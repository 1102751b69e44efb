"""ExecuTorch: lowered by `torch.export`, float32, as much as its partitioner allows delegated to XNNPACK."""

from pathlib import Path

PACKAGE, FORM = "executorch", "pt2"
REQUIREMENTS = (
    "executorch==1.5.1 torch==2.13.0 torchao==0.18.0 numpy==2.4.6 flatbuffers==25.12.19 filelock==4.2.11 "
    "fsspec==2026.9.0 jinja2==3.1.6 markupsafe==3.0.4 mpmath==1.4.1 networkx==3.6.1 packaging==26.3 PyYAML==6.0.3 "
    "ruamel.yaml==0.19.1 setuptools==65.5.0 sympy==1.14.0 tabulate==0.10.0 typing-extensions==4.16.0"
)


def lower(model: Path, file: Path) -> None:
    """Write the program, and beside it (.json) how many of its nodes XNNPACK takes and which it leaves."""
    import json
    from collections import Counter

    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(torch.export.load(model), partitioner=[XnnpackPartitioner()])
    module = edge.exported_program().graph_module
    parts = [part for _, part in module.named_children() if hasattr(part, "backend_id")]
    taken = [node for part in parts for node in part.original_module.graph.nodes if node.op == "call_function"]
    calls = [node.target.__name__ for node in module.graph.nodes if node.op == "call_function"]
    left = Counter(name for name in calls if name not in ("executorch_call_delegate", "getitem"))
    about = {"delegate": "XNNPACK", "parts": len(parts), "delegated_nodes": len(taken), "left_nodes": left}
    file.with_suffix(".json").write_text(json.dumps(about))
    file.write_bytes(edge.to_executorch().buffer)


def load(model: Path, x, threads: int, cache: Path):
    import hashlib
    import json
    import os
    import shutil
    import subprocess
    import sys
    from importlib.metadata import version

    # Lowering takes minutes and a lot of memory: in a process of its own, and kept. No thread count is in the program.
    file = cache / f"{hashlib.sha256(model.read_bytes()).hexdigest()[:32]}-{version(PACKAGE)}.pte"
    if not file.exists():
        subprocess.run([sys.executable, "-I", __file__, model, "lowered.pte"], check=True)
        for suffix in (".json", ".pte"):  # the program last: it says that both are there
            shutil.copyfile(f"lowered{suffix}", half := file.with_suffix(f"{suffix}.{os.getpid()}"))
            os.replace(half, f"{file.with_suffix('')}{suffix}")

    import torch
    from executorch.extension.pybindings import portable_lib

    torch.set_num_threads(threads)
    portable_lib._unsafe_reset_threadpool(threads)
    program = portable_lib._load_for_executorch(str(file))
    image = (torch.from_numpy(x),)

    def infer():
        return program.forward(image)[0].numpy()

    infer.settings = json.loads(file.with_suffix(".json").read_text())
    infer.settings["threads"] = portable_lib._threadpool_get_thread_count()
    return infer


if __name__ == "__main__":
    import sys

    lower(*map(Path, sys.argv[1:]))

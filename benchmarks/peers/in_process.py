"""Dense engines to stand beside: each takes the same PyTorch module and becomes a callable, NumPy in and out.

All run float32 in evaluation mode on the threads asked for, from a copy of the module whose weights below TINY are
zero: denormals would slow them and flatter us. `engine`, `version`, `threads` and `example_inputs` are attributes.
"""

import copy
import io
import warnings
from collections.abc import Callable

import numpy as np
import torch

from nbs_lib.compiler.fuse import TINY


def flush(model) -> None:
    """Make parameters that the compiler takes for zero exact zeros, in place; none may require a gradient."""
    for weight in model.parameters():
        weight[weight.abs() < TINY] = 0


def pytorch(model, example_inputs, threads: int = 1) -> Callable:
    """PyTorch eager. `example_inputs`: a tensor or a tuple of them. PyTorch's own thread count is restored."""
    flush(model := copy.deepcopy(model).eval().requires_grad_(False))

    def run(*arrays: np.ndarray):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                outputs = torch.utils._pytree.tree_leaves(model(*map(torch.from_numpy, arrays)))
        finally:
            torch.set_num_threads(before)
        return outputs[0].numpy() if len(outputs) == 1 else [output.numpy() for output in outputs]

    run.engine, run.version, run.threads, run.model = f"pytorch {torch.__version__}", torch.__version__, threads, model
    run.example_inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    return run


def onnxruntime(model, example_inputs, threads: int = 1) -> Callable:
    """ONNX Runtime on the CPU, default optimisations. ValueError unless within 1e-4 of PyTorch's largest output."""
    import onnxruntime as ort  # takes a while to load

    eager = pytorch(model, example_inputs, threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it announces its successor, which needs more packages
        torch.onnx.export(eager.model, eager.example_inputs, buffer := io.BytesIO(), dynamo=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode, options.log_severity_level = ort.ExecutionMode.ORT_SEQUENTIAL, 3
    session = ort.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*arrays: np.ndarray):
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs

    arrays = [value.detach().numpy() for value in eager.example_inputs]
    got, wanted = (np.concatenate([np.ravel(part) for part in peer(*arrays)]) for peer in (run, eager))
    if not np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max():
        raise ValueError(f"Expected onnxruntime to agree with PyTorch. Got {np.abs(got - wanted).max():.2g} apart.")
    run.engine, run.version, run.threads = f"onnxruntime {ort.__version__}", ort.__version__, threads
    run.example_inputs = eager.example_inputs
    return run


PEERS = {"pytorch": pytorch, "onnxruntime": onnxruntime}

"""ONNX Runtime on the CPU, with its default optimisations."""

from pathlib import Path

PACKAGE, FORM = "onnxruntime", "onnx"
REQUIREMENTS = "onnxruntime==1.31.1 numpy==2.4.6 flatbuffers==25.12.19 packaging==26.3 protobuf==7.36.2"


def load(model: Path, x, threads: int, cache: Path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode, options.log_severity_level = ort.ExecutionMode.ORT_SEQUENTIAL, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call it would burn the others' time
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def infer():
        return session.run(None, {"input": x})[0]

    infer.settings = {"optimisation": "all", "spinning": "within a call"}
    return infer

"""OpenVINO on the CPU, tuned for latency, one stream, float32."""

from pathlib import Path

PACKAGE, REQUIREMENTS, FORM = "openvino", "openvino==2026.4.1 numpy==2.4.6", "onnx"


def load(model: Path, x, threads: int, cache: Path):
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}  # we have pinned it already
    request = ov.Core().compile_model(str(model), "CPU", config).create_infer_request()

    def infer():
        return request.infer([x], share_inputs=True, share_outputs=True)[0]

    infer.settings = config
    return infer

"""One dense engine in a process and an environment of its own: what `engines.py` starts. Needs NumPy and that engine.

    python -I engine_worker.py ENGINE MODEL.onnx INPUT.npy OUTPUT.npy THREADS CPU,CPU,...

Loads the model in float32, runs it once and writes what came out to OUTPUT.npy. Then one line of JSON answers each line
on stdin: first `{"version"}`, then, for "SETTLE CALLS", the time of CALLS calls after SETTLE untimed ones, taken here,
around the calls alone: `{"ms", "idle_ms"}`, ms per call, and the CPU time that this process burnt since it last
answered. It sleeps in between, and ends with its stdin. Files next to MODEL.onnx are the worker's to write.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from timeit import Timer

if __name__ == "__main__":  # before any engine asks how many CPUs there are, or starts a thread
    os.sched_setaffinity(0, [int(cpu) for cpu in sys.argv[6].split(",")])
    # Threads sleep where they would wait by spinning, and nobody sends events.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "NM_DISABLE_ANALYTICS": "1"}

import numpy as np


def ncnn(model: Path, x: np.ndarray, threads: int):
    import subprocess

    import ncnn

    # The pnnx package's Python part wants torch; its program does not, and lies beside it.
    pnnx = next(Path(folder) / "pnnx/pnnx" for folder in sys.path if (Path(folder) / "pnnx/pnnx").is_file())
    param, weights = model.with_suffix(".param"), model.with_suffix(".bin")
    command = [pnnx, model.name, f"inputshape={list(x.shape)}".replace(" ", ""), "fp16=0"]
    command += [f"ncnnparam={param.name}", f"ncnnbin={weights.name}"]
    subprocess.run(command, cwd=model.parent, stdout=sys.stderr, check=True)
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    for name in dir(net.opt):
        if name.startswith(("use_fp16_", "use_bf16_")):
            setattr(net.opt, name, False)
    blobs, workspace = ncnn.UnlockedPoolAllocator(), ncnn.PoolAllocator()  # as its own benchmark does
    net.opt.blob_allocator, net.opt.workspace_allocator = blobs, workspace
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise ValueError("ncnn could not load what pnnx converted")

    def infer():
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x[0]))
            failed, output = extractor.extract("out0")
            if failed:
                raise ValueError(f"ncnn stopped with {failed}")
            return np.array(output)[None]

    infer.keeps = net, blobs, workspace
    return infer


def mnn(model: Path, x: np.ndarray, threads: int):
    import _tools  # the converter itself: its wrapper, MNN.tools.mnnconvert, installs a logger and sends events
    import MNN

    converted = str(model.with_suffix(".mnn"))
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", str(model), "--MNNModel", converted])
    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
    module = MNN.nn.load_module_from_file(
        converted, ["input"], ["output"], runtime_manager=runtime, shape_mutable=False, dynamic=False
    )
    expr = MNN.expr
    value = expr.placeholder(list(x.shape), expr.NCHW)

    def infer():
        value.write(x)
        return expr.convert(module.forward([value])[0], expr.NCHW).read()

    infer.keeps = runtime
    return infer


def openvino(model: Path, x: np.ndarray, threads: int):
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}  # we have pinned it already
    request = ov.Core().compile_model(str(model), "CPU", config).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def deepsparse(model: Path, x: np.ndarray, threads: int):
    from deepsparse import Engine

    engine = Engine(str(model), batch_size=1, num_cores=threads, scheduler="single_stream")
    return lambda: engine.run([x], val_inp=False)[0]


ENGINES = {"ncnn": ncnn, "mnn": mnn, "openvino": openvino, "deepsparse": deepsparse}


def serve(engine: str, model: str, x: str, output: str, threads: str, cpus: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints must not look like an answer
    infer = ENGINES[engine](Path(model), np.load(x), int(threads))
    np.save(output, np.asarray(infer()))
    for thread in os.listdir("/proc/self/task"):  # some engines bind their threads by themselves, anywhere
        if not os.sched_getaffinity(int(thread)) <= set(map(int, cpus.split(","))):
            raise RuntimeError(f"{engine} runs on other CPUs than {cpus}")
    print(json.dumps({"version": version(engine)}), file=replies)
    burnt = time.process_time()
    for line in sys.stdin:
        idle_ms = (time.process_time() - burnt) * 1e3
        settle, calls = map(int, line.split())
        for _ in range(settle):
            infer()
        ms = Timer(infer, timer=time.perf_counter_ns).timeit(calls) / calls / 1e6  # timeit turns the collector off
        print(json.dumps({"ms": ms, "idle_ms": idle_ms}), file=replies)
        burnt = time.process_time()


if __name__ == "__main__":
    serve(*sys.argv[1:])

"""TVM: Relax's ONNX frontend and fusion, NHWC convolutions, LLVM for this CPU; plain schedules, or tuned ones.

TVM has default CPU schedules for GEMV and reductions alone; bare loops take seconds. So each fused function gets one
written here: rows in parallel, a block of pixels unrolled, channels vectorised. That is all at `tune_s` = 0.

Above that MetaSchedule tunes for so many seconds: its LLVM design space, evolutionary search and XGBoost cost model.
Turns go to the function that takes most of the network's time so far, over the turns it had. A child process does it,
which builds and times candidates in itself (TVM's builders import its tensor intrinsics anew, for 12 s and more) on
random data, and is killed when the time is spent; what it found stays in the cache, as does the time. A function keeps
its plain schedule unless a tuned one was faster there. Needs a C compiler to link.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

PACKAGE, FORM = "apache-tvm", "onnx"
REQUIREMENTS = (
    "apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post0 numpy==2.4.6 ml_dtypes==0.6.0 typing_extensions==4.16.0 "
    "onnx==1.23.2 protobuf==7.36.2 psutil==7.2.2 cloudpickle==3.1.2 scipy==1.17.1 "
    "xgboost-cpu==3.2.0"
)


def clip(cls, bb, inputs, attr, params):
    """ONNX's Clip as operators that layout conversion sees through and that fuse: Relax's own clip does not."""
    from tvm import relax

    low, high = (float(bound.value.numpy()) for bound in (inputs[1], inputs[2]))
    above = relax.op.nn.relu(inputs[0]) if low == 0 else relax.op.maximum(inputs[0], relax.const(low, "float32"))
    return relax.op.minimum(above, relax.const(high, "float32"))


def scheduled(function):
    """`function` with the default schedule. Whatever a primitive refuses is raised."""
    from tvm import s_tir

    sch = s_tir.Schedule(function)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    sums = [at for at, block in enumerate(blocks) if any(i.iter_type == 2 for i in sch.get(block).iter_vars)]
    if len(sums) > 1:
        raise ValueError("several reductions")
    at = sums[0] if sums else len(blocks) - 1
    pads = [block for block in blocks[:at] if "pad" in sch.get(block).name_hint]  # inlined, each load would branch
    for block in blocks[:at]:
        if block not in pads:
            sch.compute_inline(block)
    for block in blocks[at + 1 : -1]:
        sch.compute_inline(block)
    for pad in pads:
        loops = sch.get_loops(pad)
        sch.parallel(sch.fuse(*loops[:-2]))
    total = blocks[at] if sums else None
    last = sch.cache_write(total, 0, "global") if sums and at == len(blocks) - 1 else blocks[-1]
    loops = sch.get_loops(last)
    sizes = [int(sch.get(loop).extent) for loop in loops]
    lanes = next((n for n in (32, 16, 8, 4) if sizes[-1] % n == 0), 1)
    outer, inner = sch.split(loops[-1], [None, lanes])
    image = total is not None and len(loops) == 4
    if image:
        pixels = next(n for n in (8, 7, 6, 4, 2, 1) if sizes[2] % n == 0)
        block, pixel = sch.split(loops[2], [None, pixels])
        sch.reorder(loops[0], loops[1], outer, block, pixel, inner)
        rows, under = sch.fuse(loops[0], loops[1], outer), block
    else:
        rows = under = sch.fuse(*loops[:-1], outer)
    if sums:
        sch.compute_at(total, under, preserve_unit_loops=True)
        own = sch.get_loops(total)[2 if image else 1 :]
        spatial, reduced = own[: len(loops)], own[len(loops) :]
        sch.reorder(*reduced, *spatial)
        if image and lanes > 16:
            several, vector = sch.split(spatial[-1], [None, 16])
            sch.unroll(several)
        else:
            vector = spatial[-1]
        sch.vectorize(vector)
        if image:
            sch.unroll(spatial[2])
            sch.unroll(pixel)
    sch.vectorize(inner)
    sch.parallel(rows)
    if sums:
        sch.decompose_reduction(total, reduced[0])
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def put(path: Path, value) -> None:
    """Whole or not at all."""
    half = path.with_name(f"{path.name}.{os.getpid()}")
    half.write_text(json.dumps(value))
    os.replace(half, path)


def alone(function):
    """A module with nothing but `function`, and its name in the folder of what tuning found."""
    import tvm
    import tvm_ffi

    mod = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return mod, f"{tvm_ffi.structural_hash(mod) & (1 << 64) - 1:016x}.json"


def counts(mod) -> dict:
    """{name of a function: how often the network calls it}."""
    from tvm import relax

    calls = {}

    def visit(node):
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.call_tir":
            calls[node.args[0].name_hint] = calls.get(node.args[0].name_hint, 0) + 1

    relax.analysis.post_order_visit(mod["main"], visit)
    return calls


def tune(folder: Path) -> None:
    """Tunes what `folder`/request.json names until an alarm kills it: FUNCTION.json per function, and state.json."""
    begun, request = time.monotonic(), json.loads((folder / "request.json").read_text())
    signal.setitimer(signal.ITIMER_REAL, request["tune_s"] - request["state"]["tuning_s"])
    import numpy as np
    import tvm
    from tvm.driver import build

    sys.modules["tvm.s_tir.tensor_intrin"] = types.ModuleType("none")  # for integers, and 12 s and more to import
    from tvm.s_tir import meta_schedule as ms

    target, state = tvm.target.Target(request["target"]), request["state"]
    database, model = ms.database.MemoryDatabase(), ms.cost_model.XGBModel(num_tuning_cores=1, num_warmup_samples=32)
    before = state["tuning_s"]

    @functools.cache
    def noise(at, dtype, *shape):
        return tvm.runtime.tensor(np.random.default_rng(at).standard_normal(shape, np.float32).astype(dtype))

    def seconds(mod):
        tensors = [info.as_json()[1:] for info in ms.arg_info.ArgInfo.from_entry_func(mod)]  # of type and shape
        values = [noise(at, str(dtype), *map(int, shape)) for at, (dtype, shape) in enumerate(tensors)]
        timer = build(mod, target=target).time_evaluator("main", tvm.cpu(), number=1, repeat=3, min_repeat_ms=10)
        return list(map(float, timer(*values).results))

    def note(**more):
        state.update(more, tuning_s=round(before + time.monotonic() - begun, 1))
        put(folder / "state.json", state)

    tasks = {}
    for name, weight, source in request["functions"]:
        mod, file = alone(tvm.ir.load_json(source)["main"])
        if file in tasks:
            tasks[file]["weight"] += weight
            continue
        task = tasks[file] = {"name": name, "weight": weight, "mod": mod, "turns": 0, "path": folder / file}
        if not task["path"].exists():
            try:
                plain = min(seconds(alone(scheduled(mod["main"]))[0]))
            except Exception:  # bare loops
                plain = None
            put(task["path"], {"name": name, "plain_s": plain, "tuned_s": None, "tuned": None})
        task["found"] = json.loads(task["path"].read_text())
        note()

    def worth(task):
        best = min(filter(None, (task["found"]["plain_s"], task["found"]["tuned_s"])), default=0.01)
        return task["weight"] * best / (1 + task["turns"])

    while task := max((task for task in tasks.values() if task["turns"] >= 0), key=worth, default=None):
        if "context" not in task:
            kinds = ms.ScheduleRule.create("llvm"), ms.Postproc.create("llvm"), ms.Mutator.create("llvm")
            space = ms.space_generator.PostOrderApply(None, *kinds)
            search = ms.search_strategy.EvolutionarySearch(
                population_size=64, init_measured_ratio=0.25, init_min_unmeasured=32, genetic_num_iters=2
            )
            task["context"] = ms.TuneContext(
                task["mod"], target=target, space_generator=space, search_strategy=search, num_threads=1
            )
            task["context"].pre_tuning(1 << 20, 8, None, database, model)
            task["workload"] = database.commit_workload(task["mod"])
        candidates = task["context"].generate_measure_candidates()
        if not candidates:
            task["turns"] = -1
            continue
        results = []
        for candidate in candidates:
            try:
                results.append(ms.runner.RunnerResult(seconds(candidate.sch.mod), None))
            except Exception as error:
                results.append(ms.runner.RunnerResult(None, str(error)))
                print(task["name"], str(error).strip().splitlines()[-1:], flush=True)
                continue
            took = list(map(float, results[-1].run_secs))
            if min(took) < (task["found"]["tuned_s"] or 1e9):
                task["found"] |= {"tuned_s": min(took), "tuned": tvm.ir.save_json(candidate.sch.mod)}
                put(task["path"], task["found"])
            record = candidate.sch.trace, task["workload"], took, target, candidate.args_info
            database.commit_tuning_record(ms.database.TuningRecord(*record))
        task["context"].notify_runner_results(candidates, results)
        model.update(task["context"], candidates, results)
        task["turns"] += 1
        note(trials=state["trials"] + len(candidates))


def tuned(mod, target: dict, folder: Path, tune_s: float) -> dict:
    """Tunes `mod`'s functions for what is left of `tune_s`. How often it ended early is in what it returns."""
    import tvm

    folder.mkdir(exist_ok=True)
    path, often = folder / "state.json", counts(mod)
    functions = [
        [name.name_hint, often.get(name.name_hint, 0), tvm.ir.save_json(alone(function)[0])]
        for name, function in mod.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc)
    ]
    while True:
        state = json.loads(path.read_text()) if path.exists() else {"tuning_s": 0.0, "trials": 0, "crashes": 0}
        if state["tuning_s"] >= tune_s or state["crashes"] > 9:
            return state
        put(folder / "request.json", {"target": target, "functions": functions, "state": state, "tune_s": tune_s})
        begun = time.monotonic()
        end = subprocess.run([sys.executable, "-I", __file__, folder], stdin=subprocess.DEVNULL).returncode
        spent = round(state["tuning_s"] + time.monotonic() - begun, 1)
        state = (json.loads(path.read_text()) if path.exists() else state) | {"tuning_s": spent}
        put(path, state | {"crashes": state["crashes"] + (end not in (0, -signal.SIGALRM))})
        if end == 0:
            return state


def load(model: Path, x, threads: int, cache: Path, tune_s: int = 0):
    import hashlib

    # Read when TVM's own threads start.
    os.environ |= {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0", "TVM_THREAD_POOL_SPIN_COUNT": "0"}
    import tvm
    from tvm import relax

    target = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": threads}
    key = hashlib.sha256(model.read_bytes() + Path(__file__).read_bytes())
    key.update(f"{REQUIREMENTS} {target} {tune_s}".encode())
    folder = cache / key.hexdigest()[:24]
    library, told = (cache / f"{folder.name}.{end}" for end in ("so", "json"))
    if not library.exists():
        import onnx
        from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

        onnx_frontend.Clip._impl_v13 = classmethod(clip)
        passes, missed, faster = relax.transform, [], 0
        mod = passes.DecomposeOpsForInference()(from_onnx(onnx.load(str(model))))
        mod = passes.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]})(passes.CanonicalizeBindings()(mod))
        with tvm.target.Target(target):
            mod = relax.get_pipeline("zero")(mod)
        say = {"schedules": "plain, ours", "trials": 0, "tuning_s": 0}
        if tune_s > 0:
            say |= {"schedules": "MetaSchedule's where faster than ours"} | tuned(mod, target, folder, tune_s)
        functions = {n: f for n, f in mod.functions.items() if isinstance(f, tvm.tirx.PrimFunc)}
        for name, function in functions.items():
            found = folder / alone(function)[1]
            found = json.loads(found.read_text()) if found.exists() else {"tuned_s": None}
            if found["tuned_s"] and found["tuned_s"] < 0.97 * (found["plain_s"] or 1e9):
                made = tvm.ir.load_json(found["tuned"])["main"].with_attr("tirx.is_scheduled", True)
                mod.update_func(name, made.with_attr("global_symbol", name.name_hint))
                faster += 1
                continue
            try:
                mod.update_func(name, scheduled(function))
            except Exception as error:  # bare loops are right too, but slow: the row says which
                missed.append(name.name_hint)
                print(name.name_hint, str(error).strip().splitlines()[-1])
        tvm.compile(mod, target=tvm.target.Target(target)).export_library("made.so")
        put(told, say | {"tuned_functions": faster, "functions": len(functions), "bare_loops": missed})
        half = library.with_name(f"{library.name}.{os.getpid()}")
        half.write_bytes(Path("made.so").read_bytes())
        os.replace(half, library)
    machine, value = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu()), tvm.runtime.tensor(x)

    def infer():
        return machine["main"](value).numpy()

    infer.settings = target | {"layout": "NHWC"} | json.loads(told.read_text())
    return infer


if __name__ == "__main__":
    tune(Path(sys.argv[1]))

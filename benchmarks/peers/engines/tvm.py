"""TVM, untuned: Relax's ONNX frontend and fusion, NHWC convolutions, LLVM for this CPU, plain schedules written here.

TVM has default CPU schedules for GEMV and reductions alone; bare loops take seconds. So each fused function gets one:
rows in parallel, a block of pixels unrolled, channels vectorised. This is not what its tuner would find. There is no
tuning here: MetaSchedule is in the wheel, but its TuneContext ended in a segmentation fault or did not return when
tried; the cause is not known. Needs a C compiler to link.
"""

from pathlib import Path

PACKAGE, FORM = "apache-tvm", "onnx"
REQUIREMENTS = (
    "apache-tvm==0.27.0.post1 apache-tvm-ffi==0.1.14.post0 numpy==2.4.6 ml_dtypes==0.6.0 typing_extensions==4.16.0 "
    "onnx==1.23.2 protobuf==7.36.2 psutil==7.2.2 cloudpickle==3.1.2 scipy==1.17.1"
)


def clip(cls, bb, inputs, attr, params):
    """ONNX's Clip as Relax's operator: the frontend's own emits loops that no layout conversion sees through."""
    from tvm import relax

    low, high = (float(bound.value.numpy()) for bound in (inputs[1], inputs[2]))
    return relax.op.clip(inputs[0], low, high)


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


def load(model: Path, x, threads: int, cache: Path, tune_s: int = 0):
    if tune_s > 0:
        raise ValueError(f"Expected tune_s=0, as tuning with MetaSchedule is not supported here. Got {tune_s}.")
    import hashlib
    import json
    import os

    # Read when TVM's own threads start.
    os.environ |= {"TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0", "TVM_THREAD_POOL_SPIN_COUNT": "0"}
    import tvm
    from tvm import relax

    target = {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu(), "num-cores": threads}
    key = hashlib.sha256(model.read_bytes() + Path(__file__).read_bytes())
    key.update(f"{REQUIREMENTS} {target}".encode())
    library, told = (cache / f"{key.hexdigest()[:24]}.{end}" for end in ("so", "json"))
    if not library.exists():
        import onnx
        from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

        onnx_frontend.Clip._impl_v13 = classmethod(clip)
        passes, missed = relax.transform, []
        mod = passes.DecomposeOpsForInference()(from_onnx(onnx.load(str(model))))
        mod = passes.ConvertLayout({"relax.nn.conv2d": ["NHWC", "HWIO"]})(passes.CanonicalizeBindings()(mod))
        with tvm.target.Target(target):
            mod = relax.get_pipeline("zero")(mod)
        for name, function in list(mod.functions.items()):
            if isinstance(function, tvm.tirx.PrimFunc):
                try:
                    mod.update_func(name, scheduled(function))
                except Exception as error:  # bare loops are right too, but slow: the row says which
                    missed.append(name.name_hint)
                    print(name.name_hint, str(error).strip().splitlines()[-1])
        tvm.compile(mod, target=tvm.target.Target(target)).export_library("made.so")
        told.write_text(json.dumps(missed))
        half = library.with_name(f"{library.name}.{os.getpid()}")
        half.write_bytes(Path("made.so").read_bytes())
        os.replace(half, library)
    machine, value = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu()), tvm.runtime.tensor(x)

    def infer():
        return machine["main"](value).numpy()

    infer.settings = target | {"layout": "NHWC", "schedules": "plain, ours", "trials": 0, "tuning_s": 0}
    infer.settings["bare_loops"] = json.loads(told.read_text())
    return infer

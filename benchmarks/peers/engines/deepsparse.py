"""DeepSparse, the engine for pruned weights that ended in 2025: closed, for evaluation only, Python 3.8 to 3.11.

Its analytics are switched off (`NM_DISABLE_ANALYTICS`).
"""

from pathlib import Path

PACKAGE, FORM, NEWEST_PYTHON = "deepsparse", "onnx", 11
REQUIREMENTS = (
    "deepsparse==1.8.0 sparsezoo==1.8.1 numpy==1.26.4 onnx==1.14.1 protobuf==3.20.3 setuptools==65.5.0 "
    "pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-extensions==4.16.0 typing-inspection==0.4.5 "
    "PyYAML==6.0.3 tqdm==4.70.1 requests==2.34.2 certifi==2026.10.18 charset-normalizer==3.5.2 idna==3.20 "
    "urllib3==2.8.0 click==8.5.1 geocoder==1.38.1 ratelim==0.1.6 decorator==5.3.1 six==1.17.0 py-machineid==1.0.0"
)


def load(model: Path, x, threads: int, cache: Path):
    from deepsparse import Engine

    engine = Engine(str(model), batch_size=1, num_cores=threads, scheduler="single_stream")

    def infer():
        return engine.run([x], val_inp=False)[0]

    infer.settings = {"scheduler": "single_stream"}
    return infer

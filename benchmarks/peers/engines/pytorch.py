"""PyTorch, eager or through `torch.compile` (Inductor: generated C++, oneDNN), in the project's own environment."""

from pathlib import Path

PACKAGE, REQUIREMENTS, FORM = "torch", "", "safetensors"


def load(model: Path, x, threads: int, cache: Path, compiled: bool = False):
    import safetensors
    import torch

    from nbs_lib.models import build, load_checkpoint

    torch.set_num_threads(threads)
    with safetensors.safe_open(model, "pt") as file:
        name = file.metadata()["network"]
    network = load_checkpoint(build(name), model).eval().requires_grad_(False)
    image, settings = torch.from_numpy(x), {"mode": "eager"}
    if compiled:
        # Weights become constants, so that batch norm folds and convolutions are packed once.
        settings = {"mode": "torch.compile", "freezing": True}
        import torch._inductor.config as inductor

        inductor.freezing = True
        network = torch.compile(network)

    def infer():
        with torch.no_grad():
            return network(image).numpy()

    infer.settings = settings
    return infer

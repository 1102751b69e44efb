"""A network of one's own, by name: ours, torchvision's, or what a function in any module or file gives."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from types import ModuleType

from torch import nn

from nbs_lib.models import MODELS, imagenet


def find_model(name: str, **options) -> nn.Module:
    """A new network: of `MODELS`, a classifier of torchvision's, or what a factory gives: "package.module:function", or
    "folder/file.py:function"; options go to the factory.

    Raises ValueError for a module, file, function or name that is not there, or cannot be imported, and TypeError for
    options the factory does not take, and for a factory that gives no torch.nn.Module. What the factory itself raises
    is left as it is."""
    module, _, function = name.rpartition(":")
    make = _function(module, function) if module else _known(name)
    with suppress(ValueError):  # a callable written in C may have no signature
        signature = inspect.signature(make)
        try:
            signature.bind(**options)
        except TypeError as error:
            raise TypeError(f"Expected options that {name} takes. Got {options}: {error}") from error
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected {name} to give a torch.nn.Module. Got {type(model).__name__}.")
    return model


@contextmanager
def parameter(name: str, value: object) -> Iterator[None]:
    """Errors inside become a ValueError that names the parameter they come from."""
    try:
        yield
    except Exception as error:  # whatever a user's own code may raise
        told = error.args[0] if isinstance(error, KeyError) and error.args else str(error) or type(error).__name__
        raise ValueError(f"Parameter {name} = {value!r}: {told}") from error


def _known(name: str) -> Callable[..., nn.Module]:
    known = [*MODELS, *imagenet.list_models(module=imagenet)]
    if name not in known:
        alike = get_close_matches(name, known, 5) or list(MODELS)
        rule = "Expected package.module:function, folder/file.py:function or a network's name"
        raise ValueError(f"{rule}, such as {', '.join(alike)}. Got {name!r}.")
    return MODELS.get(name) or imagenet.get_model_builder(name)


def _function(module: str, function: str) -> Callable[..., nn.Module]:
    try:
        loaded = _load(Path(module).expanduser()) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:  # whatever the module runs when it is imported
        rule = "Expected a module that can be imported (PYTHONPATH names further folders), or a Python file."
        raise ValueError(f"{rule} Got {module!r}: {type(error).__name__}: {error}") from error
    if not callable(made := getattr(loaded, function, None)):
        known = [key for key, value in vars(loaded).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"Expected a function of {module}: {', '.join(known) or 'it has none'}. Got {function!r}.")
    return made


def _load(file: Path) -> ModuleType:
    """The module in a file, read anew, under a name that no other module has; it may import what lies beside it."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file.resolve()}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    names = (f"own_{file.stem}{number or ''}" for number in count())  # a calendar.py must not pass for Python's own
    name = next(name for name in names if name not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pickled classes look for their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

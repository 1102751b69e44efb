"""`trace`: a PyTorch module through `torch.export` into a `Graph`. What depends on no input is computed here, once."""

import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from functools import partial
from textwrap import shorten

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from nbs_lib.layers.graph import Graph, LayerSpec, Node
from nbs_lib.layers.operators import IDENTITIES, READ_CONSTANTS, RULES

SYMBOLS = torch.SymInt | torch.SymFloat | torch.SymBool


def trace(model: nn.Module, example_inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> Graph:
    """The graph of `model` for inputs like `example_inputs` (float32 or integers), batch first, with eval semantics.

    The model is left as it was, and what happens to it later does not reach the graph. Raises TypeError for what is no
    module or no tensor, and ValueError, with module and operator named, for what cannot be exported."""
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module. Got {type(model).__name__}.")
    if not isinstance(inputs, tuple | list) or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise TypeError(f"Expected example_inputs to be a tensor or a tuple of tensors. Got {type(inputs).__name__}.")
    if wrong := [x.dtype for x in inputs if x.dtype != torch.float32 and (x.is_floating_point() or x.is_complex())]:
        raise ValueError(f"Expected float32 example_inputs. Got {wrong[0]}.")
    with _evaluating(model), torch.no_grad():
        return _Lowering(model, _export(model, tuple(x.detach().contiguous() for x in inputs))).graph()


@contextmanager
def _evaluating(model: nn.Module):
    """Eval mode inside; afterwards all modules have their own attributes back (tracing leaves fake tensors in some)."""
    saved = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _export(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    logged = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # before it raises, torch logs tracebacks and prints the graph so far
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", ".*assigned during export", UserWarning)  # and restored afterwards
            return torch.export.export(model, inputs, strict=False).run_decompositions({})
    except Exception as error:  # whatever the model's own forward may raise
        rule = f"Expected a model that torch.export takes with inputs of shape {[tuple(x.shape) for x in inputs]}."
        reason = f"{type(error).__name__}: {shorten(str(error).strip().partition(chr(10))[0], 300)}"
        raise ValueError(f"{rule} Got {reason} ({_place(model, error)}).") from error
    finally:
        logging.disable(logged)


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost module and operator on the error's way, as far as its frames tell."""
    names = {id(module): f"{name!r} ({type(module).__name__})" for name, module in model.named_modules()}
    module, function = names[id(model)], "unknown"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = names.get(id(frame.f_locals.get("self")), module)
        if frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__"):
            function = getattr(frame.f_locals.get("func"), "__name__", function)
    return f"in module {module}, operator {function}"


class _Lowering:
    """One walk over an exported program: constants are folded, every other value becomes a node."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram):
        self.program, self.state = program, program.state_dict | program.constants
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(module): name for name, module in model.named_modules()}
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.paths: dict[tuple, str] = {}  # where a constant lies in memory -> path of the parameter it copies
        self.nodes: dict[fx.Node, Node] = {}
        self.layers: dict[str, LayerSpec] = {}

    def graph(self) -> Graph:
        signature, (*body, end) = self.program.graph_signature, self.program.graph.nodes
        if state := list(signature.buffers_to_mutate.values()):
            raise ValueError(f"Expected a model that changes no buffers in eval mode. Got changes of {state}.")
        results = zip(signature.output_specs, end.args[0], strict=True)
        end.args = (results := [result for spec, result in results if spec.kind.name == "USER_OUTPUT"],)
        self.program.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node, spec in zip(body, signature.input_specs, strict=False):
            if spec.target is None:
                self.add(node, "input", lambda value: value)
            elif node.users:
                self.constants[node] = self.state[spec.target].detach().clone(memory_format=torch.contiguous_format)
                self.paths[_memory(self.constants[node])] = spec.target
        inputs = list(self.nodes.values())
        self.batch = next((node.shape[0] for node in inputs if node.shape), 1)
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.lower(node)
        outputs = tuple(self.value(result).name for result in results if isinstance(result, fx.Node))
        others = {i: result for i, result in enumerate(results) if not isinstance(result, fx.Node)}
        nodes, names = list(dict.fromkeys(self.nodes.values())), tuple(node.name for node in inputs)
        return Graph(nodes, self.layers, names, outputs, self.program.call_spec.out_spec, others)

    def lower(self, node: fx.Node) -> None:
        sources, name = node.all_input_nodes, _name(node)
        leaves = pytree.tree_leaves(node.meta.get("val"))
        sizes = [size for leaf in leaves for size in getattr(leaf, "shape", [leaf])]
        if node.op == "get_attr" or any(isinstance(size, SYMBOLS) for size in sizes):
            name = _name(next(iter(node.users))) if node.op == "get_attr" else name  # the branches of torch.cond
            rule = "Expected shapes and control flow that do not depend on the input's values."
            raise ValueError(f"{rule} Got operator {name} in module {_module(node)!r}.")
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not random and all(source in self.constants for source in sources):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.constants.get)
            self.constants[node] = node.target(*args, **kwargs)
        elif name == "getitem" and self.nodes[sources[0]].shape is not None:
            self.nodes[node] = self.nodes[sources[0]]  # a vocabulary node gives its operator's first output alone
        elif name in IDENTITIES and sources[0] in self.nodes and _layout(node) == _layout(sources[0]):
            self.nodes[node] = self.nodes[sources[0]]
        else:
            op, attrs = self.rule(node, name) or (f"torch:{name}", {})
            layer = self.layer(node, attrs) if op in ("conv2d", "linear") else None
            self.emit(node, op, {} if layer else attrs, layer)

    def rule(self, node: fx.Node, name: str) -> tuple[str, dict] | None:
        """The vocabulary's op and attributes; it speaks of float32 only, and of an operator's first output only."""
        if name not in RULES or any(_name(user) == "getitem" and user.args[1] for user in node.users):
            return None
        output = _first(node.meta["val"])
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.constants.get(n, n.meta["val"]))
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            return None
        named = {argument.name: argument.default_value for argument in node.target._schema.arguments}
        return RULES[name](name, named | dict(zip(named, args, strict=False)) | kwargs, output)

    def emit(self, node: fx.Node, op: str, attrs: dict, layer: LayerSpec | None) -> None:
        """Add an operator's node: the constants it reads are bound in its call, or nodes of their own."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        bound = {} if op in READ_CONSTANTS else self.constants
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node) and leaf not in bound]
        inputs = tuple(self.value(leaves[i]).name for i in slots)
        leaves = [bound.get(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        fallback = op.startswith("torch:")
        take_first = not fallback and not isinstance(node.meta["val"], torch.Tensor)

        def call(*tensors):
            filled = list(leaves)
            for slot, tensor in zip(slots, tensors, strict=True):
                filled[slot] = tensor
            args, kwargs = pytree.tree_unflatten(filled, spec)
            return target(*args, **kwargs)[0] if take_first else target(*args, **kwargs)

        target, macs = node.target, _count_macs(node) if fallback else 0
        if layer:
            macs = layer.params // layer.P * node.meta["val"].numel()
        self.add(node, op, call, inputs, attrs, layer, macs)

    def add(self, node: fx.Node, op: str, call: Callable, inputs=(), attrs=None, layer=None, macs=0) -> None:
        output = node.meta["val"] if op.startswith("torch:") else _first(node.meta["val"])
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
        name = layer.name if layer else None
        self.nodes[node] = Node(node.name, op, inputs, attrs or {}, shape, name, _module(node), macs, call)

    def value(self, node: fx.Node) -> Node:
        if node not in self.nodes:  # a constant, read as a value
            tensor = self.constants[node]
            self.add(node, "constant", lambda: tensor, attrs={"value": tensor.numpy()})
        return self.nodes[node]

    def layer(self, node: fx.Node, fields: dict) -> LayerSpec:
        """The LayerSpec of this call: that of an earlier call with the same weights and window, or a new one."""
        (P, Q, Kh, Kw), name = (*fields["weight"].shape, 1, 1)[:4], self.layer_name(node, fields["weight"])
        positions = node.meta["val"].numel() // P // self.batch
        H, W = (positions, 1) if fields["kind"] == "linear" else node.meta["val"].shape[2:]
        fields |= {key: fields[key].contiguous().numpy() for key in ("weight", "bias") if fields[key] is not None}
        sizes, old = dict(P=P, Q=Q, Kh=Kh, Kw=Kw, H=H, W=W, uneven=positions - H * W), self.layers.get(name)
        new = LayerSpec(name=name, calls=1, **sizes, **fields)
        if old and all(np.array_equal(getattr(old, key), fields[key]) for key in fields):
            new = replace(old, calls=old.calls + 1, uneven=old.uneven + positions - old.H * old.W)
        elif old:
            new = replace(new, name=node.name)
        self.layers[new.name] = new
        return new

    def layer_name(self, node: fx.Node, weight: torch.Tensor) -> str:
        """The module that owns the weight, the path of a bare parameter, or the module that uses a computed weight."""
        path, module = self.paths.get(_memory(weight)), self.modules.get(_module(node))
        if path and path.rpartition(".")[2] != "weight":
            return path
        if path and getattr(module, "weight", None) is not self.state[path]:
            module = self.modules.get(path.rpartition(".")[0])
        return self.names.get(id(module)) or path or node.name


def _count_macs(node: fx.Node) -> int:
    """Multiply-adds from shapes alone; 0 for an operator that PyTorch cannot run without data."""
    blank = partial(pytree.tree_map_only, torch.Tensor, partial(torch.empty_like, device="meta"))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: blank(n.meta["val"]))
    with FlopCounterMode(display=False) as counter, suppress(RuntimeError):
        node.target(*args, **kwargs)
    return counter.get_total_flops() // 2


def _layout(node: fx.Node) -> tuple:
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def _memory(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else getattr(node.target, "__name__", str(node.target))


def _module(node: fx.Node) -> str:
    """Dotted path of the innermost module the node ran in; export marks a second run as `path@1`."""
    stack = node.meta.get("nn_module_stack")
    return re.sub(r"@\d+", "", [*stack.values()][-1][0]) if stack else ""

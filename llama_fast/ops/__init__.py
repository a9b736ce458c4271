"""The op table: each module that declares an `OP` is one, and the function of its name the op's
public face."""

from importlib import import_module
from pkgutil import iter_modules

from .quantized_weight import QuantizedWeight

_modules = [import_module(f".{found.name}", __name__) for found in iter_modules(__path__)]
_functions = {
    module.OP.name: getattr(module, module.OP.name) for module in _modules if hasattr(module, "OP")
}
globals().update(_functions)  # over the modules of the same names

__all__ = ["QuantizedWeight", *sorted(_functions)]

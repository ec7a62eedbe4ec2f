"""Keeps a library's optional helpers (plots, meshes) from being imported until something really uses them."""

import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Iterator

_lock = threading.RLock()


class _Deferred(types.ModuleType):
    """Stands for a module; the first attribute read imports the real one, and every read is answered by it."""

    def __getattr__(self, attribute: str):
        # The import system probes modules for __path__ and the like; answering would be a use.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        with _lock:
            _withdraw()
            return getattr(importlib.import_module(self.__name__), attribute)


def _withdraw() -> None:
    for name, module in list(sys.modules.items()):
        if type(module) is _Deferred:
            del sys.modules[name]


@contextlib.contextmanager
def deferred_imports(*names: str, annotations: tuple[str, ...] = ()) -> Iterator[None]:
    """Inside the block, importing one of ``names`` binds a stand-in that imports the real module on first use.

    ``annotations`` are dotted names that the imported code reads only to annotate its functions; inside the block they
    are ``object``, because reading them would already be a use.

    Modules that are already loaded are left alone, and after the block ``sys.modules`` holds no stand-in, so that
    everybody else gets the real module from an import as always. Name every sub-module that the block imports.
    ``importlib.util.LazyLoader`` does not serve here: the second ``import`` statement of a module reads its
    ``__spec__``, and that already loads it.
    """
    with _lock:
        for name in names:
            if name not in sys.modules:
                sys.modules[name] = _Deferred(name)
        for name in names:
            parent, _, child = name.rpartition(".")
            if parent and type(sys.modules.get(parent)) is _Deferred and type(sys.modules[name]) is _Deferred:
                sys.modules[parent].__dict__[child] = sys.modules[name]
        annotated = [(sys.modules[module], name) for module, _, name in (a.rpartition(".") for a in annotations)]
        annotated = [(module, name) for module, name in annotated if type(module) is _Deferred]
        for module, name in annotated:
            module.__dict__[name] = object
        try:
            yield
        finally:
            for module, name in annotated:
                del module.__dict__[name]
            _withdraw()

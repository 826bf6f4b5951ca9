"""Help without the packages that a command needs: stand-ins, with which its module can be imported but not run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGES = ("mlx", "numpy", "sentencepiece", "tokenizers", "huggingface_hub", "safetensors", "filelock", "yaml")


@contextmanager
def stand_ins() -> Iterator[None]:
    """Within this context, the packages that this one depends on can be imported whether they are installed or not.

    Modules of this package that are imported here are forgotten afterwards, so that nothing computes with stand-ins.
    """
    before = dict(sys.modules)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("mlx_openelm", *_PACKAGES):
                del sys.modules[name]


class _Anything(type):
    """A metaclass whose classes can be called, indexed, combined and derived from, as types in signatures are."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn

    def __call__(cls, *args: Any, **named: Any) -> Any:
        return _StandIn

    def __getitem__(cls, index: Any) -> Any:
        return _StandIn

    def __or__(cls, other: Any) -> Any:
        return _StandIn

    def __ror__(cls, other: Any) -> Any:
        return _StandIn


class _StandIn(metaclass=_Anything):
    """Stands in for every function, class and value of a package."""


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012, as of every package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in _PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass

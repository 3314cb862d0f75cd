"""Importing the audiocraft package beside a current stack.

audiocraft 1.3.0 pins versions that no longer install, so it is installed without its dependencies. What it
imports without needing it for MusicGen (readers of audio files, spaCy, xformers) may then be absent, or be a
build for another torch.
"""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from transformers import RobertaTokenizer, T5Tokenizer

INSTALL = (
    'pip install "einops>=0.7" "flashy>=0.0.2" "julius>=0.2.7" "omegaconf>=2.3" && '
    "pip install --no-deps audiocraft==1.3.0"
)
"""What to run: the extra `audiocraft`, and the package itself without the versions that it pins."""

# What audiocraft imports at its own import, and MusicGen with text does not call.
_UNNEEDED = ("torchaudio", "av", "spacy", "num2words", "librosa", "torchmetrics", "xformers")
_SUBMODULES = ("torchaudio.transforms",)
# Asked for again whenever an attention runs, so that it stays.
_STAYS = "xformers"


def import_audiocraft() -> ModuleType:
    """The audiocraft package, with placeholders for what it imports and text-conditioned MusicGen never calls.

    The placeholders vanish again after the import, so that no other library believes in them; only that for
    xformers stays, which audiocraft asks for whenever it attends.

    Raises:
        ImportError: it is not installed, or not completely; the message says what to run.
    """
    if "audiocraft.models" in sys.modules:
        return sys.modules["audiocraft"]
    if importlib.util.find_spec("audiocraft") is None:
        raise ImportError(f"audiocraft is not installed; run: {INSTALL}", name="audiocraft")
    assert T5Tokenizer and RobertaTokenizer  # imported before any placeholder could mislead transformers
    before = set(sys.modules)
    placed = [name for name in _UNNEEDED if not _importable(name)]
    for name in placed:
        _place(name)
    try:
        audiocraft = importlib.import_module("audiocraft")
    except BaseException as error:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("audiocraft", *placed):
                del sys.modules[name]
        if isinstance(error, ImportError | OSError):
            raise ImportError(
                f"audiocraft is installed, but cannot be imported ({error}); run: {INSTALL}",
                name="audiocraft",
            ) from error
        raise
    for name in placed:
        for loaded in [module for module in sys.modules if module.split(".")[0] == name != _STAYS]:
            del sys.modules[loaded]
    return audiocraft


class _MissingType(type):
    def __getattr__(cls, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _missing(f"{cls.full_name}.{attribute}")


class _Missing(metaclass=_MissingType):
    """Stands for a class, function or module of a package that is not there; calling it says which."""

    full_name = "it"

    def __init__(self, *_: Any, **__: Any):
        raise ImportError(
            f"audiocraft needs {self.full_name} for this, which is not installed (MusicGen with text does not)"
        )


def _missing(full_name: str) -> type:
    return _MissingType(full_name.rpartition(".")[2], (_Missing,), {"full_name": full_name})


class _Placeholder(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _missing(f"{self.__name__}.{attribute}")


def _importable(name: str) -> bool:
    """Whether a real package is there and works; a build for another torch raises OSError."""
    if name in sys.modules:
        return True
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
        if name == _STAYS:
            importlib.import_module("xformers.ops")
    except (ImportError, OSError, RuntimeError):
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[loaded]
        return False
    return True


def _place(name: str) -> None:
    module = _Placeholder(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []  # type: ignore[attr-defined]
    sys.modules[name] = module
    for submodule in _SUBMODULES:
        if submodule.startswith(f"{name}."):
            sys.modules[submodule] = _Placeholder(submodule)
    if name == _STAYS:
        operations = ModuleType("xformers.ops")
        operations.unbind = torch.unbind  # type: ignore[attr-defined]
        operations.memory_efficient_attention = _unsupported_attention  # type: ignore[attr-defined]
        operations.LowerTriangularMask = _LowerTriangularMask  # type: ignore[attr-defined]
        module.ops = operations  # type: ignore[attr-defined]
        sys.modules["xformers.ops"] = operations


class _LowerTriangularMask:
    """Its presence is what makes audiocraft's attention causal; None in its place would not."""


def _unsupported_attention(*_: Any, **__: Any) -> Any:
    raise ImportError(
        "audiocraft was told to attend with xformers, which is not installed; call "
        "audiocraft.modules.transformer.set_efficient_attention_backend('torch')"
    )

"""A configuration as AudioCraft stores it: YAML text in which `${a.b}` refers to other entries."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{([^${}]+)\}")
_MISSING = object()


class StoredConfig:
    """A configuration whose references are followed when a value is asked for.

    Following them late matters: a training configuration refers to machines, dates and environment
    variables, none of which decides anything here.

    Args:
        text: YAML as AudioCraft stores it, or the mapping itself.
        name: what messages call it.

    Raises:
        ValueError: not YAML, or not a mapping.
    """

    def __init__(self, text: str | Mapping[str, Any], name: str):
        self.name = name
        try:
            self.values = yaml.safe_load(text) if isinstance(text, str) else dict(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{name}: its configuration is not valid YAML ({error})") from error
        if not isinstance(self.values, dict):
            raise ValueError(f"{name}: its configuration is a {type(self.values).__name__}, not a mapping")

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path with its references followed; `default` where there is none."""
        found = self._find(path)
        return default if found is _MISSING else self._resolve(found, path, ())

    def require(self, path: str) -> Any:
        """The value at a dotted path.

        Raises:
            ValueError: it is not there.
        """
        value = self.get(path, _MISSING)
        if value is _MISSING or value in (None, "???"):
            raise ValueError(f"{self.name}: its configuration lacks {path}; export the checkpoint again")
        return value

    def _find(self, path: str) -> Any:
        value: Any = self.values
        for part in path.split("."):
            if isinstance(value, str):  # a reference to a whole section
                value = self._resolve(value, path, ())
            if not isinstance(value, Mapping) or part not in value:
                return _MISSING
            value = value[part]
        return value

    def _resolve(self, value: Any, path: str, seen: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._resolve(item, f"{path}.{key}", seen) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, path, seen) for item in value]
        if not isinstance(value, str):
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return self._follow(whole.group(1), path, seen)
        return _REFERENCE.sub(lambda match: str(self._follow(match.group(1), path, seen)), value)

    def _follow(self, target: str, path: str, seen: tuple[str, ...]) -> Any:
        found = self._find(target) if target not in seen else _MISSING
        if found is _MISSING:
            raise ValueError(
                f"{self.name}: {path} in its configuration refers to ${{{target}}}, which cannot be resolved; "
                "export the checkpoint again where it was trained, with OmegaConf.resolve(cfg) before"
            )
        return self._resolve(found, path, (*seen, target))

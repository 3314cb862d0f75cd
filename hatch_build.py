"""What hatch does beside pyproject.toml: a wheel takes the recipes along, an editable install has them in the clone."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Recipes(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # a copy beside the clone's would be found first, or grow old
            return
        recipes = Path(self.root) / "recipes"
        for path in (path for pattern in self.config["recipes"] for path in recipes.glob(pattern)):
            place = path.relative_to(recipes).as_posix()
            build_data["force_include"][str(path)] = f"diverse_cfg/assets/recipes/{place}"

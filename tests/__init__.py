"""A regular package, so that no `tests` that a dependency installs (flashy does) can take its place."""

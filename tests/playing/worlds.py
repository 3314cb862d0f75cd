"""Two students of the shipped base between which variety grows, made in a second."""

from safetensors.torch import load_file, save_file

from diverse_cfg.assets import nano_path
from diverse_cfg.provenance import Provenance, write_provenance


def save_students(folder):
    """Two folders: nano with sharpened heads, whose clips are alike, and nano as it is.

    Returns:
        Their paths, the quality student's first.
    """
    weights = load_file(nano_path() / "model.safetensors")
    paths = []
    for name, factor in (("quality", 40.0), ("diversity", 1.0)):
        path = folder / name
        path.mkdir(parents=True)
        for file in nano_path().iterdir():
            if file.suffix == ".json":
                (path / file.name).write_bytes(file.read_bytes())
        changed = {key: value * factor if "lm_heads" in key else value for key, value in weights.items()}
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        sampling = {"temperature": 1.0, "top_k": 0, "num_frames": 75}
        write_provenance(path, Provenance("student", str(nano_path()), 3.0, sampling=sampling))
        paths.append(str(path))
    return paths

"""Write the frozen AudioCraft checkpoints of `tests/policies/data/audiocraft`, and what AudioCraft makes of them.

    python -m tests.policies.make_audiocraft_fixture

Needs the real audiocraft 1.3.0 (see recipes/audiocraft.md). The files are committed, so that machines without
it still compare with it; make them anew only when the checkpoints of the tests change.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from tests.policies.audiocraft_world import MONO, STEREO, expectation, write_checkpoint

DATA = Path(__file__).parent / "data" / "audiocraft"


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    for name, size in (("mono", MONO), ("stereo", STEREO)):
        folder = write_checkpoint(DATA / name, size)
        tensors = {key: tensor.contiguous() for key, tensor in expectation(folder, size).items()}
        save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main()

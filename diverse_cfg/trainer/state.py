"""What a run remembers besides weights and optimiser, written beside a checkpoint's other files as
safetensors.

| file | content |
|---|---|
| `averaged_weights.safetensors` | the moving average of the trained weights |
| `diversity_state.safetensors` | micro-batch counter, prefix regression, running gradient norm |
| `rollout_buffer_R.safetensors` | clips of process R that were sampled and are still to be trained on |

With these a killed run continues exactly, also when it was saved between two updates on the same clips.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diverse_cfg.atomic import replacing

AVERAGE_FILE = "averaged_weights.safetensors"
STATE_FILE = "diversity_state.safetensors"
BUFFER_FILE = "rollout_buffer_{rank}.safetensors"


def last_checkpoint(output_dir: str | os.PathLike, before: int | None = None) -> str | None:
    """The newest complete checkpoint of a run, or the newest before a step; None without one.

    It is written beside its place. Older versions of this package wrote it there, `trainer_state.json` last.
    """
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    numbers = {int(path.name.removeprefix("checkpoint-")): path for path in found if path.name[11:].isdigit()}
    numbers = {number: path for number, path in numbers.items() if before is None or number < before}
    return str(numbers[max(numbers)]) if numbers else None


def check_checkpoint(folder: str | os.PathLike, needed: Sequence[str]) -> None:
    """Look at every file of a checkpoint before a run continues from it.

    Args:
        folder: of the checkpoint.
        needed: names of files without which a run would not continue as it was.

    Raises:
        ValueError: a file is missing or damaged; it is named, and so is the checkpoint before.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"{folder} has no {STATE_FILE}: it was not written by this trainer, or with save_only_model"
        )
    wrong = [f"{folder / name} is missing" for name in needed if not (folder / name).is_file()]
    wrong += [f"{path} is damaged" for path in sorted(folder.iterdir()) if not is_whole(path)]
    if wrong:
        raise ValueError(f"{wrong[0]}: {instead_of(folder)}")


def instead_of(folder: str | os.PathLike) -> str:
    """What to do when a checkpoint is of no use."""
    folder = Path(folder)
    number = folder.name.removeprefix("checkpoint-")
    earlier = last_checkpoint(folder.parent, int(number)) if number.isdigit() else None
    if earlier is None:
        return "begin again, there is none before it"
    return f"continue from the checkpoint before it, resume_from_checkpoint={earlier}"


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold inf or nan; of a sharded one, each process sees its part."""
    sums = [getattr(t, "to_local", lambda t=t: t)().detach().float().sum() for t in tensors.values()]
    finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().tolist() if sums else []
    return [name for name, good in zip(tensors, finite, strict=True) if not good]


def is_whole(path: Path) -> bool:
    """Whether a file is what its name says, as far as can be told without reading all of it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (SafetensorError, ValueError, RecursionError):
        return False
    return path.suffix not in (".pt", ".pth") or zipfile.is_zipfile(path)


@contextmanager
def continuing_from(folder: str | os.PathLike) -> Iterator[None]:
    """What libraries say about a checkpoint that does not fit the run becomes one line that names it."""
    try:
        yield
    except Exception as error:  # pickle, zip files, optimisers and models each have their own
        if isinstance(error, OSError | torch.OutOfMemoryError) or str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder} cannot be continued ({' '.join(str(error).split())[:200]}): resume with the model and the "
            "settings that the run began with, or from another checkpoint"
        ) from error


class WeightAverage:
    """Exponential moving average of the trained weights.

    Args:
        model: whose trainable parameters are averaged.
        decay: of the average; in the first steps it is smaller, (1 + t) / (10 + t), so that the initial
            weights do not linger in short runs.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # In float32, also of a model in bfloat16: a step of 1 % of a difference would vanish.
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in; call after every optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights while the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """Give the model the averaged weights for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            raw = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(raw)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the averages into a checkpoint folder."""
        tensors = {name: average.cpu() for name, average in self.averages.items()}
        write_tensors(Path(folder) / AVERAGE_FILE, tensors, {"updates": str(self.updates)})

    def load(self, folder: str | os.PathLike) -> None:
        """Continue from a checkpoint folder.

        Raises:
            ValueError: the checkpoint was written without averages, or for other parameters.
        """
        path = Path(folder) / AVERAGE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no averaged weights: it was trained with ema_decay=0; resume with 0 too"
            )
        tensors, metadata = read_tensors(path)
        if tensors.keys() != self.averages.keys():
            raise ValueError(
                f"{path} averages other parameters than this run trains: resume with the same peft_config"
            )
        for name, tensor in tensors.items():
            self.averages[name].copy_(tensor)
        self.updates = int(metadata["updates"])


def save_buffer(folder: str | os.PathLike, rank: int, batches: list[dict[str, Tensor]]) -> None:
    """Write the micro-batches of a generation block that is still open."""
    tensors = {
        f"{index}/{key}": value.cpu() for index, batch in enumerate(batches) for key, value in batch.items()
    }
    write_tensors(Path(folder) / BUFFER_FILE.format(rank=rank), tensors, {"batches": str(len(batches))})


def load_buffer(folder: str | os.PathLike, rank: int, device: torch.device) -> list[dict[str, Tensor]] | None:
    """The micro-batches that `save_buffer` wrote; None if no block was open."""
    path = Path(folder) / BUFFER_FILE.format(rank=rank)
    if not path.is_file():
        return None
    tensors, metadata = read_tensors(path)
    batches: list[dict[str, Tensor]] = [{} for _ in range(int(metadata["batches"]))]
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        batches[int(index)][key] = value.to(device)
    return batches


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that a reader finds all of it or nothing."""
    # Clones: safetensors refuses tensors that share memory, as slices of one batch do.
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names, metadata = list(file.keys()), dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in names}, metadata

"""Read and write safetensors one tensor at a time, so that whoever reads holds a few tensors and
never a checkpoint.

The safetensors library maps whole files into memory and writes from tensors that all exist at once; both
make the peak grow with the checkpoint. The format is simple enough to stream: eight bytes with the length
of a JSON header (name → dtype, shape, offsets), then the tensors' bytes, without gaps.
"""

import hashlib
import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.reading import UnreadableError, read_json, reading
from diverse_cfg.untrusted import inside

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PIECE = 2**22  # bytes that are read at once
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, absolute byte position, and what the bytes are."""

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, after checking that every byte that the header promises is there.

    Raises:
        ValueError: not a safetensors file, or truncated; the message names the file and what is wrong.
    """
    with reading(file), file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
            raise UnreadableError(
                f"{file} is not a complete safetensors file ({size} bytes, header of {length} bytes): it "
                "was truncated or is something else; copy or download it again"
            )
        tensors = dict(_entries(file, json.loads(stream.read(length)), 8 + length))
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            raise ValueError(
                f"{file}: tensor {name} does not lie where the one before it ends; copy the file again"
            )
        end += info.num_bytes
    if end != size:
        raise ValueError(
            f"{file} has {size} bytes where its header promises {end}: truncated or damaged; copy it again"
        )
    return tensors


def _entries(file: Path, header: Mapping[str, Any], data_start: int) -> Iterator[tuple[str, TensorInfo]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UnreadableError(
                f"{file}: tensor {name} has dtype {entry['dtype']}; supported are {', '.join(DTYPES)}: save it again"
            )
        start, end = entry["data_offsets"]
        info = TensorInfo(file, data_start + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if end - start != info.num_bytes or min(info.shape, default=0) < 0:
            raise UnreadableError(
                f"{file}: tensor {name} has {end - start} bytes, its shape needs {info.num_bytes}; copy it again"
            )
        yield name, info


def find_tensors(folder: Path, stem: str) -> dict[str, TensorInfo]:
    """All tensors of `{stem}.safetensors` or of the shards listed in `{stem}.safetensors.index.json`.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard is missing.
        ValueError: only a pickle is there, a file is truncated, or shards and index disagree.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        if index.is_file() and (shard := next(folder.glob(f"{stem}-*-of-*.safetensors"), None)):
            warnings.warn(
                f"{folder} holds its weights twice, in {single.name} and in shards such as {shard.name}: the former is "
                "read; delete those that are not meant",
                UserWarning,
                stacklevel=2,
            )
        return _read_header(single)
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when opened and "
                "is never read here; save it again with save_pretrained(...), which writes safetensors"
            )
        raise FileNotFoundError(
            f"{folder} has no {single.name} (nor {index.name}): copy or download its weights again; other formats are "
            "saved anew with save_pretrained(...)"
        )
    content = read_json(index)
    with reading(index):
        weight_map = dict(content["weight_map"])
        shards = sorted(set(weight_map.values()))
        missing = [name for name in shards if not inside(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shard(s) {', '.join(missing)} listed in {index.name}")
    tensors: dict[str, TensorInfo] = {}
    for name in shards:
        tensors.update(_read_header(folder / name))
    if absent := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{index} lists {len(absent)} tensor(s) that no shard holds, e.g. {absent[0]}")
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, in memory of its own (no mapping that would keep the file's pages resident)."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.start)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise ValueError(
                    f"{info.file} ended in the middle of a tensor: it changed while it was being read"
                )
            done += count
    return tensor


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise where a weight of a model is NaN or infinite."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source} has NaN or infinite values in {name}: its training broke")


def require_float(name: str, dtype: Any) -> None:
    """Raise where a setting is no type that a model can compute in."""
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}={dtype} must be a floating-point type, such as torch.float32 or torch.bfloat16"
        )


def fingerprint(tensors: Mapping[str, TensorInfo], settings: str = "") -> str:
    """Hash of all bytes of all tensors, at about 2 GB a second, and of the settings that go with them."""
    digest = hashlib.sha256(settings.encode())
    for name, info in sorted(tensors.items()):
        digest.update(f"{name} {info.dtype} {tuple(info.shape)}".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            for start in range(0, info.num_bytes, _PIECE):
                digest.update(stream.read(min(_PIECE, info.num_bytes - start)))
    return f"sha256:{digest.hexdigest()[:32]}"


def former_fingerprint(tensors: Mapping[str, TensorInfo]) -> str:
    """As earlier versions of this package recorded it: of the first bytes of each tensor."""
    digest = hashlib.sha256()
    for name, info in sorted(tensors.items()):
        digest.update(f"{name} {info.dtype} {tuple(info.shape)}".encode())
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            digest.update(stream.read(min(info.num_bytes, 512)))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor that is about to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, specs: list[TensorSpec], produce: Callable[[str], Tensor]) -> None:
    """Write one safetensors file, asking for each tensor when its turn comes and dropping it afterwards.

    Args:
        path: the file; it must not exist.
        specs: what will be written; widest types first is best, since it keeps every tensor aligned.
        produce: name → tensor of exactly the promised dtype and shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight, as the library's own writer does
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for spec in specs:
            tensor = produce(spec.name).contiguous()
            assert tensor.dtype == spec.dtype and tuple(tensor.shape) == spec.shape, spec
            stream.write(memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())

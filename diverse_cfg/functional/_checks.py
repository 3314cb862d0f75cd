"""Shape and precision checks shared by the functions of this folder."""

import torch
from torch import Tensor


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all tensors to float64 if one of them is float64, else to float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def require_ndim(name: str, tensor: Tensor, letters: str) -> None:
    """Raise unless `tensor` has one dimension per letter of `letters`, such as "P G D"."""
    expected = letters.split()
    if tensor.ndim != len(expected):
        raise ValueError(f"{name} must have shape [{', '.join(expected)}], got {tuple(tensor.shape)}")


def require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless the two shapes are equal (broadcasting would hide a mistake)."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} differ in shape: {tuple(tensor.shape)} and {tuple(other.shape)}"
        )

"""One small training loop for all four networks of the nano world: schedule, weight average, curve, exact resume."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


@dataclass
class Schedule:
    """Warm-up, constant, then cosine to 2 % over the last `decay` of the steps.

    The constant stretch can be continued: a run with more `steps` resumes from the checkpoint saved before the decay.
    """

    learning_rate: float
    steps: int
    warmup: int = 100
    decay: float = 0.4
    evaluate_every: int = 500

    @property
    def decay_start(self) -> int:
        return round(self.steps * (1 - self.decay))

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if step < self.decay_start:
            return self.learning_rate
        progress = (step - self.decay_start) / max(self.steps - self.decay_start, 1)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save_atomically(value: object, path: Path) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(value, partial)
    partial.replace(path)


def forget_after(curve: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run will do again."""
    if curve.is_file():
        with curve.open(newline="") as file:
            header, *rows = csv.reader(file)
        partial = curve.with_suffix(".csv.partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= step)])
        partial.replace(curve)


def train(
    name: str,
    model: nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    evaluate: Callable[[], dict[str, float]],
    schedule: Schedule,
    folder: Path,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.01,
    clip: float = 1.0,
    ema: float = 0.999,
) -> nn.Module:
    """Train `model` in place and leave the averaged weights in it.

    Args:
        loss_of_step: computes the loss of step i; all its randomness must derive from i, so that a resumed run is the
            same run.
        evaluate: metrics of the averaged weights, called every `evaluate_every` steps; rows of `<name>.csv`.
        folder: receives `<name>.pt` (for resuming), `<name>.stable.pt` (last before the decay) and `<name>.csv`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, stable, curve = (folder / f"{name}{suffix}" for suffix in (".pt", ".stable.pt", ".csv"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=weight_decay)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = 0
    for path in (checkpoint, stable):
        if path.is_file():
            state = torch.load(path, weights_only=True)
            if (
                path == checkpoint
                and state["steps"] != schedule.steps
                and state["step"] > state["decay_start"]
            ):
                continue  # a longer schedule continues from before the decay of the shorter one
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average, start = state["average"], state["step"]
            break
    forget_after(curve, start)

    def snapshot(step: int, path: Path) -> None:
        state = {
            "step": step,
            "steps": schedule.steps,
            "decay_start": schedule.decay_start,
            "average": average,
        }
        save_atomically(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)

    def with_average() -> dict[str, torch.Tensor]:
        raw = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average)
        return raw

    running = 0.0
    bar = tqdm(
        range(start, schedule.steps),
        initial=start,
        total=schedule.steps,
        desc=name,
        unit="step",
        mininterval=5,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        model.train()
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(ema, (step + 1) / (step + 10))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value.detach(), 1 - keep)
        running = loss.item() if running == 0.0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        done = step + 1
        if done % schedule.evaluate_every == 0 or done == schedule.steps:
            raw = with_average()
            model.eval()
            row = {"step": done, "learning_rate": schedule(step), "train_loss": running, **evaluate()}
            model.load_state_dict(raw)
            new = not curve.is_file()
            with curve.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow({k: f"{v:.6g}" for k, v in row.items()})
            tqdm.write(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
            snapshot(done, checkpoint)
            if done <= schedule.decay_start:
                snapshot(done, stable)
    with_average()
    return model.eval()

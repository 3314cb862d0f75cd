"""What makes the takes of the page: the models, loaded once, and one musician's wish after the other."""

import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.assets import nano_path
from diverse_cfg.embeddings import Embedder, load_embedder
from diverse_cfg.merging import load_slider
from diverse_cfg.playing.takes import Take, looks, volume
from diverse_cfg.policies.loading import load_policy, load_processor, torch_device
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler.draws import SamplingSettings
from diverse_cfg.policies.sampler.extension import extend, longest_window
from diverse_cfg.policies.sampler.loop import WATCHER
from diverse_cfg.policies.sampler.rollout import check_request, decode_codes, fast_generate
from diverse_cfg.policies.sampler.weights import RolloutWeights
from diverse_cfg.policies.stored import locate
from diverse_cfg.provenance import read_provenance
from diverse_cfg.rewards import embed_clips, embedding_distances
from diverse_cfg.threads import EVALUATION

USUAL_TOP_K = 250
_NANO_BASE = ("assets", "nano", "base")  # the last parts of its folder, in whichever environment


@dataclass(frozen=True)
class Wish:
    """What a musician asks for.

    Args:
        prompt: a text.
        num_takes: how many different answers.
        seconds: of a take, or that one is extended by.
        seed: of all of them; take i is its clip i.
        temperature: 0 is greedy.
        merge_weight: λ, between two students.
        guidance_scale: γ, of a base or of a student that is told it.
    """

    prompt: str
    num_takes: int = 8
    seconds: float = 3.0
    seed: int = 0
    temperature: float = 1.0
    merge_weight: float | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a wish is."""

    fraction: float
    seconds_left: float


@dataclass(frozen=True)
class Cost:
    """What a wish took: seconds of sampling and of decoding, and rows that the decoder computed."""

    sampling: float
    decoding: float
    rows: int


class _CancelledError(Exception):
    """Nobody waits for it any more."""


class Player:
    """Models behind one page.

    Args:
        models: folders or Hub ids: a model, or a quality and a diversity student, between which λ moves.
        base: of the students, for the guided clips beside theirs; by default the one that they record.
        device: torch device; a GPU if there is one.

    Attributes:
        model: that plays.
        names: of the models.
        moves: whether there is a λ.
        guided: whether the model is a base, played with guidance.
        told: lowest and highest γ that the student can be told; None of one γ.
        guidance_scale: γ of the model, or of the base beside it.
        base: folder or id of the base beside a student, if it is known.
        shortest, usual, longest: seconds of a take.
        embedder: of the map.
    """

    def __init__(
        self,
        models: Sequence[str],
        *,
        base: str | None = None,
        device: str | None = None,
        encoder: str | None = None,
    ) -> None:
        if not 1 <= len(models) <= 2:
            raise ValueError(f"a page plays one model, or two with λ between them: got {len(models)}")
        self.device = torch_device(device)
        provenance = read_provenance(locate(models[0]))
        base = base or (_here(provenance.base_model) if provenance is not None else None)
        self.names = [Path(model).name for model in models]
        self._slider = (
            load_slider(base, models, merge_weight=0.0, device=self.device) if len(models) == 2 else None
        )
        self.model: Any = self._slider.model if self._slider else load_policy(models[0]).to(self.device)
        self._processor = load_processor(models[0])
        self._weights = RolloutWeights.from_model(self.model)
        self._guided: tuple[Any, RolloutWeights] | None = None
        self._lock = threading.Lock()
        self._pace = {"step": 0.0, "clip": 0.0}  # seconds
        self._policy = policy = as_policy(self.model)
        own = self.model.generation_config
        distilled = getattr(self.model, "is_distilled", False)
        self.guided = not distilled and (own.guidance_scale or 1.0) > 1
        knots = None if policy.shift is None else policy.shift.guidance.knots
        self.told = self._slider.guidance_range if self._slider else knots and (knots[0], knots[-1])
        self.base = None if self.guided or provenance is None else base
        self.guidance_scale = float((provenance and provenance.guidance_scale) or own.guidance_scale or 3.0)
        if self.base and self.guidance_scale == 1.0:
            self.guidance_scale = 3.0
        self.temperature = 1.0 if own.temperature is None else float(own.temperature)
        self._top_k = USUAL_TOP_K if own.top_k is None else int(own.top_k)
        trained = (provenance.sampling.get("num_frames") if provenance else None) or round(
            policy.usual_seconds * policy.frame_rate
        )
        self._window = min(int(trained), longest_window(policy))
        self.usual = self._window / policy.frame_rate
        self.longest = longest_window(policy) / policy.frame_rate
        self.embedder: Embedder = load_embedder(encoder or _shipped_encoder(policy), device=self.device)

    @property
    def moves(self) -> bool:
        return self._slider is not None

    def check(self, wish: Wish) -> None:
        """Raise what sampling would raise, before anything is computed."""
        settings = SamplingSettings(temperature=wish.temperature, top_k=self._top_k)
        frames = self._frames(wish.seconds)
        check_request(
            self.model, self._processor, [wish.prompt], frames, settings, num_generations=wish.num_takes
        )

    def play(
        self,
        wish: Wish,
        *,
        like: Take | None = None,
        longer: Take | None = None,
        guided: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Iterator["Progress | tuple[Take, Tensor] | Cost"]:
        """Makes takes, and says how far it is: every take with its waveform once it is decoded, the cost last.

        Args:
            wish: what is wanted.
            like: the takes begin as this one does, and go on differently.
            longer: this take, and as many seconds more.
            guided: by the base with guidance, instead of the student.
            cancelled: when set, ends it early, without a cost.
        """
        cancelled = cancelled or threading.Event()

        def work(tell: Callable[[Any], None]) -> None:
            with self._lock:
                self._work(wish, tell, like, longer, guided, cancelled)

        return _streamed(work, cancelled)

    def distance(self, takes: Sequence[Take]) -> float | None:
        """Mean distance of takes, as the results page has it of a prompt's clips; None of fewer than two."""
        if len(takes) < 2:
            return None
        embeddings = torch.tensor([take.embedding for take in takes])
        distances = embedding_distances(self.embedder, embeddings, len(takes))[0]
        return float(distances.sum() / (len(takes) * (len(takes) - 1)))

    # ---- in the thread of one wish -------------------------------------------------------------------

    def _work(
        self,
        wish: Wish,
        tell: Callable[[Any], None],
        like: Take | None,
        longer: Take | None,
        guided: bool,
        cancelled: threading.Event,
    ) -> None:
        gamma = wish.guidance_scale if self.guided and wish.guidance_scale is not None else 1.0
        if guided:
            model, weights, gamma = self._guided_base()
        else:
            model, weights = self._moved(wish)
        policy, frames = self._policy, self._frames(wish.seconds)
        sampling = {"guidance_scale": gamma, "temperature": wish.temperature, "top_k": self._top_k}
        how: dict[str, Any] = {"processor": self._processor, "weights": weights, "decode": False, **sampling}
        told = dict(sampling)
        if self.moves and not guided:
            told["merge_weight"] = wish.merge_weight
        if self.told and not guided:
            told["student_guidance"] = wish.guidance_scale
            how |= {} if self.moves else {"student_guidance": wish.guidance_scale}
        count, extra = (1 if longer else wish.num_takes), max(policy.delays)
        if longer:
            codes = torch.tensor([longer.codes], device=self.device)
            window = min(longest_window(policy), max(self._window, 2))
            overlap = max(1, 2 * window // 5)
            steps = math.ceil(frames / (window - overlap)) * (window + extra)
            told["extended"] = longer.file
        else:
            steps = frames + extra
            if like:
                told["begins_like"] = like.file
        meter = _Meter(self._pace, steps, count, tell, cancelled)
        token = WATCHER.set(meter.step)
        try:
            if longer:
                numbers = [longer.number]
                clips = extend(
                    model, codes, [wish.prompt], num_frames=codes.shape[-1] + frames, window=window, overlap=overlap,
                    seed=wish.seed, sample_ids=numbers, **how,
                )  # fmt: skip
            else:
                numbers = list(range(count))
                prefix = None
                if like:
                    begun = torch.tensor(like.codes, device=self.device)[None]
                    prefix = begun[..., : max(1, min(begun.shape[-1], frames) // 3)].repeat(count, 1, 1)
                clips = fast_generate(
                    model, [wish.prompt] * count, num_frames=frames, seed=wish.seed, prefix=prefix, **how
                )
            sampled = meter.sampled()
            name = f"guided base, γ = {gamma:g}" if guided else self.title(wish)
            with EVALUATION.measured(torch.device(self.device).type) as done:
                for number, codes in zip(numbers, clips.codes, strict=True):
                    meter.decode()
                    [waveform] = decode_codes(model, codes[None]).cpu()
                    done()
                    tell((self._take(wish, name, number, told, codes, waveform), waveform))
        except _CancelledError:
            return
        finally:
            WATCHER.reset(token)
        rows = meter.rows * count * (2 if gamma != 1 else 1)
        tell(Cost(sampled, meter.finished(), rows))

    def _take(
        self, wish: Wish, name: str, number: int, told: dict[str, Any], codes: Tensor, waveform: Tensor
    ) -> Take:
        rate = self._policy.sampling_rate
        heard = codes if self.embedder.reads == "codes" else waveform
        [embedding] = embed_clips(self.embedder, heard[None], rate).tolist()
        return Take(
            id=uuid.uuid4().hex[:8],
            prompt=wish.prompt,
            model=name,
            seed=wish.seed,
            number=number,
            settings=told,
            sampling_rate=rate,
            seconds=round(codes.shape[-1] / self._policy.frame_rate, 2),
            codes=codes.tolist(),
            embedding=embedding,
            encoder=self.embedder.name,
            volume=volume(waveform, rate),
            looks=looks(waveform, rate),
        )

    def title(self, wish: Wish) -> str:
        """What the takes of a wish are called."""
        parts = [f"λ = {wish.merge_weight:g}"] if self.moves else []
        if wish.guidance_scale is not None and (self.told or self.guided):
            parts.append(f"γ = {wish.guidance_scale:g}")
        return ", ".join(parts) or self.names[0]

    def _frames(self, seconds: float) -> int:
        return max(1, round(min(seconds, self.longest) * self._policy.frame_rate))

    def _moved(self, wish: Wish) -> tuple[Any, RolloutWeights]:
        """The model at the wish's λ."""
        if self._slider is not None:
            before = list(self._slider.merge_weight), self._slider.student_guidance
            self._slider.set_merge_weight(wish.merge_weight or 0.0)
            if self.told:
                self._slider.set_guidance(wish.guidance_scale)
            if before != (self._slider.merge_weight, self._slider.student_guidance):
                self._weights.refresh(self.model)
        return self.model, self._weights

    def _guided_base(self) -> tuple[Any, RolloutWeights, float]:
        """The base, loaded when it is first asked for, and its γ."""
        if self._guided is None:
            assert self.base is not None
            model = load_policy(self.base).to(self.device)
            self._guided = model, RolloutWeights.from_model(model)
        return *self._guided, self.guidance_scale


class _Meter:
    """Tells how far one wish is, from what a step and a clip took until now; ends it when it is cancelled."""

    def __init__(
        self,
        pace: dict[str, float],
        steps: int,
        clips: int,
        tell: Callable[[Any], None],
        cancelled: threading.Event,
    ) -> None:
        self.pace, self.steps, self.clips, self.tell, self.cancelled = pace, steps, clips, tell, cancelled
        self.rows = self.decoded = 0
        self.begun = time.perf_counter()
        self.decoding = 0.0

    def step(self, step: int, num_steps: int) -> None:
        """Before every step of the decoder."""
        spent = time.perf_counter() - self.begun
        if self.rows > 3:
            self.pace["step"] = spent / self.rows
        self.rows += 1
        self._say(max(0, self.steps - self.rows), self.clips)

    def sampled(self) -> float:
        """All codes are there; returns the seconds that they took."""
        self.decoding = time.perf_counter()
        return self.decoding - self.begun

    def decode(self) -> None:
        """Before every clip is decoded."""
        if self.decoded:
            self.pace["clip"] = (time.perf_counter() - self.decoding) / self.decoded
        self._say(0, self.clips - self.decoded)
        self.decoded += 1

    def finished(self) -> float:
        """All clips are there; returns the seconds of decoding."""
        return time.perf_counter() - self.decoding

    def _say(self, steps: int, clips: int) -> None:
        if self.cancelled.is_set():
            raise _CancelledError
        left = steps * self.pace["step"] + clips * (self.pace["clip"] or 10 * self.pace["step"])
        spent = time.perf_counter() - self.begun
        self.tell(Progress(spent / max(spent + left, 1e-6), left))


def _streamed(work: Callable[[Callable[[Any], None]], None], cancelled: threading.Event) -> Iterator[Any]:
    """What `work` tells from a thread of its own, while it works; its error is raised here."""
    told: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            work(told.put)
        except BaseException as error:
            told.put(error)
        else:
            told.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (event := told.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        cancelled.set()


def _here(base: str | None) -> str | None:
    """A recorded base where it is on this machine: nano's folder is the one of this installation."""
    if base is not None and Path(base).parts[-3:] == _NANO_BASE:
        return str(nano_path())
    try:
        locate(base)
    except (OSError, ValueError, TypeError):
        return None
    return base


def _shipped_encoder(policy: Any) -> str:
    """Nano's reward encoder where the codes are nano's; elsewhere the one that listens."""
    nano = (len(policy.delays), policy.vocab_size, policy.sampling_rate) == (4, 512, 16000)
    return str(nano_path("reward-encoder" if nano else "eval-encoder"))

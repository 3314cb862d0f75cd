"""The sampling loop: a decoder step, a draw, the next step; the host never waits.

    eager    the context grows by one each step (CPU: no masked work)
    static   everything a step reads is a tensor, its own index included, and the context is rounded up to
             a bucket and masked: what a CUDA graph needs (runs anywhere, so it can be tested without a GPU)
    graph    the static body captured once per bucket into a CUDA graph, then replayed (GPU: no launches)

What has to be checked (were the logits finite?) is written down on the way and read once, at the end.
"""

import logging
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from diverse_cfg.policies.sampler.batches import is_out_of_memory
from diverse_cfg.policies.sampler.decoders import EagerDecoder, StaticDecoder
from diverse_cfg.policies.sampler.draws import SamplingSettings, draw, group_sizes, sampling_logits
from diverse_cfg.policies.sampler.weights import RolloutWeights
from diverse_cfg.threads import SAMPLING
from diverse_cfg.types import TextCondition

logger = logging.getLogger(__name__)

BUCKET = 256
"""Contexts are rounded up to a multiple of this in the static body: few graphs, and little masked work."""

ALIGNMENT = 16

WATCHER: ContextVar[Callable[[int, int], None]] = ContextVar("watcher", default=lambda step, num_steps: None)
"""Is called before every step of this context's loops, with its number and how many there are; what it raises ends the
loop: for a progress bar, and to cancel."""

_failed_captures: set[str] = set()


def default_mode(device: torch.device) -> str:
    """How a device is used best: "graph" on a GPU, "eager" elsewhere."""
    return "graph" if device.type == "cuda" else "eager"


class DecodeLoop:
    """Samples one batch of clips; may be started again for another batch of the same shape.

    After `run`, the grids `codes`, `logps` and `totals` [S, N, K] hold what each step drew; the cells in
    which the delay pattern has no code hold junk.

    Args:
        weights: the decoder.
        condition: rows with text, see `decoders`.
        num_clips: N.
        num_frames: T.
        settings: of the draws.
        mode: "eager", "static" or "graph"; by default graph on a GPU and eager elsewhere.
        prefixed: whether the clips begin with given codes.
    """

    def __init__(
        self,
        weights: RolloutWeights,
        condition: TextCondition,
        num_clips: int,
        num_frames: int,
        settings: SamplingSettings,
        mode: str | None = None,
        prefixed: bool = False,
    ) -> None:
        shape, device = weights.shape, weights.device
        self.settings = settings
        self.num_clips = num_clips
        self.num_frames = num_frames
        self.num_tokens = condition.attention_mask.shape[1]
        self.delays = shape.delays
        self.num_steps = num_frames + max(self.delays)
        self.pad = shape.vocab_size
        self.mode = mode or default_mode(device)
        # Attention kernels of GPUs want masks of aligned length.
        self.context = self.num_steps if self.mode == "eager" else _round_up(self.num_steps, ALIGNMENT)
        decoder = EagerDecoder if self.mode == "eager" else StaticDecoder
        cells = (self.num_steps, num_clips, shape.num_codebooks)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.steps = torch.arange(self.context, device=device)
        self.ids = torch.empty(cells[1:], dtype=torch.long, device=device)
        frame = torch.arange(self.num_steps)[:, None] - torch.tensor(self.delays)
        self.no_code = ((frame < 0) | (frame >= num_frames))[:, None].to(device)
        guidance = settings.guidance_scale if settings.guided else None
        if isinstance(guidance, tuple):
            guidance = torch.tensor(guidance, device=device)[frame.clamp(0, num_frames - 1)]
        adaptive = settings.adaptive_guidance and (*settings.adaptive_guidance, ~self.no_code[:, 0])
        self.decoder = decoder(weights, num_clips, self.context, condition, guidance, adaptive)
        self.noise = torch.ones(
            *cells, sum(group_sizes(shape.vocab_size)), dtype=torch.float32, device=device
        )
        self.codes = torch.zeros(cells, dtype=torch.long, device=device)
        self.given = torch.full_like(self.codes, -1) if prefixed else None
        self.logps = torch.zeros(cells, dtype=torch.float32, device=device)
        self.totals = torch.zeros(cells, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def nbytes(self) -> int:
        """Size of the caches of keys and values."""
        return sum(cache.nbytes for cache in self.decoder.cache)

    @property
    def decoder_rows(self) -> Tensor:
        """Rows that each clip of the last run took [N]."""
        if self.settings.adaptive_guidance is not None:
            return self.num_steps + self.decoder.null_rows
        return torch.full((self.num_clips,), self.num_steps * (1 + self.settings.guided))

    def reset(self, condition: TextCondition) -> None:
        """Take another batch: same number of clips, frames and text tokens."""
        assert isinstance(self.decoder, StaticDecoder)
        self.decoder.reset(condition)

    @torch.no_grad()
    def run(self, noise: Tensor, prefix: Tensor | None = None) -> None:
        """Sample all clips.

        Args:
            noise: the clips' random numbers [N, K, T, M], of `sampling.keyed_noise`.
            prefix: the codes that the clips begin with [N, K, Tp]; of a loop that is `prefixed`.
        """
        if prefix is not None:
            assert self.given is not None
            self.given.fill_(-1)
            for codebook, delay in enumerate(self.delays):
                self.given[delay : delay + prefix.shape[-1], :, codebook] = prefix[:, codebook].T
        for codebook, delay in enumerate(self.delays):
            self.noise[delay : delay + self.num_frames, :, codebook] = noise[:, codebook].transpose(0, 1)
        if self.mode == "graph" and not self._graphs:
            self._capture()
        self._rewind()
        watch = WATCHER.get()
        with SAMPLING.measured(self.position.device.type) as done:
            for step in range(self.num_steps):
                watch(step, self.num_steps)
                if self.mode == "graph":
                    self._graphs[self._bucket(step)].replay()
                elif self.mode == "static":
                    self._advance(self._bucket(step))
                else:
                    self._advance_eagerly(step)
                done()

    def _advance_eagerly(self, step: int) -> None:
        assert isinstance(self.decoder, EagerDecoder)
        logits = sampling_logits(self.decoder.step(self.ids, step), self.settings)
        codes, logps, totals = draw(logits, self.noise[step], self.settings.greedy)
        if self.given is not None:
            codes = torch.where(self.given[step] < 0, codes, self.given[step])
        self.codes[step], self.logps[step], self.totals[step] = codes, logps, totals
        self.ids = codes.masked_fill(self.no_code[step], self.pad)

    def _advance(self, length: int) -> None:
        """One step by tensors alone: their addresses stay, so that a graph can repeat it."""
        assert isinstance(self.decoder, StaticDecoder)
        bias = torch.zeros(length, dtype=self.decoder.cache_dtype, device=self.position.device)
        bias.masked_fill_(self.steps[:length] > self.position, -torch.inf)
        logits = sampling_logits(self.decoder.step(self.ids, self.position, length, bias), self.settings)
        noise = self.noise.index_select(0, self.position)[0]
        codes, logps, totals = draw(logits, noise, self.settings.greedy)
        if self.given is not None:
            given = self.given.index_select(0, self.position)[0]
            codes = torch.where(given < 0, codes, given)
        self.codes.index_copy_(0, self.position, codes[None])
        self.logps.index_copy_(0, self.position, logps[None])
        self.totals.index_copy_(0, self.position, totals[None])
        self.ids.copy_(codes.masked_fill(self.no_code.index_select(0, self.position)[0], self.pad))
        self.position.add_(1)

    def _rewind(self) -> None:
        self.position.zero_()
        self.ids.fill_(self.pad)
        self.decoder.agreed.zero_()
        self.decoder.null_rows.zero_()

    def _bucket(self, step: int) -> int:
        return min(_round_up(step + 1, BUCKET), self.context)

    def _capture(self) -> None:
        """Record the static body for every bucket; where that fails, say why once and do without."""
        graphs = {}
        caller = torch.cuda.current_stream(self.position.device)
        try:
            with torch.cuda.device(self.position.device):
                stream = torch.cuda.Stream()
                pool = torch.cuda.graph_pool_handle()
                for length in sorted({self._bucket(step) for step in range(self.num_steps)}):
                    # Libraries allocate their workspaces on first use, which a capture must not see.
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        for _ in range(2):
                            self._rewind()
                            self._advance(length)
                    torch.cuda.current_stream().wait_stream(stream)
                    self._rewind()
                    graph = torch.cuda.CUDAGraph()
                    # Other threads (a loader that pins memory, a watchdog) go on calling the driver meanwhile.
                    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                        self._advance(length)
                    graphs[length] = graph
            self._graphs = graphs
        except RuntimeError as error:
            torch.cuda.set_stream(caller)  # a capture that cannot be ended does not leave its own
            if is_out_of_memory(error):
                raise  # a smaller batch is the remedy, not another mode
            self.mode = "static"
            if str(error) not in _failed_captures:
                _failed_captures.add(str(error))
                logger.warning(
                    "CUDA graph capture failed, the rollout launches its kernels one by one: %s", error
                )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

"""Checkpoints that the real AudioCraft made, with random weights, and what it computes with them.

Shares no code with `diverse_cfg.policies.audiocraft` but the import of the package: AudioCraft's own builders
make the model from a configuration written as its releases have it, with `${…}` references left in, and its
own generation and loss code give the expected numbers.
"""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.policies.audiocraft import import_audiocraft
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from diverse_cfg.policies.sampler.rollout import decode_codes, fast_generate
from tests.tiny import tiny_tokenizer

PROMPTS = ["sad cello", "a calm piano song in the key of g"]
GUIDANCE_SCALE = 3.0
NUM_FRAMES = 9


@dataclass(frozen=True)
class Size:
    """What the checkpoints of the tests differ in."""

    stereo: bool = False
    width: int = 16
    heads: int = 2
    layers: int = 2
    card: int = 16
    text_width: int = 12
    n_filters: int = 2
    ratios: tuple[int, ...] = (8, 8)
    dimension: int = 8
    sample_rate: int = 3200
    causal: bool = False
    true_skip: bool = True
    custom: bool = True
    residual_layers: int = 1

    @property
    def num_codebooks(self) -> int:
        return 8 if self.stereo else 4


MONO = Size()
STEREO = Size(stereo=True)
# The other choices that a codec of AudioCraft may have, and attention as PyTorch's own class.
VARIED = Size(causal=True, true_skip=False, custom=False, residual_layers=2)
# musicgen-small and its codec, with two of the 24 layers.
TRUE_WIDTH = Size(
    width=1024,
    heads=16,
    card=2048,
    text_width=768,
    n_filters=64,
    ratios=(8, 5, 4, 4),
    dimension=128,
    sample_rate=32000,
)

LANGUAGE_MODEL = """
solver: musicgen
device: cuda
dtype: float16
sample_rate: {sample_rate}
channels: {channels}
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
compression_model_n_q: null
efficient_attention_backend: torch
interleave_stereo_codebooks: {{use: {stereo}, per_timestep: false}}
dataset: {{segment_duration: 30, batch_size: 192, train: {{num_samples: 1000000}}}}
generate: {{lm: {{use_sampling: true, top_k: 250, top_p: 0.0}}, audio: {{sample_rate: '${{sample_rate}}'}}}}
optim: {{ema: {{use: true, device: '${{device}}'}}}}
logging: {{folder: '${{oc.env:HOME}}/runs'}}
lm_model: transformer_lm
codebooks_pattern:
  modeling: delay
  delay: {{delays: {delays}, flatten_first: 0, empty_initial: 0}}
  unroll: {{flattening: [0, 1, 2, 3], delays: [0, 0, 0, 0]}}
transformer_lm:
  dim: {width}
  num_heads: {heads}
  num_layers: {layers}
  hidden_scale: 4
  n_q: {num_codebooks}
  card: '${{codec_card}}'
  dropout: 0.0
  emb_lr: null
  activation: gelu
  norm_first: true
  bias_ff: false
  bias_attn: false
  bias_proj: false
  past_context: null
  causal: true
  custom: {custom}
  memory_efficient: false
  attention_as_float32: false
  layer_scale: null
  positional_embedding: sin
  xpos: false
  checkpointing: none
  weight_init: gaussian
  depthwise_init: current
  zero_bias_init: true
  norm: layer_norm
  cross_attention: false
  qk_layer_norm: false
  qk_layer_norm_cross: false
  attention_dropout: null
  kv_repeat: 1
  two_step_cfg: false
codec_card: {card}
classifier_free_guidance: {{training_dropout: 0.3, inference_coef: 3.0}}
attribute_dropout: {{}}
fuser:
  cross_attention_pos_emb: false
  cross_attention_pos_emb_scale: 1
  sum: []
  prepend: []
  cross: [description]
  input_interpolate: []
conditioners:
  description:
    model: t5
    t5: {{name: t5-small, finetune: false, word_dropout: 0.3, normalize_text: false}}
"""

CODEC = """
solver: compression
device: cuda
sample_rate: {sample_rate}
channels: 1
compression_model: encodec
encodec:
  autoencoder: seanet
  quantizer: rvq
  sample_rate: ${{sample_rate}}
  channels: ${{channels}}
  causal: {causal}
  renormalize: false
seanet:
  dimension: {dimension}
  channels: ${{channels}}
  causal: ${{encodec.causal}}
  n_filters: {n_filters}
  n_residual_layers: {residual_layers}
  ratios: {ratios}
  activation: ELU
  activation_params: {{alpha: 1.}}
  norm: weight_norm
  norm_params: {{}}
  kernel_size: 7
  residual_kernel_size: 3
  last_kernel_size: 7
  dilation_base: 2
  pad_mode: constant
  true_skip: {true_skip}
  compress: 2
  lstm: 2
  disable_norm_outer_blocks: 0
  decoder: {{trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}}
  encoder: {{}}
rvq:
  n_q: 4
  q_dropout: false
  bins: {card}
  decay: 0.99
  kmeans_init: true
  kmeans_iters: 50
  threshold_ema_dead_code: 2
  orthogonal_reg_weight: 0.0
  orthogonal_reg_active_codes_only: false
no_quant: {{}}
"""


def configuration(template: str, size: Size) -> str:
    """A configuration as text, as AudioCraft stores it."""
    values = {name: getattr(size, name) for name in Size.__dataclass_fields__}
    values["ratios"] = list(size.ratios)
    values["num_codebooks"] = size.num_codebooks
    values["channels"] = 2 if size.stereo else 1
    values["delays"] = [0, 0, 1, 1, 2, 2, 3, 3] if size.stereo else [0, 1, 2, 3]
    return template.format(**values).replace("True", "true").replace("False", "false")


def write_checkpoint(folder: Path, size: Size, seed: int = 0) -> Path:
    """`state_dict.bin` and `compression_state_dict.bin` as AudioCraft's own export writes them, and the T5."""
    from omegaconf import OmegaConf

    import_audiocraft()
    from audiocraft.models import builders

    folder.mkdir(parents=True)
    write_text_encoder(folder / "text_encoder", size.text_width)
    with text_encoder(folder / "text_encoder"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, template, build in (
            ("state_dict.bin", LANGUAGE_MODEL, builders.get_lm_model),
            ("compression_state_dict.bin", CODEC, builders.get_compression_model),
        ):
            text = configuration(template, size)
            cfg = OmegaConf.create(text)
            cfg.device, cfg.dtype = "cpu", "float32"
            model = build(cfg)
            _fill(model)
            package = {"best_state": model.state_dict(), "xp.cfg": text, "version": "1.3.0", "exported": True}
            torch.save(package, folder / name)
    return folder


def edit(path, *replacements, state=None):
    """Change the stored configuration as text, and the tensors by a function."""
    package = torch.load(path, weights_only=True)
    for old, new in replacements:
        assert old in package["xp.cfg"], old
        package["xp.cfg"] = package["xp.cfg"].replace(old, new)
    if state is not None:
        state(package["best_state"])
    torch.save(package, path)


def write_text_encoder(folder: Path, width: int) -> None:
    """A T5 of one layer and the tiny tokenizer, in place of t5-base."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        )
        for name, parameter in encoder.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=1.0 if "shared" in name else parameter.shape[-1] ** -0.5)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def text_encoder(folder: Path):
    """AudioCraft loads its T5 by a name from a list; meanwhile every name leads to this folder."""
    import_audiocraft()
    from audiocraft.modules import conditioners

    kind = conditioners.T5Conditioner
    before = kind.MODELS, kind.MODELS_DIMS, conditioners.T5EncoderModel, conditioners.T5Tokenizer
    width = T5Config.from_pretrained(folder).d_model
    names = [*kind.MODELS, "text_encoder"]
    kind.MODELS, kind.MODELS_DIMS = names, dict.fromkeys(names, width)
    for name in ("T5EncoderModel", "T5Tokenizer"):
        real = getattr(conditioners, name)
        loader = functools.partial(lambda kind, _: kind.from_pretrained(str(folder)), real)
        setattr(conditioners, name, type(name, (), {"from_pretrained": staticmethod(loader)}))
    try:
        yield
    finally:
        kind.MODELS, kind.MODELS_DIMS, conditioners.T5EncoderModel, conditioners.T5Tokenizer = before


def open_audiocraft(folder: Path, t5: Path | None = None):
    """`MusicGen.get_pretrained` of a checkpoint folder."""
    import_audiocraft()
    from audiocraft.models import MusicGen

    with text_encoder(t5 or folder / "text_encoder"):
        return MusicGen.get_pretrained(str(folder), device="cpu")


@torch.no_grad()
def logits(musicgen, codes: Tensor, prompts: list[str | None]) -> Tensor:
    """Logits of every code [N, K, T, V], each prompt in a batch of its own; None is the null prompt."""
    from audiocraft.modules.conditioners import ConditioningAttributes

    rows = []
    for row, prompt in zip(codes, prompts, strict=True):
        attributes = [ConditioningAttributes(text={"description": prompt})]
        conditions = musicgen.lm.condition_provider(musicgen.lm.condition_provider.tokenize(attributes))
        output = musicgen.lm.compute_predictions(
            row[None], [], condition_tensors=conditions, keep_only_valid_steps=False
        )
        assert output.mask.all()
        rows.append(output.logits)
    return torch.cat(rows)


@torch.no_grad()
def greedy_codes(
    musicgen, prompts: list[str], num_frames: int = NUM_FRAMES, guidance: float = GUIDANCE_SCALE
) -> Tensor:
    """AudioCraft's own generation without sampling, each prompt in a batch of its own [N, K, T]."""
    musicgen.set_generation_params(
        use_sampling=False, cfg_coef=guidance, duration=num_frames / musicgen.frame_rate + 1e-6
    )
    codes = [musicgen.generate([prompt], return_tokens=True)[1] for prompt in prompts]
    return torch.cat(codes)


@torch.no_grad()
def expectation(folder: Path, size: Size) -> dict[str, Tensor]:
    """Everything that AudioCraft computes from a checkpoint and that a conversion must reproduce."""
    musicgen = open_audiocraft(folder)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, size.card, (len(PROMPTS), size.num_codebooks, NUM_FRAMES), generator=generator)
    hop = round(musicgen.sample_rate / musicgen.frame_rate)
    audio = torch.randn(1, musicgen.audio_channels, NUM_FRAMES * hop, generator=generator)
    conditional, null = logits(musicgen, codes, PROMPTS), logits(musicgen, codes, [None] * len(PROMPTS))
    return {
        "codes": codes,
        "conditional_logits": conditional,
        "null_logits": null,
        "guided_logits": null + GUIDANCE_SCALE * (conditional - null),
        "decoded_audio": musicgen.compression_model.decode(codes, None),
        "audio": audio,
        "audio_codes": musicgen.compression_model.encode(audio)[0],
        "greedy_codes": greedy_codes(musicgen, PROMPTS),
    }


def our_codes(model, processor, guidance_scale=GUIDANCE_SCALE):
    """Greedy codes of PROMPTS [N, K, T], all of them in one batch."""
    settings = {"num_frames": NUM_FRAMES, "guidance_scale": guidance_scale, "temperature": 0.0, "seed": 0}
    return fast_generate(model, PROMPTS, processor=processor, **settings).codes


def check_equal(model, processor, expected, tolerance=1e-5, guided_tolerance=4e-5, audio_tolerance=0.0):
    """Every gate at once: logits, codes and audio of the codec, guided greedy generation.

    Catches a name that leads to another tensor, a q-k-v order, a wrong delay, a null prompt that is none, prompts of
    unequal length in one batch, which AudioCraft was given one by one, and left and right that are not interleaved
    codebook by codebook.
    """
    condition = encode_text(model, processor, PROMPTS)
    with torch.no_grad():
        conditional = code_logits(model, expected["codes"], condition)
        null = code_logits(model, expected["codes"], condition.null())
    close = {"atol": tolerance, "rtol": 0.0}
    torch.testing.assert_close(conditional, expected["conditional_logits"], **close)
    torch.testing.assert_close(null, expected["null_logits"], **close)
    guided = guided_logits(conditional, null, GUIDANCE_SCALE)
    torch.testing.assert_close(guided, expected["guided_logits"], atol=guided_tolerance, rtol=0)
    assert (conditional - null).abs().max() > 0.1, "the prompt must matter for this to test anything"
    audio = decode_codes(model, expected["codes"]).reshape(expected["decoded_audio"].shape)
    torch.testing.assert_close(audio, expected["decoded_audio"], atol=audio_tolerance, rtol=0)
    assert audio.std() > 1e-3
    channels = expected["audio"].shape[1]
    with torch.no_grad():
        encoded = [
            model.audio_encoder.encode(expected["audio"][:, c : c + 1]).audio_codes[0]
            for c in range(channels)
        ]
    assert torch.equal(torch.stack(encoded, dim=2).flatten(1, 2), expected["audio_codes"])
    assert torch.equal(our_codes(model, processor), expected["greedy_codes"])
    assert expected["greedy_codes"].unique().numel() > 3


@torch.no_grad()
def _fill(model: torch.nn.Module) -> None:
    """Weights with audible differences: norms that are not the identity, matrices of unit gain, codebooks."""
    for name, parameter in model.named_parameters():
        if "norm" in name.rpartition(".")[0]:
            parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif name.startswith("emb."):
            parameter.normal_(std=1.0)
        elif name.startswith("linears."):
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        elif parameter.dim() == 2 and "lstm" not in name:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif name.endswith("output_proj.bias"):
            parameter.normal_(std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("_codebook.embed"):
            buffer.normal_()
        elif name.endswith("inited"):
            buffer.fill_(1)

"""What the package asks about a family of models: its folders, and how one of its models becomes a policy.

Merging, inspection, cards and publishing read checkpoints as files and configurations, without building a model:
`Family` answers their questions. A new family is a subclass, a `Policy` beside it, and a call of `register`.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from diverse_cfg.reading import COPY_AGAIN, load_complete, read_json, reading

# Of the settings that a configuration class declares, those that two checkpoints of one architecture may differ in:
# bookkeeping, training-time noise, token ids (written anew on saving), and what concerns a decoder of T5 or is
# decided by the family itself.
_NOT_ARCHITECTURE = {
    "activation_dropout",
    "add_cross_attention",
    "attention_dropout",
    "bos_token_id",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "dropout",
    "dropout_rate",
    "eos_token_id",
    "initializer_factor",
    "is_decoder",
    "layerdrop",
    "num_decoder_layers",
    "pad_token_id",
    "scale_decoder_outputs",
    "tie_word_embeddings",
    "use_cache",
}
# What makes text readable to the model: tokenizer and processor.
PROCESSOR_FILES = (
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
PROCESSOR_REMEDY = "copy the tokenizer and processor files of its base model into it"
_SAMPLING_NUMBERS = {
    "guidance_scale": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "max_length": int,
    "max_new_tokens": int,
}


class Family:
    """A family of transformers' models. The methods here are right for a plain language model over codes.

    Attributes:
        model_type: of its config.json.
        model_class: what loads a folder of it.
        policy_class: the `Policy` around a live model, called with the model and its processor.
        codec_prefix: beginnings of the names of the tensors that give the codes their meaning: they are
            compared, never interpolated.
        guidance_bias: name of the bias, of the text's condition, into which γ can be folded; see `shift`.
        processor_needs: what reading a prompt takes → names of files, one of which must be there.
    """

    model_type: str
    model_class: Any
    policy_class: Any
    codec_prefix: str | tuple[str, ...] = ()
    guidance_bias: str | None = None
    processor_needs: Mapping[str, tuple[str, ...]] = {"tokenizer": _TOKENIZER_FILES}

    # ---- configuration ----------------------------------------------------------------------------------

    def load_config(self, folder: str | os.PathLike) -> Any:
        """Configuration of a folder.

        Raises:
            ValueError: the file is damaged.
        """
        path = Path(folder) / "config.json"
        _require_unquantised(path)
        with reading(path):
            config = self.model_class.config_class.from_pretrained(str(folder))
            counts = {
                name: value
                for name, value in self.architecture(config).items()
                if isinstance(value, int) and not name.startswith(self.codec_prefix)
            }
        for name, value in counts.items():
            if not isinstance(value, bool) and value < 1:
                raise ValueError(f"{path}: {name}={value} must be at least 1; {COPY_AGAIN}")
        return config

    def architecture(self, config: Any, *, changed: bool = False) -> dict[str, Any]:
        """Everything in a configuration that shapes the computation, as dotted name → value.

        With `changed`, only what it sets otherwise than its class, which newer versions of transformers do not add to.

        Only what the configuration's class declares: older versions of transformers stored dozens of settings of
        text generation beside it.
        """
        return declared_settings(config, changed=changed)

    def describe(self, config: Any) -> dict[str, Any]:
        """Its size in a few numbers, for people."""
        return {"codebooks": 1, "codebook_size": config.vocab_size}

    def saved_config(self, config: Any, dtype: torch.dtype) -> Any:
        """A copy as it is saved with weights of a type."""
        config = type(config).from_dict(config.to_dict())
        config.dtype = dtype
        return config

    # ---- tensors ----------------------------------------------------------------------------------------

    def build(self, config: Any) -> nn.Module:
        """A model with this configuration, its weights at random."""
        return self.model_class(config)

    def expected_tensors(self, config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Names and shapes of a complete checkpoint, found without allocating a weight.

        Returns:
            name → shape of every stored tensor, and alias → name for tensors that share their memory with
            another.
        """
        with torch.device("meta"):
            model = self.build(config)
        shapes: dict[str, tuple[int, ...]] = {}
        aliases: dict[str, str] = {}
        names: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = names.setdefault(id(tensor), name)
            if first == name:
                shapes[name] = tuple(tensor.shape)
            else:
                aliases[name] = first
        return shapes, aliases

    def canonical_name(self, name: str, aliases: Mapping[str, str]) -> str | None:
        """The name that `expected_tensors` uses for a tensor found in a file; None for computed tables."""
        return aliases.get(name, name)

    def storage_dtype(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The type in which a tensor is saved when a model is asked for in `dtype`."""
        return dtype if stored.is_floating_point else stored

    def part_of(self, name: str) -> str:
        """The part of the model that a tensor belongs to, in words for people."""
        return name.split(".")[0]

    # ---- text -------------------------------------------------------------------------------------------

    def missing_processor(self, folder: Path) -> str | None:
        """What a folder lacks to read prompts; None where nothing is missing."""
        for kind, names in self.processor_needs.items():
            if not any((folder / name).is_file() for name in names):
                return f"{kind} ({' or '.join(names)})"
        return None

    def load_processor(self, folder: Path, source: str | os.PathLike, config: Any) -> Any:
        """What makes tokens of a prompt: a tokenizer, or a processor that holds one.

        Args:
            folder: where it lies.
            source: what messages call it.
            config: of the model that it is for; None where it lies alone.

        Raises:
            ValueError: it is damaged, or another model's.
        """
        with reading(folder, PROCESSOR_REMEDY):
            return AutoTokenizer.from_pretrained(str(folder))

    # ---- models -----------------------------------------------------------------------------------------

    def load_model(self, folder: Path, source: str) -> Any:
        """All weights of a folder, in float32.

        Raises:
            ValueError: they are incomplete.
        """
        model = load_complete(self.model_class, str(folder), dtype=torch.float32)
        if getattr(model, "generation_config", None) is None:
            model.generation_config = load_generation_config(folder) or GenerationConfig()
        return model

    def cast(self, model: Any, dtype: torch.dtype) -> None:
        """Give a loaded model another precision, in place."""
        model.to(dtype)

    # ---- sampling ---------------------------------------------------------------------------------------

    def num_frames_to_tokens(self, num_frames: int, config: Any) -> int:
        """`max_new_tokens` for T frames."""
        return num_frames

    def frames_to_seconds(self, num_frames: int, config: Any) -> float:
        """Length of a clip of T frames."""
        return float(num_frames)

    def special_tokens(self, config: Any) -> dict[str, int]:
        """Token ids of the generation settings."""
        return {}

    def repair_token_ids(self, config: Any) -> Any:
        """Undo, in place, what trainers for text models write into a configuration."""
        return config

    def playing_config(
        self,
        config: Any,
        sampling: Mapping[str, Any] | None = None,
        like: GenerationConfig | None = None,
        guidance_scale: float | None = 1.0,
    ) -> GenerationConfig:
        """Generation settings of a distilled checkpoint: no guidance, and the sampling that it was trained with.

        Args:
            config: the model's configuration.
            sampling: `temperature`, `top_k`, `top_p`, `num_frames` of the provenance; what it does not name is
                kept from `like`.
            like: settings of the checkpoint that it came from. Its guidance is dropped, and its `max_length`
                becomes the equivalent `max_new_tokens` (read from a generation config, both count new tokens).
            guidance_scale: γ, of a checkpoint that was not distilled.
        """
        sampling = dict(sampling or {})
        like = like or GenerationConfig()
        max_new_tokens = like.max_new_tokens or like.max_length
        if sampling.get("num_frames"):
            max_new_tokens = self.num_frames_to_tokens(int(sampling["num_frames"]), config)
        settings: dict[str, Any] = {
            "do_sample": True,
            "guidance_scale": guidance_scale,
            "max_new_tokens": max_new_tokens,
            **self.special_tokens(config),
        }
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value = sampling.get(name, getattr(like, name, None))
            if value is not None:
                settings[name] = value
        return GenerationConfig(**settings)


def _require_unquantised(path: Path) -> None:
    """Refuse a config.json by which transformers would read the weights with another library."""
    content = read_json(path) if path.is_file() else {}
    if any(
        isinstance(part, dict) and part.get("quantization_config") for part in (content, *content.values())
    ):
        raise ValueError(
            f"{path.parent} was quantised by another program (quantization_config in {path.name}): its weights cannot "
            "be read as they are meant: use the checkpoint that it was made of, in float32, float16 or bfloat16"
        )


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known, by the `model_type` of its configurations."""
    _FAMILIES[family.model_type] = family


def family_of(source: Any) -> Family:
    """The family of a folder, a configuration, or a live model.

    Raises:
        FileNotFoundError: a folder without config.json.
        ValueError: no family that is known (MusicGen's melody and style checkpoints included).
    """
    import diverse_cfg.policies.musicgen.family  # noqa: F401  (it registers itself)

    if isinstance(source, nn.Module | PreTrainedConfig):
        kind = getattr(getattr(source, "config", source), "model_type", None)
        if kind not in _FAMILIES:
            raise ValueError(
                f"expected a MusicgenForConditionalGeneration, got a {type(source).__name__}: MusicGen-Melody "
                "and other models are not supported"
            )
        return _FAMILIES[kind]
    path = Path(source) / "config.json"
    if not path.is_file():
        if begun := sorted(Path(source).glob("checkpoint-*/config.json"), key=os.path.getmtime):
            raise FileNotFoundError(
                f"{source} has no config.json: its training has not ended; go on with it (resume_from_checkpoint), or "
                f"take its last checkpoint, {begun[-1].parent}"
            )
        raise FileNotFoundError(
            f"{source} has no config.json: it is neither a MusicGen checkpoint, nor AudioCraft's (state_dict.bin and "
            "compression_state_dict.bin), nor an adapter"
        )
    kind = read_json(path).get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{path} does not say which model it is of (model_type={kind!r}): {COPY_AGAIN}")
    if kind == "musicgen_melody":
        raise ValueError(
            f"{source} is a MusicGen-Melody model ({kind!r}), which reads its condition as a prefix and not by "
            "cross-attention: use a MusicGen without melody, such as facebook/musicgen-small"
        )
    if kind not in _FAMILIES:
        raise ValueError(
            f"{source} is a {kind!r} model, not a MusicGen; use a checkpoint such as facebook/musicgen-small"
        )
    return _FAMILIES[kind]


def holds_policy(folder: Path) -> bool:
    """Whether a folder holds a model of a known family, or an adapter of one."""
    import diverse_cfg.policies.musicgen.family  # noqa: F401  (it registers itself)

    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            base = (values.get("auto_mapping") or {}).get("base_model_class", "")
            return any(
                values.get("model_type") == family.model_type
                or base.startswith(family.model_class.__name__.split("For")[0])
                for family in _FAMILIES.values()
            )
    return False


def load_config(folder: str | os.PathLike) -> Any:
    """Configuration of a folder of any family; see `family_of`."""
    return family_of(folder).load_config(folder)


def load_generation_config(folder: str | os.PathLike) -> GenerationConfig | None:
    """How a folder says that it is sampled; None where it does not say.

    Raises:
        ValueError: the file is damaged, or a number in it is none.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return None
    content = read_json(path)
    if foreign := {"model_type", "architectures", "peft_type"} & content.keys():
        raise ValueError(
            f"{path} holds {min(foreign)}, so it is another file's content: copy or download it again"
        )
    for name, kind in _SAMPLING_NUMBERS.items():
        value = content.get(name)
        if value is None:
            continue
        if not isinstance(value, int | kind) or isinstance(value, bool) or not 0 <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{path}: {name}={value!r} must be {what} of at least 0; correct it, or {COPY_AGAIN}"
            )
    with reading(path):
        return GenerationConfig.from_pretrained(str(folder))


def own_settings(folder: Path, base: GenerationConfig) -> GenerationConfig:
    """How an adapter is sampled that was not distilled: as its base, but for what its own file names."""
    if load_generation_config(folder) is None:
        return base
    return GenerationConfig.from_dict(base.to_dict() | read_json(folder / "generation_config.json"))


def has_processor_files(folder: Path) -> bool:
    """Whether a folder has a tokenizer and processor of its own, or a part of them; an adapter may have its base's."""
    return any((folder / name).exists() for name in PROCESSOR_FILES)


def tokenizer_vocabulary(folder: Path) -> dict[str, int] | None:
    """Piece → id of the tokenizer in a folder; None where there is none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with reading(folder, PROCESSOR_REMEDY):
        return AutoTokenizer.from_pretrained(str(folder)).get_vocab()


def declared_settings(config: PreTrainedConfig, *, changed: bool = False) -> dict[str, Any]:
    """What a configuration class declares and two checkpoints of one architecture share, name → value."""
    usual, stored = type(config)().to_dict(), config.to_dict()
    declared = usual.keys() - PreTrainedConfig().to_dict().keys() - _NOT_ARCHITECTURE
    if changed:
        declared = {name for name in declared if stored.get(name) != usual[name]}
    return {"model_type": config.model_type} | {name: stored.get(name) for name in sorted(declared)}

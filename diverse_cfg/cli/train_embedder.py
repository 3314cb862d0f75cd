"""`diverse-cfg train-embedder`: the space in which diversity is measured, learned from recordings or clips."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from diverse_cfg.cli.command import SEED, Command, model_source, number, prompt_source, refuse_idle

if TYPE_CHECKING:
    from diverse_cfg.embeddings.recordings import Recordings

_CLIPS_AT_ONCE = 64


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", metavar="FOLDER", help="audio files, or what `diverse-cfg generate` wrote")
    source.add_argument(
        "--codes", metavar="FOLDER", help="an evaluation's output folder: the codes of --model's clips there"
    )
    source.add_argument(
        "--prompts",
        metavar="SOURCE",
        help="sample clips of --model now, for these prompts (`nano`, `nano-open`: the shipped ones)",
    )
    add("--output", "-o", required=True, help="folder to create, for `diversity_embedder`")
    add("--model", help="folder or Hub id of the model whose codes are read, or `nano`")
    add("--prompts-split", help="of --prompts (default: train)")
    add(
        "--num-generations",
        type=number(int, 1),
        metavar="G",
        help="clips per prompt of --prompts (default: 4)",
    )
    add(
        "--seconds",
        type=number(float, 0, above=True),
        help="length of --prompts' clips (default: the model's own)",
    )
    add(
        "--guidance-scale",
        type=number(float, 1),
        metavar="γ",
        help="of --prompts' clips (default: the model's own)",
    )
    add(
        "--negatives",
        choices=["any", "same-prompt"],
        default="any",
        help="what a clip is told apart from: any other, as in the paper (default), or those of its own prompt, "
        "so that what the prompt fixes does not count",
    )
    add(
        "--chunk-seconds",
        type=number(float, 0, above=True),
        help="half of a pair (default: half of the shortest recording, at most 5)",
    )
    add("--sampling-rate", type=number(int, 1), help="of audio, in Hz (default: that of most files)")
    add("--size", choices=["small", "paper"], default="small", help="of the encoder (default: small)")
    add("--steps", type=int, default=1500, help="default: 1500")
    add("--batch-size", type=int, default=64, help="recordings of a step (default: 64)")
    add("--learning-rate", type=float, default=1e-3, help="default: 0.001")
    add("--held-out", type=float, default=0.1, help="share to measure on (default: 0.1)")
    add("--seed", type=SEED, default=0, help="same seed, same encoder (default: 0)")
    add("--device", help="torch device (default: a GPU if there is one)")


def _run(args: argparse.Namespace) -> None:
    import json

    from diverse_cfg.atomic import new_folder, require_new, write_text
    from diverse_cfg.provenance import library_versions

    require_new(args.output)
    if args.audio is not None:
        refuse_idle(args, "model", "with --audio, of which no codes are read")
    if args.prompts is None:
        refuse_idle(
            args,
            "prompts_split num_generations seconds guidance_scale",
            "without --prompts, which samples clips",
        )
    elif Path(prompt_source(args.prompts)).is_file():
        refuse_idle(args, "prompts_split", "for a file, which has no splits")
    args.num_generations = args.num_generations or 4
    if args.audio is None and args.model is None:
        raise ValueError("--codes and --prompts need --model: codes mean something to their own codec only")

    from diverse_cfg.embeddings.training import check_settings, encoder_config, train_embedder
    from diverse_cfg.policies.loading import torch_device

    names = ("negatives", "steps", "batch_size", "learning_rate", "held_out")
    settings = {name: getattr(args, name) for name in names}
    check_settings(**settings)
    args.device = torch_device(args.device)
    with new_folder(args.output) as folder:
        recordings = _recordings(args)
        config = encoder_config(recordings, args.size)
        trained = train_embedder(recordings, config, **settings, seed=args.seed, device=args.device)
        measured = {
            "recordings": trained.num_held_out,
            "retrieval_at_1": trained.retrieval,
            "chance": trained.chance,
        }
        facts = settings | {
            "seed": args.seed,
            "recordings": len(recordings),
            "chunk_seconds": recordings.chunk_seconds,
            "held_out": measured,
            "versions": library_versions(),
        }
        trained.embedder.save_pretrained(folder)
        write_text(folder / "training.json", json.dumps(facts, indent=2) + "\n")
    print(
        f"retrieval@1 of {trained.num_held_out} held-out recordings: {trained.retrieval:.3f} (chance "
        f"{trained.chance:.3f}); reads {recordings.reads}; use it with diversity_embedder: {args.output}"
    )


def _recordings(args: argparse.Namespace) -> "Recordings":
    from diverse_cfg.embeddings.recordings import AudioRecordings

    if args.audio is not None:
        return AudioRecordings.from_folder(args.audio, args.sampling_rate, args.chunk_seconds)
    if args.sampling_rate is not None:
        raise ValueError(f"--sampling-rate {args.sampling_rate} is of audio; codes have that of their codec")
    return _sampled(args) if args.codes is None else _stored(args)


def _stored(args: argparse.Namespace) -> "Recordings":
    """The clips that an evaluation has kept, of every system that --model's codec belongs to."""
    import json

    import torch
    from safetensors import safe_open

    from diverse_cfg.policies.families import family_of
    from diverse_cfg.policies.stored import locate
    from diverse_cfg.reading import reading

    folder = Path(args.codes)
    files = sorted(path for path in folder.rglob("*.safetensors") if path.parent.name == "generations")
    if not files:
        raise ValueError(f"{folder} holds no generations: name the output folder of diverse-cfg evaluate")
    clips, prompts = [], []
    for path in files:
        with reading(path, "run the evaluation again"), safe_open(path, framework="numpy") as file:
            description = json.loads((file.metadata() or {}).get("description", "{}"))
            clips += torch.from_numpy(file.get_tensor("codes")).unbind()
            prompts += [
                prompt for prompt in description["prompts"] for _ in range(description["num_generations"])
            ]
    folder = locate(model_source(args.model))
    family = family_of(folder)
    return _code_recordings(args, family, family.load_config(folder), clips, prompts)


def _sampled(args: argparse.Namespace) -> "Recordings":
    """Clips that --model generates now."""
    from tqdm import tqdm

    from diverse_cfg.policies.loading import load_policy, load_processor
    from diverse_cfg.policies.policy import as_policy
    from diverse_cfg.policies.sampler.rollout import RolloutWeights, fast_generate
    from diverse_cfg.prompts import load_prompts

    texts = list(load_prompts(prompt_source(args.prompts), split=args.prompts_split or "train")["prompt"])
    source = model_source(args.model)
    model = load_policy(source)
    processor = load_processor(source)
    model.to(args.device)
    policy = as_policy(model, processor)
    seconds = args.seconds or policy.usual_seconds
    own = model.generation_config.guidance_scale or 1.0
    weights = RolloutWeights.from_model(model)
    per_call = max(1, _CLIPS_AT_ONCE // max(1, args.num_generations))
    clips, prompts = [], []
    with tqdm(total=len(texts) * args.num_generations, desc="sample", unit="clip") as bar:
        for start in range(0, len(texts), per_call):
            some = texts[start : start + per_call]
            first, count = start * args.num_generations, len(some) * args.num_generations
            rollout = fast_generate(
                model,
                some,
                processor=processor,
                num_frames=max(1, round(seconds * policy.frame_rate)),
                guidance_scale=own if args.guidance_scale is None else args.guidance_scale,
                seed=args.seed,
                num_generations=args.num_generations,
                sample_ids=range(first, first + count),
                decode=False,
                weights=weights,
            )
            clips += rollout.codes.cpu().unbind()
            prompts += [prompt for prompt in some for _ in range(args.num_generations)]
            bar.update(count)
    return _code_recordings(args, policy.family, model.config, clips, prompts)


def _code_recordings(
    args: argparse.Namespace, family, config, clips: list, prompts: list[str]
) -> "Recordings":
    from diverse_cfg.embeddings.recordings import CodeRecordings

    model = family.describe(config)
    if len(clips[0]) != model["codebooks"]:
        raise ValueError(
            f"the clips have {len(clips[0])} codebooks, {args.model} has {model['codebooks']}: name "
            "the model that generated them"
        )
    return CodeRecordings(
        clips,
        sampling_rate=model["sampling_rate"],
        frame_rate=round(1 / family.frames_to_seconds(1, config)),
        codebook_size=model["codebook_size"],
        chunk_seconds=args.chunk_seconds,
        prompts=prompts,
    )


COMMAND = Command(
    name="train-embedder",
    summary="train the encoder in which diversity is a distance, on audio or on clips of a model",
    add_arguments=_add_arguments,
    run=_run,
    resume="nothing was written; run it again to start over",
)

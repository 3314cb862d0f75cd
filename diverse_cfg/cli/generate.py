"""`diverse-cfg generate`: clips of any MusicGen as WAV files, sampled as the model's own settings say."""

import argparse
from pathlib import Path
from typing import Any

from diverse_cfg.cli.command import Command, model_source, number, prompt_source, refuse_idle

# AudioCraft's own setting; the released generation configs leave it out, and transformers would take 50.
USUAL_TOP_K = 250


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="folder or Hub id of a model or adapter, or `nano` for the shipped base",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        help="a LoRA adapter to apply to --model; with --merge-weight, an expert (repeatable)",
    )
    add(
        "--merge-weight",
        type=float,
        nargs="+",
        metavar="λ",
        help="mix the experts of --adapter: the weight of the second of two, or one weight each",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", help="a text (repeatable)")
    what.add_argument(
        "--prompts", metavar="SOURCE", help="a file, folder or Hub dataset of texts, `nano`, `nano-open`"
    )
    add("--prompts-split", help="split of a folder or dataset (default: test)")
    add("--prompt-column", help="column of --prompts that holds the texts (default: prompt)")
    add("--output", required=True, help="folder for the WAV files; new, empty, or begun with --resume")
    add("--resume", action="store_true", help="go on with a folder that the same command has begun")
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--num-generations", type=number(int, 1), default=1, metavar="G", help="clips per prompt (default: 1)"
    )
    many.add_argument(
        "--takes",
        type=number(int, 1),
        metavar="G",
        help="clips per prompt that can be continued: codes beside each, and a page to listen",
    )
    add("--of", type=number(int, 2), metavar="M", help="sample M, keep the --takes that differ most")
    add(
        "--encoder", help="in whose eyes --of compares (default: nano's for nano and its students, else CLAP)"
    )
    add("--first", metavar="MODEL", help="a model that begins, before --model goes on: the base, say")
    add("--first-frames", type=number(int, 1), metavar="N", help="how much --first plays, in frames")
    add("--first-guidance-scale", type=float, metavar="γ", help="of --first (default: its own)")
    add("--extend", metavar="FILE", help="go on from this take or audio file, up to --seconds in all")
    add("--seed", type=number(int, 0, 2**64 - 1), help="same seed, same clips (default: 0)")
    add(
        "--seconds",
        type=number(float, 0, above=True),
        help="length (default: own, at most 10); over 30, window by window",
    )
    add("--guidance-scale", type=float, metavar="γ", help="default: the model's own; 1 is no guidance")
    add(
        "--student-guidance",
        type=float,
        metavar="γ",
        help="γ that a student of a range plays, at no cost (default: as its card says, mostly 3)",
    )
    add(
        "--guidance-schedule",
        metavar="NAME",
        help="γ over the clip: linear or cosine (down to 1), 'interval A B' of places in [0, 1], or 'adaptive E N': no "
        "null rows once they have differed by less than E, a total variation, for N steps",
    )
    add("--negative-prompt", help="text to be guided away from, instead of no text")
    add("--temperature", type=float, help="default: the model's own, or 1; 0 is greedy")
    add("--top-k", type=int, help=f"default: the model's own, or {USUAL_TOP_K}; 0 keeps all codes")
    add("--top-p", type=float, help="default: 1, which keeps all codes")
    add("--min-p", type=float, help="default: 0, which keeps all codes")
    add(
        "--sample-format",
        choices=["int16", "float32"],
        default="int16",
        help="of the WAV files (default: int16)",
    )
    add("--batch-size", type=number(int, 1), default=16, help="clips at once (default: 16)")
    add("--device", help="torch device (default: a GPU if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the decoder")
    add(
        "--rollout-backend",
        choices=["fast", "transformers"],
        default="fast",
        help="our sampling loop, or stock `generate`: the same clips, slower",
    )


def _run(args: argparse.Namespace) -> None:
    from diverse_cfg.atomic import writing
    from diverse_cfg.prompts import load_prompts

    _check_takes(args)
    if args.prompts is None:
        refuse_idle(args, "prompts_split prompt_column", "with --prompt")
        prompts = load_prompts(args.prompt)["prompt"] if args.prompt else None
    else:
        source = prompt_source(args.prompts)
        if Path(source).is_file():
            refuse_idle(args, "prompts_split", "for a file, which has no splits")
        split, column = args.prompts_split or "test", args.prompt_column
        prompts = load_prompts(source, split=split, column=column, default_split="test")["prompt"]
    args.num_generations = args.takes or args.num_generations
    if args.temperature == 0:
        refuse_idle(args, "seed top_k top_p min_p", "at temperature 0, which takes the most likely codes")
        if args.num_generations > 1:
            name = "takes" if args.takes else "num-generations"
            raise ValueError(
                f"--{name} {args.num_generations} at temperature 0 is the same clip every time: leave it out"
            )
    if args.guidance_scale == 1:
        idle = "negative_prompt guidance_schedule"
        refuse_idle(args, idle, "with --guidance-scale 1, which guides away from nothing")
    names = ("guidance_scale", "temperature", "top_k", "top_p", "min_p")
    typed = {name: value for name in names if (value := getattr(args, name)) is not None}
    output = Path(args.output)
    with writing(output):
        begun = output.is_dir() and any(output.iterdir())
    if begun and not args.resume:  # before the model is loaded
        raise ValueError(f"{output} is not empty: choose another --output, or add --resume to go on with it")

    import torch

    from diverse_cfg.functional.guidance import adaptive_guidance, guidance_schedule
    from diverse_cfg.policies.files import generate_files
    from diverse_cfg.policies.loading import load_processor, torch_device
    from diverse_cfg.policies.policy import as_policy
    from diverse_cfg.policies.sampler.draws import SamplingSettings
    from diverse_cfg.policies.takes import load_take

    device = torch_device(args.device)
    if args.guidance_schedule is not None:
        _ = adaptive_guidance(args.guidance_schedule) or guidance_schedule(args.guidance_schedule, 2.0, 2)
    SamplingSettings(**typed)  # in range
    if args.first_guidance_scale is not None:
        SamplingSettings(args.first_guidance_scale)
    source = model_source(args.model)
    how: dict[str, Any] = {"of": args.of, "choose": _chooser(args, source)} if args.of else {}
    model: Any = _load(source, args.adapter, args.merge_weight, args.student_guidance)
    policy = as_policy(model)
    sampling = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": USUAL_TOP_K}
    own = {name: getattr(model.generation_config, name) for name in sampling}
    sampling |= {name: value for name, value in own.items() if value is not None} | typed
    if sampling["guidance_scale"] == 1:
        where = "for a model that plays with γ = 1 (name another with --guidance-scale)"
        refuse_idle(args, "negative_prompt guidance_schedule", where)
    name = " + ".join([args.model, *args.adapter])
    if args.merge_weight:
        name += f" at {' '.join(f'{weight:g}' for weight in args.merge_weight)}"
    if args.student_guidance is not None:
        name += f", student γ {args.student_guidance:g}"
    num_frames = max(1, round((args.seconds or policy.usual_seconds) * policy.frame_rate))
    if adaptive := adaptive_guidance(args.guidance_schedule or ""):
        sampling["adaptive_guidance"] = adaptive
    elif args.guidance_schedule is not None:
        scale = sampling["guidance_scale"]
        sampling["guidance_scale"] = guidance_schedule(args.guidance_schedule, scale, num_frames)
    if args.extend:
        take = load_take(model, args.extend)
        how["beginning"], prompts = take.codes, prompts or take.prompts
        if prompts is None:
            raise ValueError(f"the codes beside {args.extend} name no prompt: name one with --prompt")
    if args.first:
        how["first"] = begins = _load(model_source(args.first), [], None, None).to(device)
        own = begins.generation_config.guidance_scale
        how["first_guidance_scale"] = (
            (own or 1.0) if args.first_guidance_scale is None else args.first_guidance_scale
        )
        how["first_frames"] = args.first_frames
        name = f"{args.first}, then {name}"
    names = ("num_generations", "negative_prompt", "sample_format", "resume", "batch_size", "rollout_backend")
    clips = generate_files(
        model.to(device),
        list(prompts or []),
        args.output,
        processor=load_processor(source),
        num_frames=num_frames,
        seed=args.seed or 0,
        model_name=name,
        dtype=getattr(torch, args.dtype),
        takes=bool(args.takes),
        **how,
        **sampling,
        **{name: getattr(args, name) for name in names},
    )
    if not args.takes:
        print(f"{len(clips)} clips in {args.output}")
        return
    rows = sum(clip["decoder_rows"] for clip in clips) / len(clips)
    print(f"{len(clips)} takes in {args.output}, {rows:g} decoder rows each; listen: {output / 'index.html'}")


def _check_takes(args: argparse.Namespace) -> None:
    """Refuse a call without a prompt, a choice of nothing, and an `--extend` that cannot go on."""
    if args.of is None:
        refuse_idle(args, "encoder", "without --of")
    elif args.takes is None or args.takes >= args.of:
        raise ValueError(f"--of {args.of} needs --takes, a smaller number of clips to keep")
    if args.first is None:
        refuse_idle(args, "first_frames first_guidance_scale", "without --first")
    elif args.first_frames is None:
        raise ValueError("--first needs --first-frames, how much it plays")
    if args.extend is None:
        if not args.prompt and not args.prompts:
            raise ValueError("one of the arguments --prompt --prompts is required")
        return
    refuse_idle(args, "first", "with --extend, where the take is what begins")
    if args.seconds is None:
        raise ValueError("--extend needs --seconds, the length of the whole clip")
    if not Path(args.extend).is_file():
        raise FileNotFoundError(f"--extend {args.extend}: there is no such file")
    beside = Path(args.extend).with_suffix(".safetensors")
    if not args.prompt and not args.prompts and not beside.is_file():
        raise ValueError(f"there are no codes at {beside} that name a prompt: name one with --prompt")


def _chooser(args: argparse.Namespace, source: str) -> Any:
    """Which of a prompt's samples are kept."""
    from functools import partial

    from diverse_cfg.embeddings import load_embedder
    from diverse_cfg.subset import diverse_subset
    from diverse_cfg.trainer.setup import default_embedder

    encoder = args.encoder or default_embedder(source)
    embedder = load_embedder(encoder, device=args.device)
    return partial(diverse_subset, count=args.takes, embedder=embedder)


def _load(source: str, adapters: list[str], merge_weight: list[float] | None, student_guidance: float | None):
    if merge_weight is None:
        if len(adapters) > 1:
            raise ValueError(
                f"{len(adapters)} times --adapter needs --merge-weight, which says how to mix them"
            )
        from diverse_cfg.policies.loading import load_policy
        from diverse_cfg.policies.policy import as_policy

        model = load_policy(source, adapter=adapters[0] if adapters else None)
        if student_guidance is not None:
            as_policy(model).fold_guidance(student_guidance)
        return model
    if len(adapters) < 2:
        raise ValueError(
            f"--merge-weight mixes two or more experts: name each with --adapter, got {len(adapters)}"
        )
    from diverse_cfg.merging import load_slider, resolve_weights

    weight = merge_weight[0] if len(merge_weight) == 1 else merge_weight
    resolved = resolve_weights(weight, len(adapters), extrapolate=True, unnormalized=True)
    if min(resolved) < 0 or abs(sum(resolved) - 1) > 1e-6:
        raise ValueError(
            f"--merge-weight {' '.join(f'{number:g}' for number in merge_weight)} gives the experts {resolved}: name "
            "weights in [0, 1] that sum to 1, or write the model with `diverse-cfg merge`, which takes others too"
        )
    return load_slider(source, adapters, merge_weight=weight, student_guidance=student_guidance).model


COMMAND = Command(
    name="generate",
    summary="generate clips for prompts with any MusicGen, student, adapter or merge",
    add_arguments=_add_arguments,
    run=_run,
    resume="clips that are there are kept; add --resume to go on",
)

"""`diverse-cfg convert`: a MusicGen from AudioCraft's format into transformers', or back."""

import argparse

from diverse_cfg.cli.command import Command, model_source

FORMATS = ("transformers", "audiocraft")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        help="folder or Hub id of a model, adapter or AudioCraft checkpoint, or `nano` for the shipped base",
    )
    add("--to", choices=FORMATS, required=True, help="the format to write")
    add("-o", "--output", required=True, help="folder to create")
    add(
        "--text-encoder",
        metavar="T5",
        help="to transformers: folder or Hub id of the T5, if it is not found by its name; to audiocraft: the "
        "name of the T5 that AudioCraft is to load",
    )
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the language model, with --to audiocraft (default: float32; AudioCraft's releases are float16)",
    )


def _run(args: argparse.Namespace) -> None:
    from diverse_cfg.atomic import new_folder, require_new
    from diverse_cfg.policies.audiocraft import folders
    from diverse_cfg.policies.tensors import require_finite

    source = model_source(args.model)
    require_new(args.output)
    stored_as = "audiocraft" if folders.is_audiocraft(source) else "transformers"
    if stored_as == args.to:
        remedy = "; `diverse-cfg merge` makes a full model of an adapter" if args.to == "transformers" else ""
        raise ValueError(f"{args.model} is in the format of {args.to} already{remedy}")
    if args.to == "transformers":
        if args.dtype:
            raise ValueError("--dtype goes with --to audiocraft: tensors are kept as they are stored here")
        stored = folders.read_audiocraft(source, text_encoder=args.text_encoder)
        require_finite(stored.state, args.model)
        folders.write_transformers(stored, args.output, like=folders.checkpoint_files(source)[0].parent)
    else:
        with new_folder(args.output) as folder:
            _to_audiocraft(source, folder, args.text_encoder, args.dtype)
    print(args.output)


def _to_audiocraft(source: str, folder, text_encoder: str | None, dtype: str | None) -> None:
    import shutil
    from pathlib import Path

    import torch

    from diverse_cfg.policies.audiocraft import export_audiocraft
    from diverse_cfg.policies.audiocraft.folders import find_file
    from diverse_cfg.policies.checkpoints import AdapterCheckpoint, open_checkpoint
    from diverse_cfg.policies.loading import load_policy, load_processor
    from diverse_cfg.policies.shift import SHIFT_FILE
    from diverse_cfg.provenance import PROVENANCE_FILE

    checkpoint = open_checkpoint(source, plain=False)
    if isinstance(checkpoint, AdapterCheckpoint):  # whose fault would be its base's, once it is merged
        checkpoint.require_finite()
    export_audiocraft(
        load_policy(source),
        folder,
        processor=load_processor(source),
        text_encoder=text_encoder,
        dtype=getattr(torch, dtype) if dtype else None,
    )
    for name in (PROVENANCE_FILE, SHIFT_FILE, "README.md"):  # what it is, and under which licence
        if path := find_file(source, name):
            shutil.copyfile(path, Path(folder) / name)


COMMAND = Command(
    name="convert",
    summary="convert a MusicGen between transformers' format and AudioCraft's",
    add_arguments=_add_arguments,
    run=_run,
    resume="nothing half-written is left; run it again",
)

"""Hugging Face models in and out.

python tools/convert_hf.py import Llama-2-7b-hf models/llama --pattern GLLL --window 512
python tools/convert_hf.py export models/zebra zebra-hf

import: a local folder with config.json and safetensors files (Llama, Mistral, Qwen3, Cwm, SmolLM3, GraniteSWA, or what
--remote-code has written) becomes a model folder, to train on (--checkpoint.init_from). export: a model folder becomes
a folder for AutoModelForCausalLM, of the class that is exactly this model; where there is none, the options are named
that stand in the way, and --remote-code exports it with a class of ours.

Needs the memory of the largest weight, whatever the model's size. Folders appear complete or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from byte_bar import byte_bar

from megazebra.hf.companions import TOKEN_IDS
from megazebra.launch import readable_errors

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)

    import torch  # takes seconds: after mistakes on the command line have shown

    from megazebra.checkpoint.new_folder import check_absent
    from megazebra.hf.exporting import HuggingFaceExport
    from megazebra.hf.importing import HuggingFaceImport

    conversion: HuggingFaceImport | HuggingFaceExport
    if options.command == "import":
        conversion = HuggingFaceImport(options.source, options.pattern, options.window)
        becomes = f"from {conversion.architecture}"
    else:
        ids = {name: getattr(options, name) for name in TOKEN_IDS}
        conversion = HuggingFaceExport(options.source, ids, remote_code=options.remote_code)
        becomes = f"to {conversion.architecture}" + (f", which needs {conversion.needs}" if conversion.needs else "")
    check_absent(options.target)
    config = conversion.config
    window = f", window {config.window}" if any(spec.is_local for spec in config.attention_specs()) else ""
    print(becomes)
    print(f"pattern {config.pattern} over {config.num_layers} layers{window}")
    print(f"{conversion.tensors:,} tensors, {conversion.bytes:,} bytes")
    print(f"with {', '.join(conversion.files) or 'no tokenizer or generation config'}")
    if options.dry_run:
        print(f"{options.target} would be written; nothing was, and no checksum of weights was compared (--dry-run)")
        return
    with byte_bar(f"{options.command}ing", conversion.bytes) as advance:
        conversion.write(
            options.target,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_file_bytes=options.max_file_bytes,
            on_write=advance,
        )
    print(f"wrote {options.target}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("source", type=Path, metavar="SOURCE", help="folder to read")
    shared.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    shared.add_argument("--dtype", choices=DTYPES, help="what weights are converted to (default: every bit is kept)")
    shared.add_argument(
        "--max-file-bytes", type=int, default=5 * 10**9, metavar="N",
        help="size of a file of weights; one larger weight has a file of its own (default: %(default)s)",
    )  # fmt: skip
    shared.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")

    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", parents=[shared], help="from a Hugging Face folder to a model folder")
    importing.add_argument("--pattern", metavar="GLLL", help="global and local layers (default: the model's own)")
    importing.add_argument(
        "--window", type=int, metavar="W", help="keys a local query sees, itself included (default: the model's own)"
    )
    exporting = commands.add_parser("export", parents=[shared], help="from a model folder to a Hugging Face folder")
    for name in TOKEN_IDS:
        exporting.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar="ID", help="(default: generation_config.json's)"
        )
    exporting.add_argument(
        "--remote-code", action="store_true",
        help="where no class is exactly this model: one of our own, whose code (modeling_zebra.py) lies beside the "
        "weights; it loads with trust_remote_code=True",
    )  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with readable_errors():
        main()

"""The command `jrl`: fit, validate, test, and one command for each thing that a run is good for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

TRAINING = ("fit", "validate", "test")
COMMANDS = {
    "generate": "jrl.training.generate",
    "probe": "jrl.downstream.command",
    "ground": "jrl.grounding.command",
    "segment": "jrl.segmentation.command",
    "segment-report": "jrl.grounding.segment_report",
    "ablate": "jrl.downstream.ablation",
    "demo": "jrl.demo",
}
GENERATION = ("generation-report", "generation-ablation", "scene-classifier", "human-rankings")
USAGE = """usage: jrl COMMAND [options]

  fit       train a system:         jrl fit --config configs/clip_emoji.yaml
  validate  evaluate on validation: jrl validate --config RUN/config.yaml --run RUN
  test      evaluate on the test:   jrl test --config RUN/config.yaml --run RUN
  retrieve  find pictures:          jrl retrieve --run RUN "a red flag"
  embed     embed a folder:         jrl embed --run RUN --images FOLDER --out embeddings.safetensors
  generate  draw descriptions:      jrl generate --run RUN "a red circle left of a blue square"
  probe     test the encoder:       jrl probe --run RUN --tasks classification,segmentation
  ground    find phrases by words:  jrl ground --run RUN --image FILE --caption "a red flag"
  segment   name every pixel:       jrl segment --run RUN --classes "cat, dog, background" FILE
  ablate    compare variants:       jrl ablate --out runs/ablation
  demo      train on colour emoji:  jrl demo --out runs/demo

  segment-report       score GroupViT:     jrl segment-report --run RUN
  generation-report    judge a generator:  jrl generation-report --run RUN --features DIR --encoder RUN
  generation-ablation  compare generators: jrl generation-ablation --run full=RUN --run none=RUN ...
  scene-classifier     train its judge:    jrl scene-classifier --out runs/scene_classifier
  human-rankings       sum up annotators:  jrl human-rankings --file FILE.csv --out DIR

`jrl COMMAND --help` lists the options; --traceback shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; those of the process when None.

    Returns:
        0, or 2 after an error, which is printed in one line (`--traceback` raises it instead).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command in TRAINING:
            from jrl.training.command import run_command

            try:
                run_command(arguments)
            except SystemExit as stop:
                # Lightning ends the process with 1 on Ctrl-C; the parser ends it with 0 or 2
                if stop.code != 1:
                    raise
                raise KeyboardInterrupt from stop
            return 0
        if command == "retrieve":
            return _retrieve(rest)
        if command == "embed":
            return _embed(rest)
        if command in COMMANDS:
            # a command imports what it needs, and no other command's
            return int(import_module(COMMANDS[command]).main(rest) or 0)
        if command in GENERATION:
            from jrl.generation.command import main as generation

            return generation(command, rest)
        known = (*TRAINING, "retrieve", "embed", *COMMANDS, *GENERATION)
        raise ValueError(f"command: expected one of {', '.join(known)}, got {command!r}")
    except KeyboardInterrupt:
        print("jrl: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback:
            raise
        print(f"jrl: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _retrieve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jrl retrieve", description="Find the pictures that fit a text best."
    )
    parser.add_argument("query", nargs="+", help="one or more texts")
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument(
        "--images", help="folder of pictures to search; those the run was trained with otherwise"
    )
    parser.add_argument("--k", type=int, default=10, help="how many pictures a text")
    parser.add_argument("--out", help="picture of the results; RUN/retrieve.png otherwise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    options = parser.parse_args(arguments)
    if options.k < 1:
        raise ValueError(f"k: expected at least 1, got {options.k}")

    from rich.console import Console
    from rich.table import Table

    from jrl.data.images import check_format, load_image, save_image
    from jrl.data.sample import ImageSource
    from jrl.training.command import data_module_of
    from jrl.training.files import check_file
    from jrl.training.run import Run, image_files, picture_grid

    out = check_file("out", options.out or Path(options.run) / "retrieve.png")
    check_format(out)
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    text = run.encode_texts(options.query)
    captions: list[str] = []
    if options.images:
        files = image_files(options.images)
        pictures: list[tuple[str, ImageSource]] = [
            (str(path.relative_to(options.images)), path) for path in files
        ]
    else:
        data = data_module_of(options.run)
        data.setup("predict")
        samples = [sample for part in data.parts for sample in data.samples(part)]
        pictures = [(sample.key, sample.image) for sample in samples]
        captions = [sample.captions[0] if sample.captions else "" for sample in samples]
    image, kept, skips = run.encode_images(pictures)
    if skips.skipped:
        print(skips.summary(), file=sys.stderr)
    scores, found = (text @ image.T).topk(min(options.k, len(kept)), dim=1)
    shown = []
    console = Console()
    for query, row_scores, row in zip(options.query, scores.tolist(), found.tolist(), strict=True):
        table = Table(title=query)
        for heading in ("rank", "cosine", "picture", *(["caption"] if captions else [])):
            table.add_column(heading, justify="right" if heading in ("rank", "cosine") else "left")
        for rank, (score, position) in enumerate(zip(row_scores, row, strict=True), start=1):
            name, source = pictures[kept[position]]
            caption = [captions[kept[position]]] if captions else []
            table.add_row(str(rank), f"{score:.3f}", name, *caption)
            shown.append(load_image(source, name=name))
        console.print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = len(found[0]) if len(options.query) > 1 else 5
    save_image(picture_grid(shown, columns=columns), out)
    console.print(f"saved {out}")
    return 0


def _embed(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="jrl embed", description="Embed every picture of a folder.")
    parser.add_argument("--run", required=True, help="folder of a run")
    parser.add_argument("--images", required=True, help="folder of pictures, searched with its subfolders")
    parser.add_argument(
        "--out", required=True, help="safetensors file: `embeddings` [N, D], names in the metadata"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allow-pickle", action="store_true", help="take pickled weights")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ValueError(f"batch-size: expected at least 1, got {options.batch_size}")

    from jrl.training.files import check_file
    from jrl.training.run import Run, image_files, write_embeddings

    check_file("out", options.out)
    files = image_files(options.images)
    names = [str(path.relative_to(options.images)) for path in files]
    run = Run.load(options.run, device=options.device, allow_pickle=options.allow_pickle)
    embeddings, kept, skips = run.encode_images(list(zip(names, files, strict=True)), options.batch_size)
    write_embeddings(options.out, embeddings, [names[position] for position in kept])
    print(f"{options.out}: {len(kept)} pictures, {skips.summary()}")
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "ArgumentError":
        return text
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; pip install 'jrl[train]' installs what the commands need"
    # these say in words what is wrong; of anything else the type helps too
    plain = isinstance(error, (OSError, ValueError, TypeError, FloatingPointError, NotImplementedError))
    return text if plain else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main())

"""Build a benchmark from images and videos that the model was not trained on.

mimicbrush benchmark --dreambooth DIR --output BENCH
    inner-ID and inter-ID tracks from the DreamBooth dataset
mimicbrush benchmark --pictures DIR --output BENCH
    the same from any folder with one folder of images per subject
mimicbrush benchmark --pairs MINED --against PIPELINE --output BENCH
    inner-ID cases from videos that PIPELINE was not trained on

The folder has the layout of the released benchmark. Masks are boxes placed by
hand (DreamBooth), boxes around SIFT matches, or your own. For your own masks:

  mimicbrush benchmark ... --to-paint TODO    copy the images without a mask
  mimicbrush paint TODO --output MASKS        paint the masks in the browser
  mimicbrush benchmark ... --masks MASKS      build with them

MASKS has files such as MASKS/part/dog/01.png and MASKS/subject/dog/01.png.
"""

from __future__ import annotations

from pathlib import Path

from mimicbrush.cli.project_files import DATA_MANIFESTS
from mimicbrush.evaluation.benchmark_builder.options import PAPER_CASES, BuildOptions
from mimicbrush.io.locks import hold_name
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.ranges import CommandParser, range_of

MANIFEST = DATA_MANIFESTS / "dreambooth_inner_id.jsonl"


def main() -> None:
    """Build a benchmark, and print what is in it and what was skipped."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="BENCH",
        help="folder for the benchmark; an older benchmark is replaced",
    )
    add(
        "--dreambooth",
        type=Path,
        metavar="DIR",
        help="folder of the DreamBooth dataset, or a clone of google/dreambooth",
    )
    add(
        "--manifest",
        type=Path,
        default=MANIFEST,
        metavar="FILE",
        help=f"pairs of images of DreamBooth (default: {MANIFEST.name})",
    )
    add("--pictures", dest="images", type=Path, metavar="DIR", help="folder with one folder of images per subject")
    add(
        "--pairs",
        type=Path,
        action="append",
        default=[],
        metavar="MINED",
        help="folder of mined videos; can be repeated",
    )
    add("--masks", type=Path, metavar="DIR", help="folder of masks to use instead of boxes")
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="pipeline or mined folder; files that it was made from are not used; can be repeated",
    )
    seed, most, side_px = (range_of(BuildOptions, name).read for name in ("seed", "most", "long_side_px"))
    add("--seed", type=seed, default=0, help="seed of all random choices (default: 0)")
    add(
        "--most",
        type=most,
        metavar="N",
        help="use at most N cases per track and kind of source (default: 120 and 30, as in the paper)",
    )
    add(
        "--long-side-px",
        type=lambda text: None if text == "0" else side_px(text),
        default=1024,
        metavar="N",
        help="reduce images with a longer side than this; 0: never (default: 1024)",
    )
    add("--to-paint", type=Path, metavar="DIR", help="copy the images without a mask to this folder")
    arguments = parser.parse_args()

    from mimicbrush.data.manifest import check_outside_mined_folder
    from mimicbrush.evaluation.benchmark.layout import TRACKS
    from mimicbrush.evaluation.benchmark_builder.build import build_benchmark

    options = BuildOptions(
        dreambooth=arguments.dreambooth,
        images=arguments.images,
        pairs=tuple(arguments.pairs),
        manifest=arguments.manifest,
        masks=arguments.masks,
        against=tuple(arguments.against),
        seed=arguments.seed,
        most=arguments.most,
        long_side_px=arguments.long_side_px,
        to_paint=arguments.to_paint,
    )
    check_outside_mined_folder(arguments.output, f"--output {arguments.output}")
    check_output_folder(arguments.output, "--output", is_replaced=True)
    if arguments.to_paint is not None:
        check_output_folder(arguments.to_paint, "--to-paint")
    with hold_name(arguments.output):
        built = build_benchmark(arguments.output, options)
    for fault in built.faults:
        print(f"skipped: {fault.path}: {fault.reason}")
    for note in built.notes:
        print(f"note: {note}")
    for track, cases in built.cases.items():
        groups = ", ".join(f"{group} {n}" for group, n in sorted(built.groups.items()))
        which = f" ({groups})" if track == "part_inter" and groups else ""
        missing = max(0, PAPER_CASES[track] - cases)
        print(
            f"{TRACKS[track].title}: {cases} cases{which}; the paper has {PAPER_CASES[track]}"
            + (f" ({missing} are missing)" if missing else "")
        )
    unmasked = " and ".join(f"{n} without a {name} mask" for name, n in built.unmasked.items())
    where = f"; they were copied to {arguments.to_paint} to be painted" if arguments.to_paint else ""
    print(f"images that could give more cases: {unmasked}{where}")
    print(f"{len(built.faults)} items were skipped; the benchmark is in {arguments.output}")

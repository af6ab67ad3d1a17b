"""Encoded views: what they depend on, how they are encoded once, and the check before a run trains from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from mimicbrush.assembly.build import build_components, choose_frozen_dtype, read_pair_sources
from mimicbrush.assembly.config import TrainConfig, apply_pipeline_conventions, flatten_config
from mimicbrush.assembly.prerequisites import check_prerequisites, compose_training
from mimicbrush.errors import DataError, InputError
from mimicbrush.io.locks import LOCK_NAME, hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.io.settings_file import find_setting_differences
from mimicbrush.io.text import in_bytes
from mimicbrush.models.options import ModelOptions
from mimicbrush.types import ENCODED_TENSORS

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from mimicbrush.data.encoded_views import EncodedFolder
    from mimicbrush.data.pair_sources import PairSource
    from mimicbrush.training.objective import FrozenEncoders
    from mimicbrush.types import EncodedViews

#: The options that decide what encoded views hold.
_DECIDES = (
    "data.fixed_views",
    "data.geometry.*",
    "data.jitter.*",
    "data.share_flips",
    "data.mask.*",
    "data.num_matches",
    "model.size_px",
    "model.reference_encoder",
    "model.depth_convention",
    "model.no_depth_convention",
    "train.mixed_precision",
)
_NETWORKS = "frozen networks"
#: Number of values of each tensor of a network that are hashed.
_HASHED_VALUES = 4096


def collect_view_settings(config: DictConfig, pair_sources: Sequence[PairSource]) -> dict[str, Any]:
    """Collect what encoded views depend on, except the frozen networks: option -> value, and the pairs."""
    options = {
        name: value
        for name, value in flatten_config(config).items()
        if any(fnmatchcase(name, pattern) for pattern in _DECIDES)
    }
    if options.get("model.reference_encoder") == "shared":
        options["model.reference_encoder"] = "unet"  # the encoded views do not depend on which U-Net reads
    pairs = {f"pairs {n} ({source.name})": _describe_pairs(source) for n, source in enumerate(pair_sources)}
    return {**options, **pairs}


def _describe_pairs(source: PairSource) -> str:
    """The number of pairs, and a hash of what they are: their ids, images and numbers of matches and segments."""
    digest = hashlib.sha256(source.pairs.digest().encode())
    for name in ("source_hash", "a_sha256", "b_sha256"):
        digest.update("\n".join(source.pairs.column(name)).encode())
    for name in ("a_points", "segments"):
        digest.update(source.pairs.lengths(name).tobytes())
    return f"{len(source.pairs)} ({digest.hexdigest()[:16]})"


def hash_networks(encoders: FrozenEncoders) -> str:
    """Hash frozen networks by the shapes and some values of their tensors, as they were loaded."""
    import torch

    digest = hashlib.sha256(str(encoders.vae.config.scaling_factor).encode())
    for module in (encoders.vae, encoders.image_encoder, encoders.depth_estimator):
        digest.update(type(module).__name__.encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            values = tensor.detach().flatten()[:: max(1, tensor.numel() // _HASHED_VALUES)]
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_encoded_views(config: DictConfig, pair_sources: Sequence[PairSource]) -> EncodedFolder:
    """Open `data.encoded_views`, and check that its options and pairs are those of the run.

    Raises:
        DataError: there is none, it is not finished, or it was encoded with other settings; names these.
    """
    from mimicbrush.data.encoded_views import open_encoded_folder

    folder = open_encoded_folder(Path(config.data.encoded_views))
    expected = collect_view_settings(config, pair_sources)
    _refuse_differences(folder, {**expected, _NETWORKS: folder.settings.get(_NETWORKS)}, "data.encoded_views=")
    return folder


def check_encoders_of(folder: EncodedFolder, encoders: FrozenEncoders) -> None:
    """Check that views were encoded by these frozen networks.

    Raises:
        DataError: they were not.
    """
    _refuse_differences(folder, {**folder.settings, _NETWORKS: hash_networks(encoders)}, "data.encoded_views=")


def _refuse_differences(folder: EncodedFolder, expected: dict[str, Any], named: str) -> None:
    if differences := find_setting_differences(folder.settings, expected):
        lines = "\n".join(f"  {each}" for each in differences)
        raise DataError(
            f"{named}{folder.path} was encoded with other settings:\n{lines}\n"
            "Use the settings of the folder, or encode into another folder with mimicbrush encode-views"
        )


def encode_views(
    overrides: Sequence[str],
    configs: Path,
    output: Path,
    *,
    part: tuple[int, int] = (0, 1),
    precision: str = "float16",
    local_rank: int = 0,
    only_size: bool = False,
) -> bool:
    """Encode all fixed views of the training pairs that are not encoded yet.

    Args:
        overrides: of ``configs/train.yaml``, as for a training run.
        configs: the folder of that.
        output: gets the encoded views.
        part: (index, count): every `count`-th shard from `index` on.
        precision: "float16" or "float32", of what is stored.
        local_rank: number of the GPU, where there are several.
        only_size: print how large it will be, and end.

    Returns:
        Whether all shards are done, those of other parts among them.

    Raises:
        InputError: an option, the data, the weights or the disk do not allow it.
        DataError: `output` holds views of other settings, or a number does not fit the precision.
    """
    config = compose_training(overrides, configs)
    config.train.tracker, config.eval.every_steps = "none", 0  # not needed here
    config, _ = apply_pipeline_conventions(config)
    check_prerequisites(config)
    options = cast(TrainConfig, OmegaConf.to_object(config))
    if options.data.encoded_views or not options.data.fixed_views:
        raise InputError(
            "give data.fixed_views=K (K is the number of views of each pair, at least 1), and leave out "
            f"data.encoded_views (got {options.data.fixed_views} and {options.data.encoded_views!r})"
        )
    if options.data.num_references > 1:
        raise InputError(
            f"encoded views have one reference each; leave out data.num_references (got {options.data.num_references})"
        )
    if not isinstance(options.model, ModelOptions):
        raise InputError("encoded views work only with the U-Nets, and this model is FLUX.2 klein; train it from pairs")
    from mimicbrush.data.encoded_views import read_encoded_folder
    from mimicbrush.data.manifest import check_outside_mined_folder
    from mimicbrush.training.objective import FrozenEncoders

    check_outside_mined_folder(output, f"--output {output}")
    _check_holds_nothing_else(output)
    check_output_folder(output, "--output")
    pair_sources, notes = read_pair_sources(options.data)
    device = _choose_device(options, local_rank)
    components = build_components(options.model, options.seed)
    encoders = FrozenEncoders(components, options.model)
    settings = {**collect_view_settings(config, pair_sources), _NETWORKS: hash_networks(encoders)}
    encoders = encoders.to(device, choose_frozen_dtype(options.train.mixed_precision))
    side = components.unet.config.sample_size
    del components  # the U-Nets are not needed any more
    constants = {
        name: tensor.cpu().contiguous()
        for name, tensor in zip(("no_image_tokens", "no_depth_map"), encoders.unconditional_inputs(device), strict=True)
    }
    folder = _plan_folder(output, settings, options, pair_sources, constants, side, precision)
    with nullcontext() if only_size else _hold_part(output, part):
        existing = read_encoded_folder(output)
        if existing is not None:
            _refuse_differences(existing, settings, "--output ")
            if (existing.forms, existing.num_rows) != (folder.forms, folder.num_rows):
                raise DataError(
                    f"--output {output} has views of another precision; give another folder, or the --precision of "
                    "these views"
                )
            folder = existing
        pending = [shard for shard in range(part[0], folder.num_shards, part[1]) if not folder.is_done(shard)]
        num_pending = sum(len(folder.rows_of(shard)) for shard in pending)
        for note in notes:
            print(f"note: {note}")
        print(describe_size(folder, options.data.fixed_views))
        print(
            f"part {part[0]} of {part[1]}: {len(pending)} shards with {num_pending} views left to encode, "
            f"{in_bytes(num_pending * folder.bytes_per_row)}",
            flush=True,
        )
        check_output_folder(output, "--output", needed_bytes=num_pending * folder.bytes_per_row)
        if only_size:
            return not pending
        folder.begin(constants)
        _encode_shards(folder, pending, pair_sources, options, encoders, device)
    return all(folder.is_done(shard) for shard in range(folder.num_shards))


@contextmanager
def _hold_part(output: Path, part: tuple[int, int]) -> Iterator[None]:
    """Hold a part of a folder; see `hold_folder`. Parts of another count have shards in common with this one.

    Raises:
        LockedError: another process encodes this part, or one of another count.
    """
    index, count = part
    with hold_folder(output, f"{index}-of-{count}" if count > 1 else ""):
        for lock in sorted(output.glob(f"{LOCK_NAME}-*-of-*")):
            if not lock.name.endswith(f"-of-{count}"):
                with hold_folder(output, lock.name.removeprefix(f"{LOCK_NAME}-")):
                    pass
        yield


def describe_size(folder: EncodedFolder, count: int) -> str:
    """Describe how much space encoded views need, and for what."""
    forms = folder.forms
    latents = sum(forms[name].num_bytes for name in ("mean", "std"))
    return (
        f"{folder.num_rows // count} pairs x {count} views x {in_bytes(folder.bytes_per_row)} = "
        f"{in_bytes(folder.num_rows * folder.bytes_per_row)} in {folder.num_shards} shards; each view has "
        f"{in_bytes(latents)} of latents, {in_bytes(forms['image_tokens'].num_bytes)} of image tokens, "
        f"{in_bytes(forms['depth_map'].num_bytes)} of depth ({forms['mean'].dtype})"
    )


def verify_views(output: Path) -> int:
    """Read every byte of a folder of encoded views, and remove the markers of damaged shards.

    Returns:
        The number of shards, all whole.

    Raises:
        DataError: names the shards that are missing or damaged.
    """
    from mimicbrush.data.encoded_views import read_encoded_folder

    folder = read_encoded_folder(output)
    if folder is None:
        raise DataError(f"--output {output} is not a folder of encoded views")
    with hold_folder(output):
        folder.read_constants()
        bad = [shard for shard in range(folder.num_shards) if not folder.is_intact(shard)]
        for shard in bad:
            folder.marker_path(shard).unlink(missing_ok=True)
    if bad:
        raise DataError(
            f"{len(bad)} of {folder.num_shards} shards in {output} are missing or damaged: "
            f"{', '.join(folder.shard_path(shard).name for shard in bad[:5])}{', ...' if len(bad) > 5 else ''}. "
            "To repair them, run the command that encoded them again, without --verify"
        )
    return folder.num_shards


def _check_holds_nothing_else(output: Path) -> None:
    from mimicbrush.data.encoded_views import CONSTANTS_NAME, SETTINGS_NAME

    ours = {"shards", "markers", CONSTANTS_NAME, SETTINGS_NAME}
    if output.is_dir() and any(path.name not in ours and path.name[0] != "." for path in output.iterdir()):
        raise InputError(f"--output {output} exists and has other files than encoded views; give another folder")


def _choose_device(options: TrainConfig, local_rank: int) -> torch.device:
    import torch

    if options.train.cpu_threads:
        torch.set_num_threads(options.train.cpu_threads)
    if options.train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def _plan_folder(
    output: Path,
    settings: dict[str, Any],
    options: TrainConfig,
    pair_sources: Sequence[PairSource],
    constants: dict[str, torch.Tensor],
    side: int,
    precision: str,
) -> EncodedFolder:
    """Plan a folder: the forms of its rows, and how many rows a shard has."""
    from mimicbrush.data import encoded_views

    tokens, depth = constants["no_image_tokens"].shape[1:], constants["no_depth_map"].shape[2:]
    forms = encoded_views.make_row_forms(
        (4, side, side), (tokens[0], tokens[1]), (depth[0], depth[1]), options.data.num_matches, precision
    )
    num_rows = sum(len(source.pairs) for source in pair_sources) * options.data.fixed_views
    bytes_per_row = sum(form.num_bytes for form in forms.values())
    rows_per_shard = max(1, encoded_views.SHARD_BYTES // bytes_per_row)
    return encoded_views.EncodedFolder(output, settings, forms, num_rows, rows_per_shard)


def _encode_shards(
    folder: EncodedFolder,
    shards: Sequence[int],
    pair_sources: Sequence[PairSource],
    options: TrainConfig,
    encoders: FrozenEncoders,
    device: torch.device,
) -> None:
    """Encode some shards, one after the other."""
    from tqdm import tqdm

    from mimicbrush.data.dataset import FixedViewDataset
    from mimicbrush.data.loader import poll_batches

    dataset = FixedViewDataset(pair_sources, options.model.size_px, options.data)
    batches = [
        list(folder.rows_of(shard)[start : start + options.train.batch_size])
        for shard in shards
        for start in range(0, len(folder.rows_of(shard)), options.train.batch_size)
    ]
    loaded = poll_batches(
        dataset,
        batches,
        num_workers=options.data.num_workers,
        pin_memory=device.type == "cuda",
        timeout_s=options.data.loader_timeout_s,
    )
    num_bad = 0
    with tqdm(total=sum(map(len, batches)), unit="view") as progress:
        encoded = (encoders.encode_views(cast(Any, batch.to(device))) for batch in loaded if batch is not None)
        for shard in shards:
            tensors, faults = _collect_shard(folder, shard, encoded, progress)
            folder.write_shard(shard, tensors, faults)
            num_bad += len(faults)
            for fault in list(faults.values())[:1]:
                progress.write(f"unreadable: {fault}")
    if num_bad:
        print(f"{num_bad} views have no data, because their pairs could not be read; training uses other pairs instead")


def _collect_shard(
    folder: EncodedFolder, shard: int, encoded: Iterator[EncodedViews], progress: tqdm[Any]
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Collect the rows of a shard from batches: name -> (rows, ...), and row -> why its pair could not be read.

    Raises:
        DataError: a number is not finite in the type in which it is stored.
    """
    import torch

    rows = folder.rows_of(shard)
    tensors = {name: torch.zeros(len(rows), *form.shape, dtype=form.torch_dtype) for name, form in folder.forms.items()}
    faults: dict[int, str] = {}
    done = 0
    while done < len(rows):
        views = next(encoded)
        assert views.matches is not None
        is_good, places = views.key.cpu() >= 0, views.index.cpu() - rows.start
        for name in folder.forms:
            values = getattr(views if name in ENCODED_TENSORS else views.matches, name).cpu()[is_good]
            stored = values.to(folder.forms[name].torch_dtype)
            is_bad = ~stored.isfinite().flatten(1).all(dim=1)
            if is_bad.any():
                row = rows[int(places[is_good][is_bad][0])]
                raise DataError(
                    f"{name} of view {row} does not fit into {folder.forms[name].dtype} (largest value "
                    f"{values[is_bad][0].abs().max():.4g}); encode into another folder with --precision float32. "
                    "If the value is not finite, something is wrong with a pair or a network"
                )
            tensors[name][places[is_good]] = stored
        faults |= dict(zip(places[~is_good].tolist(), views.faults, strict=True))
        done += len(views)
        progress.update(len(views))
    return tensors, faults

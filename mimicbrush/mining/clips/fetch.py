"""Download the clips of a list into a folder, and check that each is a complete video with the right hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from mimicbrush.errors import InputError, describe_os_error
from mimicbrush.io.atomic import path_inside, write_json
from mimicbrush.io.download import DownloadError, download_file
from mimicbrush.io.hashing import hash_file
from mimicbrush.io.locks import hold_folder
from mimicbrush.io.outputs import check_output_folder
from mimicbrush.io.text import parse_json
from mimicbrush.mining.clips.clip_list import PINS_NAME, Clip, write_clip_list
from mimicbrush.mining.input_list import SHA256
from mimicbrush.mining.refusals import UntrustedFileError
from mimicbrush.mining.video.containers import check_container, is_container

_MOVE = "Move it away, or use another folder"
#: Errors if a file or folder is in the way of one clip; other clips can still be downloaded.
_OF_ITS_NAME = (FileExistsError, IsADirectoryError, NotADirectoryError)


@dataclass
class FetchedClips:
    """Result of downloading the clips of a list.

    Attributes:
        clips: the clips that are in the folder, with their hashes.
        num_fetched: number of clips that were downloaded now.
        pinned: clips without a hash in the list, which got the hash of the downloaded file.
        failures: clips that are not in the folder, with the reason.
    """

    clips: list[Clip] = field(default_factory=list)
    num_fetched: int = 0
    pinned: list[Clip] = field(default_factory=list)
    failures: list[tuple[Clip, str]] = field(default_factory=list)


def fetch_clips(
    clips: Sequence[Clip], folder: Path, *, max_bytes: int, progress: bool = True, say: Callable[[str], object] = print
) -> FetchedClips:
    """Download the missing clips, one after the other. If one fails, the others are still downloaded.

    If the list has no hash for a clip, the hash of its first download is stored in `pins.json` in the folder. Later
    downloads must have the same hash.

    Args:
        clips: see `read_clip_list`.
        folder: folder for the clips, `clips.csv` and `ATTRIBUTION.md`; it is created if needed.
        max_bytes: largest size of one clip.
        progress: whether to show a progress bar on stderr.
        say: prints which clip is being downloaded.

    Raises:
        InputError: the folder cannot be written to, or another process is writing there.
        OSError: the disk is full or cannot be written to. Complete clips are kept.
    """
    missing = [clip.num_bytes or 0 for clip in clips if not (folder / clip.path).exists()]
    check_output_folder(folder, "--output", needed_bytes=sum(missing))
    result = FetchedClips()
    with hold_folder(folder):
        pins = _read_pins(folder)
        try:
            # Existing clips come first: if this run is stopped during a download, the list must contain them.
            for clip in sorted(clips, key=lambda clip: not (folder / clip.path).exists()):
                expected = replace(clip, sha256=clip.sha256 or pins.get(clip.url, ""))
                try:
                    found, was_fetched = _provide(expected, folder, max_bytes, progress, say)
                except (InputError, *_OF_ITS_NAME) as error:
                    reason = str(error) if isinstance(error, InputError) else describe_os_error(error)
                    result.failures.append((clip, reason))
                    continue
                result.clips.append(replace(clip, sha256=found))
                result.num_fetched += was_fetched
                if not expected.sha256:
                    result.pinned.append(result.clips[-1])
                    pins[clip.url] = found
                    write_json(folder / PINS_NAME, pins)
        finally:  # also after an error, the list must contain the existing clips
            if result.clips:
                paths = [clip.path for clip in clips]
                result.clips.sort(key=lambda clip: paths.index(clip.path))
                write_clip_list(folder, result.clips)
    return result


def _read_pins(folder: Path) -> dict[str, str]:
    """Read the hashes of first downloads, for clips without a hash in the list: address -> hash."""
    path = folder / PINS_NAME
    if not path.is_file():
        return {}
    try:
        pins = parse_json(path.read_bytes())
        if all(SHA256.fullmatch(value) for value in pins.values()):
            return dict(pins)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise InputError(
        f"{path} cannot be read as a list of hashes; move it away to accept the hashes of the next download"
    )


def _provide(
    clip: Clip, folder: Path, max_bytes: int, progress: bool, say: Callable[[str], object]
) -> tuple[str, bool]:
    """Download a clip if it is missing; return its hash, and whether it was downloaded."""
    path = path_inside(folder, clip.path)
    if path.exists() and not path.is_file():
        raise InputError(f"{path} already exists and is not a file. {_MOVE}")
    if path.exists():
        found = hash_file(path)
        if not clip.sha256:  # without a hash, check it like a new download
            if clip.num_bytes not in (None, path.stat().st_size):
                raise InputError(
                    f"{path} already exists and does not have the {clip.num_bytes} bytes of the list. {_MOVE}"
                )
            try:
                _check_video(path, f"{path} already exists and")
            except InputError as error:
                raise InputError(f"{error}. {_MOVE}") from error
        elif found != clip.sha256:
            raise InputError(
                f"{path} already exists and is another file: it has the SHA-256 {found}, and the list says "
                f"{clip.sha256}. {_MOVE}"
            )
        return found, False
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"downloading {clip.path} from {clip.url}")
    with tqdm(
        total=clip.num_bytes, unit="B", unit_scale=True, desc=clip.path, disable=None if progress else True
    ) as bar:

        def report(count: int, total: int | None) -> None:
            bar.total = total
            bar.update(count - bar.n)

        found = download_file(
            clip.url,
            path,
            sha256=clip.sha256,
            num_bytes=clip.num_bytes,
            max_bytes=max_bytes,
            check=_check_video,
            report=report,
        )
    return found, True


def _check_video(path: Path, named: str = "the downloaded file") -> None:
    try:
        check_container(path)
    except UntrustedFileError as error:
        raise DownloadError(f"{named} is not an intact video: {error.detail}") from error
    if not is_container(path):
        raise DownloadError(f"{named} is not a video: expected MP4, QuickTime, Matroska, WebM or AVI")

"""Notes HDR and interlaced frames of a video, and refuses such videos if the options say so.

Refuses as:

* "hdr": a frame is HDR, and hdr=skip.
* "interlaced": a frame has two fields of different times, and interlaced=skip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mimicbrush.errors import DataError
from mimicbrush.mining.video.strict_reader import VideoFrame

_HDR_NOTE, _INTERLACED_NOTE = "HDR (", "interlaced ("
_DONE = {"tone_map": "tone-mapped", "deinterlace": "deinterlaced", "keep": "kept as it is", "skip": "left out"}


class UnwantedSignalError(DataError):
    """A readable video that the options exclude.

    Attributes:
        reason: a key of `mimicbrush.mining.refusals.REJECTED`.
        detail: the reason as text for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass
class SignalNotes:
    """Notes about HDR and interlaced frames of one video.

    Attributes:
        hdr, interlaced: what to do with such frames, see `MiningOptions`.
        transfer: "PQ" or "HLG"; "" for SDR.
        num_frames, num_interlaced: number of frames and of interlaced frames so far.
    """

    hdr: str
    interlaced: str
    transfer: str = ""
    num_frames: int = 0
    num_interlaced: int = 0

    def watch(self, frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        """Yield the frames, and note whether they are HDR or interlaced.

        Raises:
            UnwantedSignalError: a frame is HDR or interlaced, and the options exclude this.
        """
        for frame in frames:
            self.num_frames += 1
            self.transfer = self.transfer or frame.transfer
            self.num_interlaced += frame.is_interlaced
            if frame.transfer and self.hdr == "skip":
                raise UnwantedSignalError("hdr", f"HDR ({frame.transfer}); use hdr=tone_map or hdr=keep to accept it")
            if frame.is_interlaced and self.interlaced == "skip":
                detail = (
                    f"frame {frame.number} is interlaced; use interlaced=deinterlace or interlaced=keep to accept it"
                )
                raise UnwantedSignalError("interlaced", detail)
            yield frame

    def describe(self, detail: str = "") -> str:
        """Return the notes followed by the other details of the video, as `find_signals` expects them."""
        notes = []
        if self.transfer:
            notes.append(f"{_HDR_NOTE}{self.transfer}): {_DONE[self.hdr]}")
        if self.num_interlaced:
            counted = f"{self.num_interlaced} of {self.num_frames} frames"
            notes.append(f"{_INTERLACED_NOTE}{counted}): {_DONE[self.interlaced]}")
        return "; ".join([*notes, *([detail] if detail else [])])


def find_signals(reason: str, detail: str) -> list[str]:
    """Find in a row of the manifest whether its video is HDR or interlaced: "hdr", "interlaced", both or none."""
    notes = detail.split("; ")[:2]
    found = {"hdr": _HDR_NOTE, "interlaced": _INTERLACED_NOTE}
    return [word for word, note in found.items() if reason == word or any(each.startswith(note) for each in notes)]

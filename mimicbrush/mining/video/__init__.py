"""Strict reading of videos: each frame is right, or the file is refused with a reason of `mimicbrush.mining.refusals`.

In reading order; each file says at its top which reasons it gives:

* `strict_reader`: the default reader, FFmpeg through PyAV.
* `containers`: checks that the file is as long as its container says, and the bytes of its packets.
* `matroska`: checks the structure of Matroska and WebM files.
* `avi`: counts the frames that an AVI file marks as dropped.
* `decoders`: decoders that report damage as errors.
* `conversions`: HDR and interlaced frames to whole images in sRGB.
* `stream_checks`: checks every packet and frame, and the end of the stream.
* `other_readers`: readers by decord and torchcodec, and `open_reader`.
* `signals`: notes HDR and interlaced videos, and leaves them out where that is asked for.
* `shots`: finds where one shot ends and the next begins.
"""

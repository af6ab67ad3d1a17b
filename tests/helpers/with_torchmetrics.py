"""What torchmetrics says of a case, and what we say by it: python with_torchmetrics.py CASE.npz FOLDER -> JSON.

A process of its own: the others pretend that torchvision is absent, without which torchmetrics cannot be imported.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from mimicbrush.evaluation.benchmark.backbones import load_backbones
from mimicbrush.evaluation.benchmark.metrics import CasePixels, score_case
from mimicbrush.evaluation.benchmark.options import BackboneOptions


def main(case_file: str, folder: str) -> None:
    # This process is a fork of one that hides torchvision. Nothing in it has asked for torchvision yet.
    sys.modules.pop("torchvision", None)
    warnings.simplefilter("ignore")
    import torchmetrics.functional.image as peer
    from torchmetrics.functional.image.lpips import _LPIPS

    case = np.load(case_file)
    result, truth, mask = case["result"], case["truth"], case["mask"]
    torch.manual_seed(0)
    alexnet = _LPIPS(net="alex", pnet_rand=True)
    weights = {
        f"features.{name}.{kind}": value.data.clone()
        for number in range(1, 6)
        for name, layer in getattr(alexnet.net, f"slice{number}").named_children()
        for kind, value in layer.named_parameters()
    }
    path = Path(folder) / "alexnet.safetensors"
    save_file(weights, path)
    backbones = load_backbones(BackboneOptions(lpips=str(path)))
    ours = score_case(CasePixels(result, mask, truth, truth, None, None), backbones)
    equal = score_case(CasePixels(truth, mask, truth, truth, None, None), backbones)

    inside = np.argwhere(mask)
    (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
    crops = [image[top:bottom, left:right].copy() for image in (result, truth)]
    a, b = (torch.from_numpy(crop).permute(2, 0, 1)[None].float() for crop in crops)
    greys = [torch.from_numpy(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))[None, None].double() for crop in crops]
    # torchmetrics means over a padded map, scikit-image over where the window fits: the same map, less five pixels.
    _, ssim_map = peer.structural_similarity_index_measure(*greys, data_range=255.0, return_full_image=True)
    theirs = {
        "psnr": float(peer.peak_signal_noise_ratio(a, b, data_range=255.0)),
        "ssim": float(ssim_map[..., 5:-5, 5:-5].mean()),
        "lpips": float(alexnet(a / 127.5 - 1, b / 127.5 - 1)),
    }
    print(json.dumps({"ours": ours, "theirs": theirs, "equal": equal["lpips"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])

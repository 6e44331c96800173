"""Makes judges.json and judges.npz: what the packages lpips and pytorch-fid give for random networks.

python tests/goldens/make_judges.py [FOLDER]      needs torch, torchvision, lpips and pytorch-fid
"""

import json
import math
import pathlib
import sys

import numpy as np


def state_of(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Random weights whose activations neither vanish nor explode, drawn in the order of the keys."""
    rng, state = np.random.default_rng(seed), {}
    for key in sorted(shapes):
        w = rng.standard_normal(shapes[key]).astype(np.float32)
        if key.endswith("running_var"):
            state[key] = 1 + np.float32(0.05) * np.abs(w)
        elif key.endswith("bn.weight"):
            state[key] = 1 + np.float32(0.1) * w
        elif key.startswith("lin"):  # the heads of LPIPS are positive
            state[key] = np.abs(w)
        elif w.ndim == 4:
            state[key] = w * np.float32(math.sqrt(2 / math.prod(w.shape[1:])))
        else:
            state[key] = np.float32(0.1) * w
    return state


def pictures_of(seed: int) -> np.ndarray:
    """Eight squares of a colour with noise, [8, 40, 40, 3] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    noisy = rng.uniform(-1, 1, (8, 1, 1, 3)) + rng.normal(0, 0.3, (8, 40, 40, 3))
    return np.clip(noisy, -1, 1).astype(np.float32)


def make() -> tuple[dict, dict[str, np.ndarray]]:
    """The settings and the arrays."""
    import lpips
    import pytorch_fid.fid_score
    import pytorch_fid.inception
    import torch
    import torchvision

    def torch_of(images):
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def fill(net, seed):
        known = {key: list(x.shape) for key, x in net.state_dict().items()}
        kept = ("scaling_layer.shift", "scaling_layer.scale")
        shapes = {
            key: shape
            for key, shape in known.items()
            if key not in kept and "lins." not in key and not key.endswith("num_batches_tracked")
        }
        drawn = {key: torch.from_numpy(x) for key, x in state_of(shapes, seed).items()}
        # The package names its heads twice.
        drawn |= {key.replace("lin", "lins."): x for key, x in drawn.items() if key.startswith("lin")}
        net.load_state_dict({**net.state_dict(), **{k: x for k, x in drawn.items() if k in known}})
        return shapes, net.eval()

    images = pictures_of(0)
    net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    of_lpips, net = fill(net, 1)
    with torch.no_grad():
        distance = net(torch_of(images[:4]), torch_of(images[4:])).numpy().ravel()

    theirs = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    of_inception, theirs = fill(theirs, 2)
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: theirs.state_dict()
    net = pytorch_fid.inception.InceptionV3([3]).eval()
    with torch.no_grad():
        features = net((torch_of(images[:3]) + 1) / 2)[0].numpy()[:, :, 0, 0]

    rng = np.random.default_rng(3)
    sets = rng.normal(0, 1, (50, 8)), rng.normal(0.3, 1.7, (40, 8)) @ rng.normal(0, 1, (8, 8))
    frechet = pytorch_fid.fid_score.calculate_frechet_distance(
        *(of for x in sets for of in (x.mean(0), np.cov(x, rowvar=False)))
    )
    settings = {
        "lpips": {"seed": 1, "shapes": of_lpips},
        "inception": {"seed": 2, "shapes": of_inception},
        "frechet": float(frechet),
    }
    return settings, {"distance": distance, "features": features.astype(np.float32)}


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    settings, arrays = make()
    (folder / "judges.json").write_text(json.dumps(settings, indent=1) + "\n")
    np.savez_compressed(folder / "judges.npz", **arrays)

"""Encode scikit-image's photographs, read the store, decode, and draw what came back beside what went in.

python examples/roundtrip.py OUT.png [AUTOENCODER]
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from skimage import data

from halfstep.autoencoders import load_autoencoder
from halfstep.data.keys import key_to_name
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.store import DatasetStore

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


def main(output: Path, identifier: str = "dct8") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        photos, latents = Path(scratch) / "photos", Path(scratch) / "latents"
        photos.mkdir()
        for name in PHOTOGRAPHS:
            Image.fromarray(getattr(data, name)()).save(photos / f"{name}.png")
        encode([SourceConfig(path=photos)], EncodeOptions(latents, autoencoder=identifier))

        store, autoencoder = DatasetStore.open(latents), load_autoencoder(identifier)
        figure, axes = plt.subplots(3, len(PHOTOGRAPHS), figsize=(11, 8.6), layout="constrained")
        for column, key in zip(axes.T, store.keys(), strict=True):
            assert store.spec.pixels is not None
            original = load_fitted(photos / key_to_name(key), store.spec.pixels)
            raw = autoencoder.unscaled(torch.from_numpy(store.read(key)))
            pixels = autoencoder.decode(raw)[0].permute(1, 2, 0).clamp(-1, 1)
            decoded = ((pixels + 1) * 127.5).round().byte().numpy()
            error = decoded.astype(float) - original
            psnr = 10 * np.log10(255**2 / np.mean(error**2))
            shown = (original, decoded, np.clip(np.abs(error) * 4, 0, 255).astype(np.uint8))
            titles = (Path(key).stem, f"decoded from {store.manifest.storage}, {psnr:.1f} dB", "error x 4")
            for axis, picture, title in zip(column, shown, titles, strict=True):
                axis.imshow(picture)
                axis.set_title(title, fontsize=10)
                axis.axis("off")
        figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])

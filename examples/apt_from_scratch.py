"""Adaptive Patch Transformers from scratch, in plain PyTorch, around a ViT of timm: python examples/apt_from_scratch.py

A ViT cuts an image into patches of one size, and each patch becomes a token. Here smooth regions get large patches and
only detailed regions get small patches, so an image has fewer tokens and the transformer has less to do:

1. Entropy of the gray values decides how large each patch is (section 3.1 of the paper).
2. A patch of any size becomes one token (section 3.2).
3. Images now have different numbers of tokens. All tokens of a batch stand in one sequence, image after image, and
   attention stays inside each image (section 3.3).

The host is a plain ViT of timm: a class token, learned positions, nothing between the embedding and the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from skimage import data
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn


def cut(image: Tensor, side: int) -> Tensor:
    """Cut an image into square patches: (C, H, W) -> (rows, columns, C, side, side)."""
    patches = image.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (C, rows, side, columns, side)
    return patches.permute(1, 3, 0, 2, 4)


def entropy(gray: Tensor, side: int) -> Tensor:
    """Eq. 1, the bits of information in the gray values of each patch: (H, W) -> (rows, columns)."""
    patches = cut(gray[None], side)  # (rows, columns, 1, side, side)
    histograms = torch.stack([torch.histc(patch, bins=512, min=0, max=255) for patch in patches.flatten(0, 1)])
    probability = histograms / side**2  # (rows * columns, 512)
    bits = torch.special.entr(probability).sum(dim=1) / math.log(2)  # entr(p) is -p ln(p), and 0 for p = 0
    return bits.view(patches.shape[:2])


def choose_scales(image: Tensor, patch_size: int, thresholds: Sequence[float]) -> Tensor:
    """Decide how large the patch over each cell of the base grid is.

    Args:
        image: (3, H, W) raw pixels in 0..255.
        patch_size: Side of a base patch in pixels.
        thresholds: Bits of entropy. The first belongs to patches of twice the base size, the next to four times, ...

    Returns:
        (H / patch_size, W / patch_size): 0 for a base patch, i for a patch of 2^i x 2^i base patches.
    """
    red, green, blue = image.float()
    gray = 0.2989 * red + 0.5870 * green + 0.1140 * blue  # (H, W)
    scales = torch.zeros(gray.shape[0] // patch_size, gray.shape[1] // patch_size, dtype=torch.long, device=gray.device)
    for scale, threshold in enumerate(thresholds, start=1):
        # Each scale is decided by itself. Coarser scales come later and overwrite finer scales.
        is_smooth = entropy(gray, patch_size * 2**scale) < threshold
        scales[is_smooth.repeat_interleave(2**scale, dim=0).repeat_interleave(2**scale, dim=1)] = scale
    return scales


class AdaptivePatchTransformer(nn.Module):
    """A ViT that reads patches of several sizes.

    Args:
        vit: The host. All of its parameters are used as they are.
        thresholds: As for `choose_scales`.
    """

    def __init__(self, vit: VisionTransformer, thresholds: Sequence[float]) -> None:
        super().__init__()
        self.vit = vit
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.thresholds = thresholds
        # The only new parameters, shared by all scales. The linear layer starts at zero: at first it adds nothing.
        self.conv = nn.Conv2d(vit.embed_dim, vit.embed_dim, kernel_size=2, stride=2)
        self.linear = nn.Linear(vit.embed_dim, vit.embed_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def embed(self, patches: Tensor, scale: int) -> Tensor:
        """Eq. 2, x_P = E(resize(P)) + Zero(Conv^i({E(P_j)})): (n, 3, side, side) pixels -> (n, D)."""
        embedding = self.vit.patch_embed.proj  # E, a convolution whose kernel is one base patch
        # Bilinear, no antialiasing: each new pixel is the mean of the central 2 x 2 pixels of a 2^i x 2^i block.
        resized = F.interpolate(patches, size=self.patch_size, mode="bilinear", antialias=False)
        tokens = embedding(resized).flatten(1)  # (n, D, 1, 1) -> (n, D)
        if scale == 0:
            return tokens
        grid = embedding(patches)  # sub-patches P_j at full resolution: (n, D, 2^i, 2^i)
        for _ in range(scale):
            grid = self.conv(grid)  # each time half as many rows and columns, in the end (n, D, 1, 1)
        return tokens + self.linear(grid.flatten(1))

    def positions(self, rows: int, columns: int) -> Tensor:
        """Positions of the host, resampled to another grid: (rows, columns, D)."""
        native, table = self.vit.patch_embed.grid_size, self.vit.pos_embed[:, 1:]  # without the class token's
        table = resample_abs_pos_embed(table, new_size=(rows, columns), old_size=native, num_prefix_tokens=0)
        return table.view(rows, columns, -1)

    def tokens(self, image: Tensor) -> Tensor:
        """Class token and patches of one image: (3, H, W) raw pixels -> (1 + n, D)."""
        largest = self.patch_size * 2 ** len(self.thresholds)
        if image.shape[1] % largest or image.shape[2] % largest:
            raise ValueError(f"sides of {tuple(image.shape[1:])} are not multiples of {largest}, the largest patch")
        scales = choose_scales(image, self.patch_size, self.thresholds)
        config = self.vit.pretrained_cfg
        mean, std = (image.new_tensor(config[key], dtype=torch.float).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (image / 255 - mean) / std
        tokens = [self.vit.cls_token[0] + self.vit.pos_embed[0, :1]]  # (1, D)
        for scale in range(len(self.thresholds) + 1):
            chosen = scales[:: 2**scale, :: 2**scale] == scale  # (rows, columns) of patches of this scale
            patches = cut(pixels, self.patch_size * 2**scale)[chosen]  # (n of this scale, 3, side, side)
            tokens.append(self.embed(patches, scale) + self.positions(*chosen.shape)[chosen])
        return torch.cat(tokens)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Classify images of any sizes: (3, H, W) raw pixels each -> (B, classes) logits."""
        runs = [self.tokens(image) for image in images]
        x = torch.cat(runs)[None]  # (1, T, D), T tokens of all images
        lengths = torch.tensor([len(run) for run in runs], device=x.device)
        image_of_token = torch.arange(len(runs), device=x.device).repeat_interleave(lengths)  # (T,)
        same_image = image_of_token[:, None] == image_of_token  # (T, T), blocks of True along the diagonal
        for block in self.vit.blocks:
            x = block(x, attn_mask=same_image)
        class_tokens = self.vit.norm(x)[0, lengths.cumsum(0) - lengths]  # (B, D), the first token of each run
        return self.vit.forward_head(class_tokens[:, None])


def main() -> None:
    """Random weights show how many tokens remain. With pretrained=True the classes mean something too."""
    photos = {"astronaut": data.astronaut()[:384, :384], "coffee": data.coffee()[:384, :576]}
    images = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in photos.values()]  # (3, H, W) uint8
    vit = timm.create_model("vit_tiny_patch16_384", pretrained=False).eval()
    adaptive = AdaptivePatchTransformer(vit, thresholds=(6.0, 6.0))
    uniform = AdaptivePatchTransformer(vit, thresholds=())
    with torch.inference_mode():
        logits, reference = adaptive(images), uniform(images)
        for i, (name, image) in enumerate(zip(photos, images, strict=True)):
            kept, full = len(adaptive.tokens(image)) - 1, len(uniform.tokens(image)) - 1
            best, uniform_best = int(logits[i].argmax()), int(reference[i].argmax())
            print(f"{name}: {kept} of {full} patch tokens, class {best} ({uniform_best} with all tokens)")
    print(f"largest difference of the logits: {(logits - reference).abs().max():.3f} (weights are random)")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""ImageNet-1k and its variants, by the names that `--variant` takes."""

VARIANTS = {
    "imagenet": "ImageNet-1k's validation images",
    "real": "the same images, with ImageNet-ReaL's labels in addition to the usual ones",
    "a": "ImageNet-A, 200 classes",
    "r": "ImageNet-R, 200 classes",
    "v2": "ImageNet-V2, folders 0 to 999 or of synsets",
    "sketch": "ImageNet-Sketch",
}

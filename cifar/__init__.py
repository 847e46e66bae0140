"""The images: `dataset` (CIFAR-100 found, verified, read and split), `download` (its archive from a mirror),
`synthetic` (generated images in its place), `augment` (the named augmentations), `fast_transforms` (faster
versions of their transforms)."""

"""The images: fetching, verifying, reading and augmenting CIFAR-100, and a synthetic stand-in."""

"""Image data: sources, subsets, packing and reading, augmentation, and labelled target sets."""

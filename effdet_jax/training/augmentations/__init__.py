"""The augmentations, a file for each kind. `training/augment.py` applies them."""

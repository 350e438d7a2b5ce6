"""What can be done to a training picture, one kind a file; `training/augment.py` chooses among them."""

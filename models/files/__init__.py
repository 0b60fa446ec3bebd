"""What lies on a disk: model folders, checkpoints and adapters, and how their fields and tensors are checked."""

"""TensorBoard's files in the run's own folder, which a configuration names once."""

from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard's files into a folder itself, without a subfolder for a version. Checkpoints then go to `checkpoints` there.

    Args:
        save_dir: the folder; null takes trainer.default_root_dir, which `draftsmith train` fills in.

    Raises:
        ValueError: no folder is known.
    """

    def __init__(self, save_dir: Path | None = None) -> None:
        if save_dir is None:
            raise ValueError("RunLogger has no folder; set trainer.default_root_dir, or its own save_dir")
        super().__init__(str(save_dir), name=None, version="")

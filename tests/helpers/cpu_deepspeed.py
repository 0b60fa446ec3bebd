"""DeepSpeed's own engine on a CPU, for tests: Lightning allows it on CUDA devices only.

Needs DS_ACCELERATOR=cpu in the environment before deepspeed is imported.
"""

from importlib import import_module

import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DDPStrategy

from draftsmith.train.run.strategies import Zero


class ZeroOnCpu(Zero):
    """Zero without Lightning's check of the accelerator, with devices that carry an index, which DeepSpeed asks for."""

    def setup_environment(self) -> None:
        self.refuse()
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        # Shared memory in gloo's place would have to be compiled first, for most of a minute.
        setattr(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

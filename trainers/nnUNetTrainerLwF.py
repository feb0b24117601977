from nnunet_cil.objectives.lwf import LwF
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerLwF(IncrementalTrainer):
    objective_class = LwF

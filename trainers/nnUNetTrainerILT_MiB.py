from nnunet_cil.objectives.lwf import ILTOfMiB
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerILT_MiB(IncrementalTrainer):
    objective_class = ILTOfMiB

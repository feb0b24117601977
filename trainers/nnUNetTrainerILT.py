from nnunet_cil.objectives.lwf import ILT
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerILT(IncrementalTrainer):
    objective_class = ILT

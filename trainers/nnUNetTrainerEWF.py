from nnunet_cil.objectives.ewf import EWF
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerEWF(IncrementalTrainer):
    objective_class = EWF

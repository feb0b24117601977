from nnunet_cil.objectives.ewc import EWC
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerEWC(IncrementalTrainer):
    objective_class = EWC

from nnunet_cil.objectives.plop import PLOP
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerPLOP(IncrementalTrainer):
    objective_class = PLOP

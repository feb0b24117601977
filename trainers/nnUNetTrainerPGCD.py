from nnunet_cil.objectives.pgcd import PGCD
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerPGCD(IncrementalTrainer):
    objective_class = PGCD

from nnunet_cil.objectives.pseudo import Pseudo
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerPseudo(IncrementalTrainer):
    objective_class = Pseudo

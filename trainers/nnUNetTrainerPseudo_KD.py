from nnunet_cil.objectives.pseudo import PseudoKD
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerPseudo_KD(IncrementalTrainer):
    objective_class = PseudoKD

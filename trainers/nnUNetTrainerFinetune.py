from nnunet_cil.objectives.finetune import Finetune
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerFinetune(IncrementalTrainer):
    objective_class = Finetune

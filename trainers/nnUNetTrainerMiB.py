from nnunet_cil.objectives.mib import MiB
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerMiB(IncrementalTrainer):
    objective_class = MiB

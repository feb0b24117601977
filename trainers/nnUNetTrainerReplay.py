from nnunet_cil.objectives.replay import Replay
from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerReplay(IncrementalTrainer):
    objective_class = Replay

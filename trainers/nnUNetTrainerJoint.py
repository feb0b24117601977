from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerJoint(IncrementalTrainer):
    """Upper bound: all classes at once, so there is no teacher and no objective beyond nnU-Net's loss."""

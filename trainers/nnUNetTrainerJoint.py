from nnunet_cil.trainer import IncrementalTrainer


class nnUNetTrainerJoint(IncrementalTrainer):
    """Upper bound: all classes at once, so there is no teacher and no objective beyond nnU-Net's loss."""

    def on_train_start(self):
        if self.incremental:
            raise ValueError(
                f"nnUNetTrainerJoint: got step {self.block.step} of chain {self.block.chain!r}, expected a dataset "
                "with the labels of all classes: on a later step alone it is finetuning, no upper bound. "
                "`nnunet-cil run SCHEDULE --methods joint` makes and trains such a dataset."
            )
        super().on_train_start()

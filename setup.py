"""Which folders make up the package; all else stands in pyproject.toml.

nnU-Net imports every file of the folders in ``nnUNet_extTrainer`` as a top-level module, so ``trainers`` holds nothing
but trainers and lies outside the package, as do the schedules in ``plans``. Both are installed as parts of it.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nnunet_cil", "nnunet_cil.*"]), "nnunet_cil.trainers", "nnunet_cil.plans"],
    package_dir={"nnunet_cil.trainers": "trainers", "nnunet_cil.plans": "plans"},
    package_data={"nnunet_cil.plans": ["*.yaml"]},
)

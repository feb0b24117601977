"""HD95 and NSD of one class in one subject, by MONAI; and why one of them may not exist."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BOTH_EMPTY, MISSED, INVENTED = "both_empty", "missed", "invented"
ABSENCES = (BOTH_EMPTY, MISSED, INVENTED)


def absence(n_reference: int, n_prediction: int) -> str | None:
    """Why a class has no HD95: ``both_empty``, ``missed`` (no prediction) or ``invented`` (no reference), or None.

    A class that is missed or invented has Dice 0 and NSD 0; one that is empty in both has no score at all.

    Args:
        n_reference, n_prediction: voxels.
    """
    if n_reference and n_prediction:
        return None
    if n_reference:
        return MISSED
    return INVENTED if n_prediction else BOTH_EMPTY


def surface_scores(
    reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing_mm: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """How far apart the surfaces of two masks are; symmetric in the masks.

    HD95 is the larger of the two directed 95th percentiles of the distances from each surface voxel's centre to the
    other surface. NSD is the share of both surfaces' area that lies within the tolerance of the other surface (Nikolov
    et al., arXiv:1809.04430); its surface elements lie between voxel centres. What lies outside the image is empty.

    Args:
        reference, prediction: (X, Y) or (X, Y, Z); a single slice (1, Y, Z), as nnU-Net reads 2D images, is scored in
            its plane.
        spacing_mm: of the axes.
        tolerance_mm: distance up to which two surfaces agree, 0 or more.

    Returns:
        ``{"hd95_mm": 0 or more, "nsd": 0..1}``. HD95 is NaN where a mask is empty; NSD is 0 where one is and NaN where
        both are.

    Raises:
        ValueError: masks of different shapes or not boolean, or not one positive spacing an axis.
    """
    if reference.shape != prediction.shape or reference.dtype != bool or prediction.dtype != bool:
        raise ValueError(
            f"masks: got {reference.dtype} of shape {reference.shape} and {prediction.dtype} of shape "
            f"{prediction.shape}, expected boolean masks of one shape."
        )
    if len(spacing_mm) != reference.ndim or not all(step > 0 for step in spacing_mm):
        raise ValueError(f"spacing_mm: got {spacing_mm}, expected {reference.ndim} positive numbers.")
    if reference.ndim == 3 and len(reference) == 1:
        reference, prediction, spacing_mm = reference[0], prediction[0], spacing_mm[1:]
    box = ndimage.find_objects((reference | prediction).view(np.uint8))
    if not box:
        return {"hd95_mm": np.nan, "nsd": np.nan}
    reference, prediction = reference[box[0]], prediction[box[0]]
    if not reference.any() or not prediction.any():
        return {"hd95_mm": np.nan, "nsd": 0.0}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's own use of what it and torch have deprecated
        # seconds to import, so not at the top
        import torch
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice

        masks = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
        common = {"include_background": True, "spacing": [float(step) for step in spacing_mm]}
        hd95 = compute_hausdorff_distance(*masks, percentile=95, **common)
        nsd = compute_surface_dice(*masks, [float(tolerance_mm)], use_subvoxels=True, **common)
    return {"hd95_mm": float(hd95), "nsd": float(nsd)}

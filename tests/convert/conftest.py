"""Made-up DICOM files are written by SimpleITK, which changes the locale of the process as reading does."""

import pytest

from nnunet_cil.convert.dicom import own_locale


@pytest.fixture(autouse=True)
def kept_locale():
    with own_locale():
        yield

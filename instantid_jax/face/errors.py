"""What can be wrong with a photo, a face or a face model. Every error carries a short `code`, so that a batch job can count reasons."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["AnalyzerError", "EmbeddingError", "FaceError", "KeypointError", "PhotoError", "import_opencv"]


class FaceError(ValueError):
    """A photo does not give the one face that is wanted.

    Codes: ``no_face``, ``several_faces``, ``bad_index``, ``bad_policy``, ``no_photos``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PhotoError(FaceError):
    """A file or array that is no usable picture.

    Codes: ``missing``, ``not_a_picture``, ``broken``, ``too_large``, ``too_small``, ``bad_values``, ``bad_size``.
    """


class KeypointError(FaceError):
    """Keypoints that cannot be used.

    Codes: ``keypoints_shape``, ``keypoints_not_finite``, ``keypoints_outside``, ``keypoints_degenerate``.
    """


class EmbeddingError(FaceError):
    """A face embedding that cannot be used.

    Codes: ``embedding_shape``, ``embedding_not_finite``, ``embedding_zero``, ``embedding_dim``, ``embedding_file``.
    """


class AnalyzerError(FaceError):
    """A face analyzer that cannot be built.

    Codes: ``unknown_analyzer``, ``not_installed``, ``missing_files``, ``ambiguous_folder``, ``foreign_model``, ``broken_model``, ``no_opencv``.
    """


def import_opencv() -> Any:
    """The module `cv2`, imported on first use. Raises `AnalyzerError` that says which OpenCV to install."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise AnalyzerError(
            "no_opencv",
            f"OpenCV cannot be imported ({error}). This needs the headless build, which asks for no display libraries: "
            "pip uninstall -y opencv-python opencv-contrib-python opencv-python-headless && "
            "pip install --force-reinstall --no-deps ./third_party/opencv-headless-alias opencv-python-headless",
        ) from error

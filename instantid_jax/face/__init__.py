"""From photos to an identity: find the face, embed it, draw its keypoints. Host side; importing this loads no face model."""

from instantid_jax.face.align import ARCFACE_TEMPLATE, align, umeyama
from instantid_jax.face.analyzer import ANALYZERS, Face, FaceAnalyzer, InsightFaceAnalyzer, OpenCVAnalyzer, load_analyzer
from instantid_jax.face.combine import COMBINATIONS, Combination, Combined, Interpolation, combine_embeddings, interpolate_embeddings
from instantid_jax.face.errors import AnalyzerError, EmbeddingError, FaceError, KeypointError, PhotoError
from instantid_jax.face.identity import (
    Identity,
    PhotoReport,
    analyze_photo,
    check_embedding,
    examine_photo,
    find_faces,
    identity_from_photos,
    largest_face,
    load_precomputed,
    save_precomputed,
)
from instantid_jax.face.keypoints import KEYPOINT_COLORS, draw_kps
from instantid_jax.face.photo import load_photo, prepare_control_image, resize_img, to_rgb
from instantid_jax.face.region import box_mask, check_box
from instantid_jax.face.views import FACE_POINTS, View, read_view, view_keypoints

__all__ = [
    "ANALYZERS",
    "ARCFACE_TEMPLATE",
    "COMBINATIONS",
    "FACE_POINTS",
    "KEYPOINT_COLORS",
    "AnalyzerError",
    "Combination",
    "Combined",
    "EmbeddingError",
    "Face",
    "FaceAnalyzer",
    "FaceError",
    "Identity",
    "InsightFaceAnalyzer",
    "Interpolation",
    "KeypointError",
    "OpenCVAnalyzer",
    "PhotoError",
    "PhotoReport",
    "View",
    "align",
    "analyze_photo",
    "box_mask",
    "check_box",
    "check_embedding",
    "combine_embeddings",
    "draw_kps",
    "examine_photo",
    "find_faces",
    "identity_from_photos",
    "interpolate_embeddings",
    "largest_face",
    "load_analyzer",
    "load_photo",
    "load_precomputed",
    "prepare_control_image",
    "read_view",
    "resize_img",
    "save_precomputed",
    "to_rgb",
    "umeyama",
    "view_keypoints",
]

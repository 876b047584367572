"""PaddleOCR's model directories, made from the ONNX files that the rapidocr wheel bundles."""

import shutil
from pathlib import Path

import onnxruntime
import rapidocr
import yaml

# RapidOCR's own settings: colours as BGR, the mean and deviation of its detector, lines at their own width.
READ = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
NORMALIZE = {"mean": [0.5] * 3, "std": [0.5] * 3, "order": "hwc", "scale": "1./255."}
DETECTION = {
    "PreProcess": {
        "transform_ops": [READ, {"DetResizeForTest": None}, {"NormalizeImage": NORMALIZE}, {"ToCHWImage": None}]
    },
    "PostProcess": {
        "name": "DBPostProcess",
        "thresh": 0.3,
        "box_thresh": 0.5,
        "max_candidates": 1000,
        "unclip_ratio": 1.6,
        "use_dilation": True,
    },
}


def save_paddle_models(folder):
    """Writes `det` and `rec`, each with inference.onnx and inference.yml, into a folder; returns the two paths."""
    source = Path(rapidocr.__file__).parent / "models"
    session = onnxruntime.InferenceSession(source / "PP-OCRv6_rec_small.onnx")
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    recognition = {
        "PreProcess": {"transform_ops": [READ, {"RecResizeImg": {"image_shape": [3, 48, 48]}}]},
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": characters},
    }
    for stage, config in (("det", DETECTION), ("rec", recognition)):
        (folder / stage).mkdir()
        shutil.copy(source / f"PP-OCRv6_{stage}_small.onnx", folder / stage / "inference.onnx")
        config = {"Global": {"model_name": f"PP-OCRv6_small_{stage}"}, **config}
        text = yaml.safe_dump(config, allow_unicode=True)
        (folder / stage / "inference.yml").write_text(text, encoding="utf-8")
    return str(folder / "det"), str(folder / "rec")

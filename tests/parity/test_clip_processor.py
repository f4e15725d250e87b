"""Images and frames are prepared for the vision tower as by Hugging Face's image processors."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from configs import align_7b, siglip2_qwen3
from dynfocus_jax.data.synthetic_frames import write_video
from dynfocus_jax.media.images import fit_to_square, read_image
from dynfocus_jax.media.video import read_media

ODD_SIZES = [
    *[(224, 224), (225, 224), (224, 225), (640, 427), (427, 640), (333, 500), (500, 333), (1000, 999)],
    *[(1, 1), (1, 2), (3, 2), (17, 5), (5, 17), (223, 97), (1779, 223), (641, 1137)],
]


def picture(width, height):
    """Return an image of noise at several scales, with sharp edges and rounding in both directions."""
    rng = np.random.default_rng(width * height)
    total = np.zeros((height, width, 3))
    for scale in (1, 4, 16):
        small = rng.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
        total += Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    return Image.fromarray((total / 3).astype(np.uint8))


def normalised(frames, vision):
    """Normalise uint8 frames [..., H, W, 3] as models/vit.py does before its first layer."""
    return (frames.astype(np.float32) / 255 - np.asarray(vision.mean, np.float32)) / np.asarray(vision.std)


def towers():
    """Return for each tower its section of the configuration, its layout and Hugging Face's processor."""
    clip, siglip = align_7b.get_config("").model.vision, siglip2_qwen3.get_config("").model.vision
    square = {"height": siglip.image_size, "width": siglip.image_size}
    return {
        "clip": (clip, "crop", CLIPImageProcessorPil()),
        "siglip2": (siglip, "stretch", SiglipImageProcessorPil(size=square)),
    }


@pytest.mark.parametrize("tower", ["clip", "siglip2"])
@pytest.mark.parametrize(("width", "height"), ODD_SIZES)
def test_image_file_equals_the_processor(tmp_path, tower, width, height):
    vision, layout, processor = towers()[tower]
    image = picture(width, height)
    image.save(tmp_path / "i.png")
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    frames = read_image(tmp_path / "i.png", size=vision.image_size, layout=layout)
    # In pixel levels of 0 to 255, which the normalisation divides by 255 and by the std of the channel.
    difference = np.abs(normalised(frames, vision) - expected) * np.asarray(vision.std) * 255
    assert difference.max() <= 1
    assert (difference > 0.01).mean() == 0  # all differences are rounding of whole levels


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK"])
def test_other_modes_equal_the_processor(tmp_path, mode):
    vision, layout, processor = towers()["clip"]
    image = picture(301, 250).convert(mode)
    image.save(tmp_path / "i.tif")
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    frames = read_image(tmp_path / "i.tif", size=vision.image_size, layout=layout)
    np.testing.assert_allclose(normalised(frames, vision), expected, atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip2"])
def test_frames_of_a_video_equal_the_processor(tmp_path, tower):
    vision, layout, processor = towers()[tower]
    frames = np.stack([np.asarray(picture(322, 182).rotate(10 * i)) for i in range(3)])
    write_video(tmp_path / "v.mp4", frames)
    whole = read_media(tmp_path / "v.mp4", 3, 322, layout="pad", mean=(0, 0, 0))  # only decoded, not resized
    decoded = [Image.fromarray(frame[70:252]) for frame in whole.frames]
    assert np.abs(np.asarray(decoded[0]).astype(int) - frames[0]).mean() < 20  # the written frame
    expected = processor(decoded, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    clip = read_media(tmp_path / "v.mp4", 3, vision.image_size, layout=layout)
    np.testing.assert_allclose(normalised(clip.frames, vision), expected, atol=1e-5)


def test_narrow_image_differs_by_rounding_only():
    vision, _, processor = towers()["clip"]
    image = picture(2600, 233)
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = normalised(np.asarray(fit_to_square(image, vision.image_size)), vision)
    difference = np.abs(ours - expected) * np.asarray(vision.std) * 255
    assert difference.max() < 1.01
    assert (difference > 0.01).mean() < 0.01

"""Frames become tensors by the published transforms; augmentation draws the published distributions and does what PIL does."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from stgcma_fast.data.augment import GEOMETRIC, OPERATIONS, Augmentation, Box, Operator, draw, frames_to_tensor
from stgcma_fast.data.config import VideoConfig

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
AVE = VideoConfig(10, 32, "crop", "CTHW")
AVS = VideoConfig(5, 32, "crop", "TCHW")
AVQA = VideoConfig(10, 32, "squash", "TCHW")
WHOLE = Box(((1.0, 1.0),), (0.0, 0.0))
NOTHING = Augmentation((), WHOLE, False, None, 0)


def smooth(count, height, width, seed=0):
    """uint8 ``[count, H, W, 3]``, as smooth as photographs are."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC))
            for _ in range(count)
        ]
    )


def normalised(images, layout):
    """What is fed for ``[M, S, S, 3]`` of 0 to 255."""
    return ((images / 255 - MEAN) / STD).transpose((3, 0, 1, 2) if layout == "CTHW" else (0, 3, 1, 2))


def taps(size, target):
    """Where each of ``target`` pixels looks: the pixel before, and how far it is past its centre."""
    at = (np.arange(target) + 0.5) * size / target - 0.5
    return np.floor(at).astype(int), at - np.floor(at)


def weighted(images, target, axis, weights):
    """Pixels next to each place, weighted by their distance; beyond the edge the edge goes on."""
    size = images.shape[axis]
    before, fraction = taps(size, target)
    result = 0
    for tap, weight in weights.items():
        shape = [1] * images.ndim
        shape[axis] = target
        part = np.take(images, np.clip(before + tap, 0, size - 1), axis)
        result = result + part * weight(fraction).reshape(shape)
    return result


LINEAR = {0: lambda t: 1 - t, 1: lambda t: t}


def cubic(a):
    near, far = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1, lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return {-1: lambda t: far(1 + t), 0: near, 1: lambda t: near(1 - t), 2: lambda t: far(2 - t)}


def resized(images, height, width, weights):
    """``[M, H, W, 3]`` at another size, in float64."""
    return weighted(weighted(images.astype(np.float64), height, 1, weights), width, 2, weights)


@pytest.mark.parametrize(("height", "width"), [(24, 41), (48, 64), (64, 48), (240, 320), (33, 100), (90, 28)])
@pytest.mark.parametrize("config", [AVE, AVS], ids=["ave", "avs"])
def test_crop(config, height, width):
    """The shorter side becomes 32, the other ``int(32 * ratio)``; the middle of it is cut out and normalised."""
    images = smooth(3, height, width)
    target = (32, 32 * width // height) if height < width else (32 * height // width, 32)
    expected = resized(images, *target, LINEAR)
    top, left = (round((side - 32) / 2) for side in target)
    expected = normalised(expected[:, top : top + 32, left : left + 32], config.layout)
    video = frames_to_tensor(torch.from_numpy(images), config)
    assert video.dtype == torch.float32
    assert video.is_contiguous()
    assert video.shape == expected.shape
    # In whole grey levels, as cv2 gives them, but rounded twice: along the rows and along the columns.
    apart = np.abs(video.numpy() - expected) * 255 * STD.reshape((3, 1, 1, 1) if config.layout == "CTHW" else (1, 3, 1, 1))
    assert apart.max() < 1.01
    assert apart.mean() < 0.4


@pytest.mark.parametrize(("height", "width"), [(24, 41), (48, 64), (64, 48), (240, 320)])
def test_squash(height, width):
    """AVQA: a bicubic interpolation of the four nearest pixels, whatever the ratio; no rounding to grey levels."""
    images = smooth(3, height, width)
    expected = normalised(resized(images, 32, 32, cubic(-0.75)), "TCHW")
    assert np.abs(frames_to_tensor(torch.from_numpy(images), AVQA).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("config", [AVE, AVS, AVQA], ids=["ave", "avs", "avqa"])
def test_the_right_size_is_not_resized(config):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    video = frames_to_tensor(torch.from_numpy(images), config)
    assert np.abs(video.numpy() - normalised(images, config.layout)).max() < 1e-5
    assert video.is_contiguous()


def test_frames_are_not_written_to():
    images = torch.from_numpy(smooth(2, 32, 32))
    before = images.clone()
    for config in (AVE, AVS, AVQA):
        for name in OPERATIONS:
            frames_to_tensor(images, config, replace(NOTHING, operators=(Operator(name, 7.0, 1),), erase=WHOLE))
        frames_to_tensor(images, config)
    assert torch.equal(images, before)


@pytest.mark.parametrize("layout", ["CTHW", "TCHW"])
@pytest.mark.parametrize("flip", [False, True])
def test_training_crop_and_flip(layout, flip):
    """A box is resized (bilinear, in float), and perhaps flipped; for every frame alike."""
    images = smooth(3, 48, 64)
    box = Box(((3.0, 1.0), (0.25, 3.0), (1.0, 1.0)), (0.3, 0.9))
    # 768 pixels, three times as wide as high; the first try is larger than the image.
    height, width = 16, 48
    assert box.within(48, 64) == (int(0.3 * 33), int(0.9 * 17), height, width)
    top, left = 9, 15
    expected = resized(images[:, top : top + height, left : left + width], 32, 32, LINEAR)
    expected = normalised(expected[:, :, ::-1] if flip else expected, layout)
    config = VideoConfig(3, 32, "crop", layout)
    video = frames_to_tensor(torch.from_numpy(images), config, replace(NOTHING, crop=box, flip=flip))
    assert video.is_contiguous()
    assert np.abs(video.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 9, (0, 4, 1, 1))]
)
def test_central_crop_where_no_try_fits(height, width, expected):
    """The largest box in the middle of a ratio between 3/4 and 4/3."""
    images = smooth(1, height, width)
    box = Box(((1.0, 1.0),) * 10, (0.5, 0.5))
    assert box.within(height, width) is None
    top, left, box_height, box_width = expected
    crop = images[:, top : top + box_height, left : left + box_width]
    video = frames_to_tensor(torch.from_numpy(images), AVE, replace(NOTHING, crop=box))
    assert np.abs(video.numpy() - normalised(resized(crop, 32, 32, LINEAR), "CTHW")).max() < 1e-4


@pytest.mark.parametrize("layout", ["CTHW", "TCHW"])
def test_erasing(layout):
    """The same box in every frame, other noise in each; the same again for the same seed, and standard normal."""
    images = torch.from_numpy(smooth(10, 32, 32))
    config = VideoConfig(10, 32, "crop", layout)
    erased = replace(NOTHING, erase=Box(((0.25, 4.0),), (0.999, 0.5)), noise_seed=7)
    kept, video = (frames_to_tensor(images, config, augmentation) for augmentation in (NOTHING, erased))
    # 256 pixels, four times as wide as high, at the bottom.
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[24:] = True
    assert torch.equal(video[..., ~inside], kept[..., ~inside])
    by_frame = (video.transpose(0, 1) if layout == "CTHW" else video)[..., inside]
    assert by_frame.shape == (10, 3, 256)
    assert len({tuple(noise.flatten().tolist()) for noise in by_frame}) == 10
    assert abs(by_frame.mean()) < 0.05
    assert abs(by_frame.std() - 1) < 0.05
    assert torch.equal(video, frames_to_tensor(images, config, erased))
    assert not torch.equal(video, frames_to_tensor(images, config, replace(erased, noise_seed=8)))


def pil_operators(image, magnitude, sign):
    """What RandAugment makes of a PIL image, by the published formulas."""
    level = magnitude / 10
    width, height = image.size

    def moved(*coefficients):
        return image.transform(image.size, Image.AFFINE, coefficients, Image.BICUBIC, fillcolor=(128, 128, 128))

    added = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    factor = 1 + sign * 0.9 * level
    return {
        "AutoContrast": ImageOps.autocontrast(image),
        "Equalize": ImageOps.equalize(image),
        "Invert": ImageOps.invert(image),
        "Rotate": image.rotate(sign * 30 * level, Image.BICUBIC, fillcolor=(128, 128, 128)),
        "PosterizeIncreasing": image.point([value >> (4 + int(level * 4)) << (4 + int(level * 4)) for value in range(256)] * 3),
        "SolarizeIncreasing": ImageOps.solarize(image, 256 - int(level * 256)),
        "SolarizeAdd": image.point(added * 3),
        "ColorIncreasing": ImageEnhance.Color(image).enhance(factor),
        "ContrastIncreasing": ImageEnhance.Contrast(image).enhance(factor),
        "BrightnessIncreasing": ImageEnhance.Brightness(image).enhance(factor),
        "SharpnessIncreasing": ImageEnhance.Sharpness(image).enhance(factor),
        "ShearX": moved(1, sign * 0.3 * level, 0, 0, 1, 0),
        "ShearY": moved(1, 0, 0, sign * 0.3 * level, 1, 0),
        "TranslateXRel": moved(1, 0, sign * 0.45 * level * width, 0, 1, 0),
        "TranslateYRel": moved(1, 0, 0, 0, 1, sign * 0.45 * level * height),
    }


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("magnitude", "sign"), [(7.3, 1), (6.2, -1), (0.01, 1), (10.0, -1)])
def test_operators_are_those_of_pil(name, magnitude, sign):
    """Whole frames, borders included: less than a grey level apart on average, 6 at most (cubic coefficients differ)."""
    images = smooth(2, 48, 64)
    result = OPERATIONS[name](torch.from_numpy(images).permute(0, 3, 1, 2), magnitude, sign).permute(0, 2, 3, 1).numpy()
    assert result.dtype == np.uint8
    for image, got in zip(images, result, strict=True):
        expected = np.asarray(pil_operators(Image.fromarray(image), magnitude, sign)[name], np.int64)
        apart = np.abs(got - expected)
        assert apart.mean() < 0.8
        assert apart.max() <= 6


def test_operators_in_their_order():
    images = smooth(1, 32, 32)
    operators = (Operator("SolarizeAdd", 7.0, 1), Operator("Invert", 7.0, 1), Operator("PosterizeIncreasing", 7.0, 1))
    image = Image.fromarray(images[0])
    for name, magnitude, sign in operators:
        image = pil_operators(image, magnitude, sign)[name]
    video = frames_to_tensor(torch.from_numpy(images), AVE, replace(NOTHING, operators=operators))
    assert np.abs(video.numpy() - normalised(np.asarray(image)[None], "CTHW")).max() < 1e-5


@pytest.mark.parametrize("name", GEOMETRIC)
def test_what_the_crop_leaves_out_of_a_moved_image(name):
    """It is not made; what is in the crop is the same as if all of it were, to the bit."""
    images = torch.from_numpy(smooth(3, 61, 83))
    crop = Box(((0.3, 1.4),), (0.8, 0.4))
    before = Operator("Equalize", 7.0, 1)
    for operator in (Operator(name, 8.1, 1), Operator(name, 4.3, -1)):
        whole = images.permute(0, 3, 1, 2).contiguous()
        for step in (before, operator):
            whole = OPERATIONS[step.name](whole, step.magnitude, step.sign)
        expected = frames_to_tensor(whole.permute(0, 2, 3, 1), AVE, replace(NOTHING, crop=crop))
        video = frames_to_tensor(images, AVE, replace(NOTHING, crop=crop, operators=(before, operator)))
        assert torch.equal(video, expected)


def test_every_frame_is_treated_alike():
    """Twice the same frame in a clip: twice the same result, but for the noise."""
    images = torch.from_numpy(smooth(1, 40, 56)).repeat(2, 1, 1, 1)
    for seed in range(40):
        augmentation = draw(torch.Generator().manual_seed(seed))
        video = frames_to_tensor(images, AVE, replace(augmentation, erase=None))
        assert torch.equal(video[:, 0], video[:, 1])


@pytest.mark.parametrize(("height", "width"), [(12, 16), (16, 12), (1, 1), (1, 40), (40, 1), (2, 3), (60, 80)])
def test_any_size(height, width):
    """Tiny frames, and crops a pixel wide."""
    images = torch.from_numpy(smooth(2, height, width))
    for seed in range(20):
        video = frames_to_tensor(images, AVE, draw(torch.Generator().manual_seed(seed)))
        assert video.shape == (3, 2, 32, 32)
        assert video.isfinite().all()
    for name in OPERATIONS:
        assert frames_to_tensor(images, AVE, replace(NOTHING, operators=(Operator(name, 7.0, -1),))).isfinite().all()
    for config in (AVE, AVS, AVQA):
        assert frames_to_tensor(images, config).isfinite().all()


DRAWS = 4000


@pytest.fixture(scope="module")
def draws():
    generator = torch.Generator().manual_seed(1)
    return [draw(generator) for _ in range(DRAWS)]


def close(values, expected, spread):
    """The mean is within 5 standard errors of what is expected."""
    return abs(np.mean(values) - expected) < 5 * spread / math.sqrt(len(values))


def test_draws_are_determined_by_the_seed():
    first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert hash(first) == hash(again)


def test_distribution_of_operators(draws):
    counts = [len(augmentation.operators) for augmentation in draws]
    for count in range(5):
        share = math.comb(4, count) / 16
        assert close([value == count for value in counts], share, math.sqrt(share * (1 - share)))
    operators = [operator for augmentation in draws for operator in augmentation.operators]
    assert {operator.name for operator in operators} == set(OPERATIONS)
    assert len(OPERATIONS) == 15
    for name in OPERATIONS:
        assert close([operator.name == name for operator in operators], 1 / 15, math.sqrt(14) / 15)
    # Drawn with replacement: of two, they are the same in one of 15.
    pairs = [augmentation.operators for augmentation in draws if len(augmentation.operators) == 2]
    assert close([first.name == second.name for first, second in pairs], 1 / 15, math.sqrt(14) / 15)
    magnitudes = np.array([operator.magnitude for operator in operators])
    assert close(magnitudes, 7, 0.5)
    assert close((magnitudes - 7) ** 2, 0.25, 0.25 * math.sqrt(2))
    assert close([operator.sign for operator in operators], 0, 1)
    assert {operator.sign for operator in operators} == {-1, 1}


def uniformly(values, low, high):
    """They lie between the two, in the mean and the spread of a uniform distribution."""
    values = (np.array(values) - low) / (high - low)
    return 0 <= values.min() < 0.01 and 0.99 < values.max() <= 1 and close(values, 0.5, 0.29) and close(values**2, 1 / 3, 0.3)


def test_distribution_of_boxes(draws):
    for boxes, area, ratio in (
        ([augmentation.crop for augmentation in draws], (0.08, 1), math.log(4 / 3)),
        ([augmentation.erase for augmentation in draws if augmentation.erase], (0.02, 1 / 3), math.log(1 / 0.3)),
    ):
        assert {len(box.tries) for box in boxes} == {10}
        assert uniformly([share for box in boxes for share, _ in box.tries], *area)
        assert uniformly([math.log(value) for box in boxes for _, value in box.tries], -ratio, ratio)
        assert uniformly([box.place[0] for box in boxes], 0, 1)
        assert uniformly([box.place[1] for box in boxes], 0, 1)
    assert close([augmentation.flip for augmentation in draws], 0.5, 0.5)
    assert close([augmentation.erase is not None for augmentation in draws], 0.25, 0.44)
    assert len({augmentation.noise_seed for augmentation in draws}) == DRAWS


def test_boxes_in_pixels(draws):
    """Within the image, of the area and the ratio that were drawn, every place as likely as another."""
    places = []
    for augmentation in draws:
        top, left, height, width = augmentation.crop.within(240, 320)
        assert 0 <= top <= 240 - height
        assert 0 <= left <= 320 - width
        share, ratio = next(
            (share, ratio)
            for share, ratio in augmentation.crop.tries
            if round(math.sqrt(share * 76800 * ratio)) <= 320 and round(math.sqrt(share * 76800 / ratio)) <= 240
        )
        assert abs(height - math.sqrt(share * 76800 / ratio)) <= 0.5
        assert abs(width - math.sqrt(share * 76800 * ratio)) <= 0.5
        places += [top / (240 - height)] if height < 140 else []
    assert min(places) == 0
    assert max(places) == 1
    assert close(places, 0.5, 0.3)


@pytest.mark.gpu
def test_same_on_a_gpu():
    images = torch.from_numpy(smooth(4, 240, 320))
    for config in (AVE, AVS, AVQA):
        there = frames_to_tensor(images.cuda(), config)
        assert there.is_cuda
        assert (there.cpu() - frames_to_tensor(images, config)).abs().max() < 1.1 / 255 / STD.min()
    for seed in range(40):
        augmentation = draw(torch.Generator().manual_seed(seed))
        apart = (frames_to_tensor(images.cuda(), AVE, augmentation).cpu() - frames_to_tensor(images, AVE, augmentation)).abs()
        # Grey levels may be rounded differently; what solarises or posterises afterwards makes that larger, in few places.
        assert apart.mean() < 0.02


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name):
    frames = torch.from_numpy(smooth(2, 60, 80))
    augmentation = replace(NOTHING, operators=(Operator(name, 7.0, 1),))
    expected = frames_to_tensor(frames, AVE, augmentation)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frames_to_tensor(frames, AVE, augmentation), expected)

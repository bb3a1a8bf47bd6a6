"""Views against torchvision's functional operations, and the laws of their draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as tv
from scipy import stats
from torch import Generator, Tensor
from torchvision.transforms import RandomResizedCrop

from isd_repro.config.params import Blur, Jitter, View
from isd_repro.data import augment
from isd_repro.data.augment import Crop

CLOSE = 1e-5
RARE = 1e-3  # significance of the statistical tests; seeds are fixed, so they pass or fail for good
SHAPES = [(23, 41), (64, 48), (17, 17), (90, 31)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


def padded(sizes: list[tuple[int, int]], channels: int = 3) -> tuple[Tensor, Tensor]:
    """Noise images of these sizes in one batch; the padding is bright, so that a leak shows."""
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    batch = torch.full((len(sizes), channels, height, width), 255, dtype=torch.uint8)
    for row, (tall, wide) in enumerate(sizes):
        batch[row, :, :tall, :wide] = noise(row, channels, tall, wide)
    return batch, torch.tensor(sizes)


def close(found: Tensor, want: Tensor, bound: float = CLOSE) -> None:
    assert found.shape == want.shape
    gap = float((found.double() - want.double()).abs().max())
    assert gap <= bound, f"{gap} apart"


# --- resampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 28, 60])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_resize_and_flip_are_torchvisions(channels: int, size: int) -> None:
    """Random windows of images of several sizes in one batch, shrunk and enlarged."""
    pixels, sizes = padded(SHAPES * 4, channels)
    draws = seeded(size)
    tall = 1 + (torch.rand(len(sizes), generator=draws) * sizes[:, 0]).floor()
    wide = 1 + (torch.rand(len(sizes), generator=draws) * sizes[:, 1]).floor()
    tall, wide = torch.minimum(tall, sizes[:, 0]), torch.minimum(wide, sizes[:, 1])
    top = (torch.rand(len(sizes), generator=draws) * (sizes[:, 0] - tall + 1)).floor()
    left = (torch.rand(len(sizes), generator=draws) * (sizes[:, 1] - wide + 1)).floor()
    flip = torch.rand(len(sizes), generator=draws) < 0.5
    assert 0 < int(flip.sum()) < len(flip)
    found = augment.resample(pixels, Crop(top, left, tall, wide, flip), size)
    for row in range(len(sizes)):
        box = [int(values[row]) for values in (top, left, tall, wide)]
        want = tv.resized_crop(pixels[row].float() / 255, *box, [size, size], antialias=True)
        close(found[row], tv.hflip(want) if flip[row] else want)


def test_a_whole_image_at_its_own_size_is_itself() -> None:
    pixels = noise(0, 2, 3, 12, 12)
    corner, side = torch.zeros(2), torch.full((2,), 12.0)
    whole = Crop(corner, corner, side, side, flip=torch.tensor([False, True]))
    found = augment.resample(pixels, whole, 12)
    close(found, torch.stack([pixels[0], pixels[1].flip(-1)]).float() / 255, 1e-6)


def torchvision_centre(image: Tensor, target: int, size: int) -> Tensor:
    cut: Tensor = tv.center_crop(tv.resize(image.double() / 255, [target], antialias=True), [size, size])
    return cut


@pytest.mark.parametrize(
    ("size", "ratio", "target"), [(224, 0.875, 256), (28, 1.0, 28), (64, 1.0, 64), (32, 0.8, 40), (20, 0.875, 23)]
)
def test_centre_is_torchvisions_resize_and_centre_crop(size: int, ratio: float, target: int) -> None:
    """One ragged batch; enlarged, shrunk, wide and tall images, odd margins among them."""
    shapes = [(300, 200), (200, 301), (64, 64), (28, 28), (375, 500), (33, 97), (256, 256), (257, 256)]
    pixels, sizes = padded(shapes)
    found = augment.centre(pixels, sizes, size, ratio)
    for row, (tall, wide) in enumerate(shapes):
        # at 500 px float32 places a sample to 3e-5 of a pixel; torchvision's own float32 is 1.4e-5 from this float64
        close(found[row], torchvision_centre(pixels[row, :, :tall, :wide], target, size), 4e-5)


def test_centre_does_not_depend_on_the_batch() -> None:
    shapes = [(30, 20), (25, 61)]
    pixels, sizes = padded(shapes)
    found = augment.centre(pixels, sizes, 16, 0.875)
    for row, (tall, wide) in enumerate(shapes):
        alone = augment.centre(pixels[row : row + 1, :, :tall, :wide], sizes[row : row + 1], 16, 0.875)
        close(found[row], alone[0], 1e-6)


def test_normalise_is_torchvisions() -> None:
    images = torch.rand(2, 3, 4, 5, generator=seeded(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    close(augment.normalise(images, mean, std), tv.normalize(images, list(mean), list(std)), 1e-6)


# --- colour -------------------------------------------------------------------------------------------------------------

STRENGTHS = {"brightness": 0.7, "contrast": 0.6, "saturation": 0.8, "hue": 0.4}
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def coloured(count: int, size: int = 7) -> Tensor:
    """Noise with gray, black, white and one-channel images among it: hue's special cases."""
    images = torch.rand(count, 3, size, size, generator=seeded(5))
    images[0] = images[0, :1]
    images[1], images[2] = 0.0, 1.0
    images[3, 1:] = 0.0
    return images


def jitter_factors(count: int, law: Jitter, seed: int) -> Tensor:
    """The factors that `jitter` draws: after one number an image for the share and four for the order."""
    draws = seeded(seed)
    torch.rand(count, generator=draws)
    torch.rand(count, 4, generator=draws)
    spread = torch.tensor([law.brightness, law.contrast, law.saturation, law.hue])
    return torch.tensor([1.0, 1.0, 1.0, 0.0]) + spread * (2 * torch.rand(count, 4, generator=draws) - 1)


@pytest.mark.parametrize("operation", range(4), ids=list(STRENGTHS))
def test_each_colour_operation_is_torchvisions(operation: int) -> None:
    name = list(STRENGTHS)[operation]
    law = Jitter(**{**dict.fromkeys(STRENGTHS, 0.0), name: STRENGTHS[name]}, p=1.0)
    images = coloured(40)
    found = augment.jitter(images, law, seeded(3))
    factor = jitter_factors(len(images), law, 3)[:, operation]
    assert float(factor.max() - factor.min()) > STRENGTHS[name]
    for row, image in enumerate(images):
        close(found[row], ADJUST[operation](image, float(factor[row])))
    assert not torch.equal(found, images)


def jitter_orders(count: int, seed: int) -> Tensor:
    draws = seeded(seed)
    torch.rand(count, generator=draws)
    return torch.rand(count, 4, generator=draws).argsort(dim=1)


def test_jitter_applies_torchvisions_operations_in_the_drawn_order() -> None:
    """Each image has its own order; taken backwards it would give another image."""
    law = Jitter(**STRENGTHS, p=1.0)
    images = torch.rand(60, 3, 3, 3, generator=seeded(6))
    found = augment.jitter(images, law, seeded(4))
    factor, order = jitter_factors(60, law, 4), jitter_orders(60, 4)
    told_apart = 0
    for row, image in enumerate(images):
        forward, backward = image, image
        for operation, other in zip(order[row].tolist(), reversed(order[row].tolist()), strict=True):
            forward = ADJUST[operation](forward, float(factor[row, operation]))
            backward = ADJUST[other](backward, float(factor[row, other]))
        close(found[row], forward)
        told_apart += float((found[row] - backward).abs().max()) > 100 * CLOSE
    assert told_apart > 40


def test_every_order_is_equally_likely() -> None:
    counts = torch.unique(jitter_orders(4800, 9), dim=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > RARE


def test_grayscale_is_torchvisions() -> None:
    pixels = noise(0, 30, 3, 9, 9)
    law = View(crop_min=1.0, flip=0.0, grayscale=1.0)
    sizes = torch.full((30, 2), 9)
    plain = augment.view(pixels, sizes, View(crop_min=1.0, flip=0.0), 9, seeded(1))
    close(augment.view(pixels, sizes, law, 9, seeded(1)), tv.rgb_to_grayscale(plain, num_output_channels=3))


def test_solarisation_is_torchvisions() -> None:
    pixels, sizes = noise(0, 30, 3, 9, 9), torch.full((30, 2), 9)
    plain = augment.view(pixels, sizes, View(crop_min=1.0, flip=0.0), 9, seeded(1))
    close(augment.view(pixels, sizes, View(crop_min=1.0, flip=0.0, solarise=1.0), 9, seeded(1)), tv.solarize(plain, 0.5))


def test_one_channel_images_have_no_colour() -> None:
    images = torch.rand(20, 1, 6, 6, generator=seeded(0))
    law = Jitter(brightness=0.0, contrast=0.0, saturation=0.9, hue=0.5, p=1.0)
    close(augment.jitter(images, law, seeded(1)), images, 1e-6)


# --- blur ---------------------------------------------------------------------------------------------------------------


def blur_sigmas(count: int, law: Blur, seed: int) -> Tensor:
    draws = seeded(seed)
    torch.rand(count, generator=draws)
    return law.sigma_min + (law.sigma_max - law.sigma_min) * torch.rand(count, generator=draws)


@pytest.mark.parametrize(("size", "sigma_max"), [(32, 2.0), (24, 0.7), (5, 2.0)])
def test_blur_is_torchvisions(size: int, sigma_max: float) -> None:
    """The last case is cut by the image: reflection reaches no further than its far side."""
    law = Blur(sigma_min=0.1, sigma_max=sigma_max, p=1.0)
    images = torch.rand(12, 3, size, size, generator=seeded(2))
    found = augment.blur(images, law, seeded(3))
    radius = min(math.ceil(3 * sigma_max), size - 1)
    for row, sigma in enumerate(blur_sigmas(len(images), law, 3).tolist()):
        close(found[row], tv.gaussian_blur(images[row], [2 * radius + 1] * 2, [sigma] * 2))


def test_blur_sigma_is_uniform() -> None:
    """Read back from the blurred image of a point: neighbours differ by exp(1 / (2 sigma^2))."""
    law = Blur(sigma_min=0.2, sigma_max=2.0, p=1.0)
    point = torch.zeros(3000, 1, 15, 15)
    point[:, :, 7, 7] = 1.0
    blurred = augment.blur(point, law, seeded(8))[:, 0].double()
    sigma = (0.5 / (blurred[:, 7, 7] / blurred[:, 7, 8]).log()).sqrt()
    assert 0.2 <= float(sigma.min()) < 0.22
    assert 1.98 < float(sigma.max()) <= 2.0 + 1e-4
    assert stats.kstest(sigma.numpy(), stats.uniform(0.2, 1.8).cdf).pvalue > RARE


# --- laws of the draws --------------------------------------------------------------------------------------------------


def torchvision_windows(height: int, width: int, law: View, count: int, seed: int) -> Tensor:
    image = torch.empty(1, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = [law.crop_min, law.crop_max]
        return torch.tensor([RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3]) for _ in range(count)])


@pytest.mark.parametrize(("height", "width", "crop_min"), [(400, 400, 0.2), (300, 500, 0.08), (700, 300, 0.4)])
def test_windows_follow_torchvisions_law(height: int, width: int, crop_min: float) -> None:
    law, count = View(crop_min=crop_min), 4000
    ours = augment.draw_crop(torch.tensor([[height, width]] * count), law, seeded(height))
    theirs = torchvision_windows(height, width, law, count, 1).double()
    top, left, tall, wide = (values.double() for values in (ours.top, ours.left, ours.height, ours.width))
    assert bool(((top >= 0) & (top + tall <= height) & (left >= 0) & (left + wide <= width)).all())
    pairs = {
        "area": (tall * wide, theirs[:, 2] * theirs[:, 3]),
        "aspect": (wide / tall, theirs[:, 3] / theirs[:, 2]),
        "top": (top, theirs[:, 0]),
        "left": (left, theirs[:, 1]),
        "bottom margin": (height - top - tall, height - theirs[:, 0] - theirs[:, 2]),
    }
    for name, (found, want) in pairs.items():
        assert stats.ks_2samp(found.numpy(), want.numpy()).pvalue > RARE, name


def test_area_is_uniform_and_aspect_log_uniform_where_every_draw_fits() -> None:
    """At no more than half of a large square every window fits, so nothing is redrawn."""
    law = View(crop_min=0.2, crop_max=0.5)
    crop = augment.draw_crop(torch.tensor([[4000, 4000]] * 5000), law, seeded(2))
    share = (crop.height.double() * crop.width.double() / 4000**2).numpy()
    aspect = (crop.width.double() / crop.height.double()).log().numpy()
    assert stats.kstest(share, stats.uniform(0.2, 0.3).cdf).pvalue > RARE
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert stats.kstest(aspect, stats.uniform(low, high - low).cdf).pvalue > RARE
    place = (crop.top.double() / (4000 - crop.height.double())).numpy()
    assert stats.kstest(place, stats.uniform(0, 1).cdf).pvalue > RARE


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (11, 37), (37, 11), (40, 60)])
def test_an_image_that_no_window_fits_gives_torchvisions_fallback(height: int, width: int) -> None:
    law = View(crop_min=1.0)  # a window of the whole area has the image's own aspect, or none
    crop = augment.draw_crop(torch.tensor([[height, width]] * 50), law, seeded(0))
    found = torch.stack([crop.top, crop.left, crop.height, crop.width], dim=1)
    want = torchvision_windows(height, width, law, 50, 0).float()
    assert len(found.unique(dim=0)) == 1
    assert torch.equal(found.unique(dim=0), want.unique(dim=0))


def test_how_often_each_step_is_applied() -> None:
    """Flip, jitter, grayscale, blur and solarisation on their share of the images, each apart from the others."""
    count = 4000
    step = torch.arange(8, dtype=torch.uint8) * 30
    pixels = torch.stack([step.expand(8, 8), step.expand(8, 8).T, 255 - step.expand(8, 8)])[None].expand(count, -1, -1, -1)
    sizes = torch.full((count, 2), 8)
    plain: dict[str, Any] = {"crop_min": 1.0, "flip": 0.0}
    original = augment.view(pixels, sizes, View.model_validate(plain), 8, seeded(0))
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
    laws: dict[str, tuple[dict[str, Any], float]] = {
        "flip": ({"flip": 0.3}, 0.3),
        "jitter": ({"jitter": jitter}, 0.8),
        "grayscale": ({"grayscale": 0.2}, 0.2),
        "blur": ({"blur": {"sigma_min": 0.5, "sigma_max": 2.0, "p": 0.6}}, 0.6),
        "solarise": ({"solarise": 0.3}, 0.3),
    }
    touched = {}
    for name, (change, share) in laws.items():
        images = augment.view(pixels, sizes, View.model_validate({**plain, **change}), 8, seeded(11))
        touched[name] = ((images - original).abs().amax((1, 2, 3)) > 1e-6).numpy()
        assert stats.binomtest(int(touched[name].sum()), count, share).pvalue > RARE, name
    together = {key: value for change, _ in laws.values() for key, value in change.items()}
    images = augment.view(pixels, sizes, View.model_validate({**plain, **together}), 8, seeded(12))
    untouched = ((images - original).abs().amax((1, 2, 3)) < 1e-6).sum()
    assert stats.binomtest(int(untouched), count, 0.7 * 0.2 * 0.8 * 0.4 * 0.7).pvalue > RARE  # the five are independent


def test_jitter_strengths_are_uniform() -> None:
    """Brightness and contrast read back from the images, at strengths that clamp nothing."""
    count = 3000
    images = torch.full((count, 3, 2, 2), 0.4)
    images[:, :, 0] = 0.6
    law = {"brightness": 0.5, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "p": 1.0}
    brightness = augment.jitter(images, Jitter(**law), seeded(1))[:, 0, 0, 0] / 0.6
    assert stats.kstest(brightness.numpy(), stats.uniform(0.5, 1.0).cdf).pvalue > RARE
    out = augment.jitter(images, Jitter(**{**law, "brightness": 0.0, "contrast": 0.3}), seeded(1))
    contrast = (out[:, 0, 0, 0] - out[:, 0, 1, 0]) / 0.2
    assert stats.kstest(contrast.numpy(), stats.uniform(0.7, 0.6).cdf).pvalue > RARE


# --- determinism --------------------------------------------------------------------------------------------------------

STRONG = View(
    crop_min=0.2,
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    grayscale=0.2,
    blur=Blur(sigma_min=0.1, sigma_max=2.0, p=0.5),
    solarise=0.2,
)


def test_a_view_depends_on_its_generator_alone() -> None:
    pixels, sizes = padded(SHAPES)
    before = pixels.clone()
    torch.manual_seed(1)
    first = augment.view(pixels, sizes, STRONG, 16, seeded(0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(augment.view(pixels, sizes, STRONG, 16, seeded(0)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels, before)
    assert not torch.equal(augment.view(pixels, sizes, STRONG, 16, seeded(1)), first)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1 + 1e-6


def test_what_is_drawn_does_not_depend_on_the_pixels() -> None:
    pixels, sizes = padded(SHAPES)
    one, other = seeded(0), seeded(0)
    augment.view(pixels, sizes, STRONG, 16, one)
    augment.view(torch.zeros_like(pixels), sizes, STRONG, 16, other)
    assert torch.equal(one.get_state(), other.get_state())

"""Bank, EMA, unit rows and grouped BatchNorm against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from isd_repro.config.params import BackboneConfig
from isd_repro.nn import backbones, ema
from isd_repro.nn.bank import Bank
from isd_repro.nn.batchnorm import GroupedBatchNorm1d, GroupedBatchNorm2d, set_bn_groups
from isd_repro.nn.heads import Projected, mlp, unit
from isd_repro.runtime.errors import ConfigError


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- bank ---------------------------------------------------------------------------------------------------------------


def test_the_bank_is_first_in_first_out_over_several_wraps() -> None:
    bank = Bank(12, 3, 4).double()
    kept: list[list[float]] = bank.rows.tolist()
    oldest = 0
    for step in range(8):
        batch = numbers(step, 4, 3)
        bank.push(batch)
        for row in batch.tolist():
            kept[oldest] = row
            oldest = (oldest + 1) % 12
        assert bank.rows.tolist() == kept
        assert bank.pointer == oldest
    assert oldest == 8


def test_the_bank_forgets_its_initial_rows_after_one_turn() -> None:
    bank = Bank(8, 5, 4).double()
    pushed = [numbers(step, 4, 5) for step in range(2)]
    for batch in pushed:
        bank.push(batch)
    assert torch.equal(bank.rows, torch.cat(pushed))


def test_the_banks_pointer_is_part_of_its_state() -> None:
    torch.manual_seed(0)
    bank = Bank(12, 3, 4)
    bank.push(numbers(0, 4, 3).float())
    state = bank.state_dict()
    other = Bank(12, 3, 4)
    other.load_state_dict(state)
    assert other.pointer == 4
    for each in (bank, other):
        each.push(numbers(1, 4, 3).float())
    assert torch.equal(bank.rows, other.rows)
    assert torch.equal(other.rows[4:8], numbers(1, 4, 3).float())


def test_the_bank_keeps_no_graph_and_is_no_parameter() -> None:
    bank = Bank(4, 3, 2).double()
    bank.push(numbers(0, 2, 3).requires_grad_())
    assert not bank.rows.requires_grad
    assert list(bank.parameters()) == []


def test_initial_row_norms() -> None:
    """`unit` has rows of norm 1; `reference` has columns of norm 1, so rows of about sqrt(D / K)."""
    torch.manual_seed(0)
    size, features = 6400, 64
    rows = Bank(size, features, 64, "unit").rows
    torch.testing.assert_close(rows.square().sum(1), torch.ones(size), rtol=1e-5, atol=1e-5)
    rows = Bank(size, features, 64, "reference").rows
    torch.testing.assert_close(rows.square().sum(0), torch.ones(features), rtol=1e-5, atol=1e-5)
    norms = rows.square().sum(1).sqrt()
    assert float(norms.mean()) == pytest.approx(math.sqrt(features / size), rel=0.01)
    assert float(norms.std() / norms.mean()) == pytest.approx(1 / math.sqrt(2 * features), rel=0.1)  # a chi distribution


def test_a_batch_that_does_not_divide_the_bank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bank_size: 10 is not a multiple of optim\.batch_size 4") as error:
        Bank(10, 3, 4)
    assert "8" in error.value.hint


# --- teacher ------------------------------------------------------------------------------------------------------------


def test_ema_moves_every_parameter_and_no_buffer() -> None:
    torch.manual_seed(0)
    student = Projected(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()), mlp(8, 4, 3)).double()
    teacher = ema.teacher_of(student)
    want = {name: value.tolist() for name, value in teacher.state_dict().items()}
    parameters = dict(student.named_parameters())
    for step in range(3):
        with torch.no_grad():
            for position, parameter in enumerate(parameters.values()):
                parameter.add_(numbers(100 * step + position, *parameter.shape))
            for buffer in student.buffers():
                buffer.add_(1)
        ema.update(teacher, student, 0.9)
        for name, parameter in parameters.items():
            old = torch.tensor(want[name], dtype=torch.float64)
            want[name] = (0.9 * old + (1 - 0.9) * parameter.detach()).tolist()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(value, torch.tensor(want[name], dtype=value.dtype), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ema_at_its_ends(momentum: float) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    want = (student if momentum == 0 else teacher).weight.clone()
    ema.update(teacher, student, momentum)
    torch.testing.assert_close(teacher.weight, want, rtol=1e-6, atol=0)


def test_a_teacher_starts_as_the_student_and_shares_nothing_with_it() -> None:
    student = mlp(4, 6, 2)
    teacher = ema.teacher_of(student)
    for (name, ours), theirs in zip(teacher.named_parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.data_ptr() != theirs.data_ptr(), name
        assert not ours.requires_grad, name
        assert theirs.requires_grad, name


def test_embed_gives_back_rows_in_the_order_of_the_images() -> None:
    torch.manual_seed(0)
    teacher = ema.teacher_of(nn.Linear(5, 3).double())
    view, shuffle = numbers(1, 6, 5), torch.tensor([4, 2, 0, 5, 1, 3])
    rows = ema.embed(teacher, view, shuffle)
    plain = view @ teacher.weight.T + teacher.bias
    torch.testing.assert_close(rows, plain / plain.square().sum(1, keepdim=True).sqrt(), rtol=1e-12, atol=1e-13)
    assert not rows.requires_grad


def test_unit_rows_are_at_least_float32() -> None:
    for given, want in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        rows = unit(numbers(0, 4, 3).to(given))
        assert rows.dtype is want
        torch.testing.assert_close(rows.square().sum(1), torch.ones(4, dtype=want))


# --- BatchNorm ----------------------------------------------------------------------------------------------------------


def normalised(part: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Per channel over every other axis, with the biased variance."""
    axes = [axis for axis in range(part.dim()) if axis != 1]
    shape = [1, -1] + [1] * (part.dim() - 2)
    mean = part.mean(axes, keepdim=True)
    variance = (part - mean).square().mean(axes, keepdim=True)
    return (part - mean) / (variance + eps).sqrt() * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("shape", [(12, 4), (12, 4, 3, 5)])
def test_grouped_batchnorm_is_one_batchnorm_per_part(shape: tuple[int, ...], groups: int) -> None:
    plain = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    torch.manual_seed(0)
    layer = plain(4).double()
    with torch.no_grad():
        layer.weight.copy_(numbers(1, 4))
        layer.bias.copy_(numbers(2, 4))
    parts = [plain(4).double() for _ in range(groups)]
    for part in parts:
        part.load_state_dict(layer.state_dict())
    holder = nn.Sequential(layer)
    set_bn_groups(holder, groups)
    for step in range(3):
        source = 2 * numbers(10 + step, *shape) + step
        ours, theirs, hand = (source.clone().requires_grad_() for _ in range(3))
        target = numbers(20 + step, *shape)
        holder.zero_grad()
        out = holder(ours)
        (out * target).sum().backward()
        size = shape[0] // groups
        for part in parts:
            part.load_state_dict({**part.state_dict(), **dict(layer.named_parameters())})
            part.zero_grad()
        reference = torch.cat([part(theirs[g * size : (g + 1) * size]) for g, part in enumerate(parts)])
        (reference * target).sum().backward()
        by_hand = torch.cat(
            [normalised(hand[g * size : (g + 1) * size], layer.weight, layer.bias, layer.eps) for g in range(groups)]
        )
        (want,) = torch.autograd.grad((by_hand * target).sum(), hand)
        torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out, by_hand, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(ours.grad, want, rtol=1e-9, atol=1e-10)
        assert layer.weight.grad is not None
        sums = [torch.stack([getattr(part, name).grad for part in parts]).sum(0) for name in ("weight", "bias")]
        torch.testing.assert_close(layer.weight.grad, sums[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(layer.bias.grad, sums[1], rtol=1e-10, atol=1e-11)
        for name in ("running_mean", "running_var"):
            average = torch.stack([getattr(part, name) for part in parts]).mean(0)
            torch.testing.assert_close(getattr(layer, name), average, rtol=1e-12, atol=1e-13)
            for part in parts:  # the next step starts from what the groups agreed on
                getattr(part, name).copy_(average)
    assert int(layer.num_batches_tracked) == 3  # type: ignore[arg-type]
    holder.eval()
    frozen = plain(4).double().eval()
    frozen.load_state_dict(layer.state_dict())
    source = numbers(30, *shape)
    torch.testing.assert_close(holder(source), frozen(source), rtol=1e-13, atol=1e-13)
    assert int(layer.num_batches_tracked) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2])
def test_batchnorm_under_autocast_keeps_its_statistics_in_float32(groups: int) -> None:
    """Images of bf16 come in and go out; sums over them would lose half a percent in that format."""
    layer = nn.BatchNorm2d(4, momentum=1.0)
    set_bn_groups(nn.Sequential(layer), groups)
    images = (3 + numbers(1, 12, 4, 6, 6)).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(images)
    out.float().square().sum().backward()
    assert (out.dtype, out.is_contiguous(memory_format=torch.channels_last)) == (torch.bfloat16, True)
    want = torch.stack([part.double().mean((0, 2, 3)) for part in images.detach().chunk(groups)]).mean(0)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean, want.float(), rtol=1e-5, atol=0)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_one_group_leaves_the_plain_classes() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3))

    plain, grouped = network(), network()
    before = {name: value.data_ptr() for name, value in grouped.state_dict().items()}
    set_bn_groups(plain, 1)
    set_bn_groups(grouped, 2)
    assert [type(layer) for layer in plain if "BatchNorm" in type(layer).__name__] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert [type(layer) for layer in grouped if "Batch" in type(layer).__name__] == [GroupedBatchNorm2d, GroupedBatchNorm1d]
    assert {name: value.data_ptr() for name, value in grouped.state_dict().items()} == before


@pytest.mark.parametrize(("arch", "features"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_backbones_have_torchvisions_tensors_and_no_classifier(arch: Any, features: int) -> None:
    with torch.device("meta"):
        found, want = backbones.build(BackboneConfig(arch=arch), 224), models.get_model(arch)
    shapes = {name: value.shape for name, value in want.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in found.state_dict().items()} == shapes
    assert found.features == features


def test_a_strided_shortcut_of_few_channels_is_the_strided_convolution() -> None:
    """Output and both gradients; contiguous, where no processor fails."""
    few = backbones.build(BackboneConfig(arch="resnet-narrow", width=4), 16).get_submodule("layer2.0.downsample.0")
    strided = nn.Conv2d(4, 8, 1, 2, bias=False)
    strided.load_state_dict(few.state_dict())
    found = []
    for layer in (few, strided):
        layer.double()
        images = numbers(1, 2, 4, 5, 6).requires_grad_()
        out = layer(images)
        (out * numbers(2, *out.shape)).sum().backward()
        found.append((out, images.grad, layer.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_strided_stem_is_every_other_pixel_of_the_other_stem() -> None:
    """Output and the gradient of the weights, in channels_last as in training."""
    stems = [
        backbones.build(BackboneConfig(arch="resnet-narrow", stem=stem, width=16), 32).get_submodule("conv1")
        for stem in ("small", "strided")
    ]
    stems[1].load_state_dict(stems[0].state_dict())
    images = numbers(1, 4, 3, 32, 32).float().contiguous(memory_format=torch.channels_last)
    found = []
    for stem, every in zip(stems, (2, 1), strict=True):
        out = stem.to(memory_format=torch.channels_last)(images)[:, :, ::every, ::every]
        (out * numbers(2, *out.shape).float()).sum().backward()
        found.append((out, stem.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

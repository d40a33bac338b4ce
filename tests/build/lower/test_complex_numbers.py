"""Complex numbers become pairs of real ones before they are lowered, and compute the same."""

import re

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import lower, lowerable
from support.network_interpreter import interpret
from support.operator_case import POSITIVE, Arg, Case, X, Z, fn
from torch import Tensor

WAVE = Arg((3, 64))
PAIRS = Arg(("n", 8), low=0.5)


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embeddings as Llama's first code, DeepSeek-V2 and Llama 4 have them."""
    turns = torch.polar(torch.ones_like(angles), angles) * 0.5
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None, :]).flatten(2).type_as(x)


def turned_by_a_buffer(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[: x.shape[1]]).flatten(-2)


def arithmetic(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.complex(x, y)
    w = z * (1 + 2j) - 3j + x
    return (
        w.real,
        w.imag,
        torch.view_as_real(z.conj() * w),
        torch.view_as_real(w / z),
        torch.view_as_real(2.0 / z + w / x),
        torch.view_as_real((z * 1e-25).reciprocal()) * 1e-25,
        torch.view_as_real(w * 1e25 / (z * 1e25)),
        torch.view_as_real(1j - z),
        torch.view_as_real(torch.sub(z, w, alpha=2)),
        torch.view_as_real(z**3),
        torch.view_as_real(-z.square()),
        (w * w.conj()).real,
    )


def functions(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.complex(x, y)
    return (
        z.abs(),
        (z * 1e30).abs(),
        (z * 0).abs(),
        z.angle(),
        torch.view_as_real(z.exp()),
        torch.view_as_real(z.log()),
        (z == z.conj()),
    )


def moved(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.complex(x, y)  # [n, 4, 8]
    left, right = z.chunk(2, -1)
    one, *_ = z.unbind(1)
    z = z.transpose(1, 2).contiguous().flatten(1).roll(3, 1)
    rows = torch.arange(2, -1, -1)
    return tuple(
        map(
            torch.view_as_real,
            (
                torch.cat([left, right * 2, x[..., :4]], 1),
                torch.stack([one, torch.zeros_like(one)], 1),
                z.unflatten(1, (8, 4))[:, rows, 1:],
                z.sum(-1, keepdim=True).expand(-1, 3),
                z.mean(1),
                z.cumsum(-1),
                torch.where(z.real > 0, z, 1j),
                torch.nn.functional.pad(z, (1, 2), value=2.0),
            ),
        )
    )


def products(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.complex(x, y)
    return (
        torch.view_as_real(z @ z.mH),
        torch.view_as_real(z.mT @ torch.complex(y, x)),
        torch.einsum("bft,bst->bfs", z, z.conj()).abs(),
        torch.view_as_real(torch.tensordot(z, z[0, 0].conj(), 1)),
    )


def made(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.zeros(x.shape[0], 8, dtype=torch.complex64)
    z[:, 2:4] = x[:, :2]
    z[:, 5] = torch.tensor(1 - 2j)
    z.real.add_(y)
    z.mul_(1j)
    torch.view_as_real(z)[..., 1].mul_(x)
    z.imag[:, 0] = 4.0
    return torch.view_as_real(z), torch.full_like(z, 1j).imag, x.to(torch.complex64).real


def made_real(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = torch.complex(x * 0, y * (y > 1)) * (x > 0)
    copied = torch.zeros_like(x)
    copied[:, 1:] = z[:, 1:]
    return z.to(torch.bool), copied, z.real.clone().copy_(z * 1j), (x / 2j).imag


def transforms(x: Tensor) -> tuple[Tensor, ...]:
    spectrum = torch.fft.rfft(x, norm="ortho")
    return (
        torch.view_as_real(spectrum),
        torch.fft.irfft(spectrum * spectrum, n=64),
        torch.fft.irfft(spectrum, n=63, norm="forward"),
        torch.view_as_real(torch.fft.fft(x * 1j, norm="backward")),
        torch.fft.ifft(torch.complex(x, x), dim=-1).abs(),
        torch.view_as_real(torch.fft.rfft2(x.unflatten(1, (4, 16)))),
        torch.view_as_real(torch.fft.fft(x.unflatten(1, (4, 16)), dim=1)),
        torch.fft.irfft2(torch.fft.rfft2(x.unflatten(1, (4, 16)))),
    )


def inverse(x: Tensor, window: Tensor) -> Tensor:
    spectrum = torch.stft(x, 16, 4, window=window, return_complex=True)
    return torch.istft(spectrum * 1j, 16, 4, window=window)


def short_time(x: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    spectrum = torch.stft(x, 16, 4, window=window, return_complex=True)
    louder = torch.polar(spectrum.abs() * 2, spectrum.angle())
    return spectrum.abs(), torch.view_as_real(louder)


CASES = [
    fn("rotary", turned, Z, Arg(("n", 4))),
    fn(
        "rotary-buffer",
        turned_by_a_buffer,
        Z,
        turns=torch.polar(torch.ones(6, 4), torch.arange(24.0).view(6, 4)),
    ),
    fn("arithmetic", arithmetic, POSITIVE, PAIRS),
    fn("functions", functions, X, Arg(("n", 8), low=-1.0)),
    fn("moved", moved, Z, Z),
    fn("products", products, Z, Z),
    fn("made", made, X, PAIRS),
    fn("made-real", made_real, X, PAIRS),
    fn("transforms", transforms, WAVE),
    fn("inverse-short-time", inverse, WAVE, window=torch.hann_window(16)),
    fn("short-time", short_time, WAVE, window=torch.hann_window(16)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_complex_numbers_become_pairs_of_real_ones(rtx: TensorRT, case: Case) -> None:
    lowered = lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    case.check(lambda inputs: interpret(lowered, inputs))


def refusal(rtx: TensorRT, case: Case) -> str:
    with pytest.raises(BuildError) as error:
        lower(lowerable(case.exported), outputs=case.outputs, tensorrt=rtx)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            fn("sine", lambda x: torch.complex(x, x).sin().exp().real, X),
            r"operator .*, part of aten.sin.default, .*TensorRT has no complex numbers",
        ),
        (
            fn("varying", lambda x: torch.fft.fft(x, dim=0).abs(), X),
            r"operator aten._fft_r2c.default, part of aten.fft_fft.default, .*extent that varies",
        ),
        (
            fn("root", lambda x: (torch.complex(x, x) ** 0.5).abs(), X),
            r"operator aten.pow.Tensor_Scalar cannot be lowered .*whole numbers",
        ),
        (
            fn("returned", lambda x: torch.complex(x, x) * 2, X),
            r"output out_0 is torch.complex64, .*return torch.view_as_real of it",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_what_real_numbers_do_not_compute_is_refused_once_with_its_line(
    rtx: TensorRT, case: Case, reason: str
) -> None:
    message = refusal(rtx, case)
    assert re.match(reason, message), message
    assert len(message.splitlines()) == 1

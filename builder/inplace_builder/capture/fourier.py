"""The Fourier transform of windows of audio as a product with a matrix.

Every engine has that product; TensorRT has neither the transform nor complex numbers.
"""

import torch
from torch import Tensor


def fourier_matrix(window: Tensor, size: int) -> Tensor:
    """The matrix that multiplies by a window and transforms.

    Args:
        window: ``[samples]``, float64.
        size: samples of the transform; zeros are behind the window.

    Returns:
        ``[samples, 2 * frequencies]``, float32: the real parts, then the imaginary ones.
    """
    spectrum = torch.fft.rfft(torch.diag(window), n=size)
    return torch.cat([spectrum.real, spectrum.imag], 1).float()


def power(spectrum: Tensor, dim: int) -> Tensor:
    """The squared magnitudes of a spectrum whose imaginary parts are behind the real ones."""
    real, imaginary = spectrum.chunk(2, dim)
    return real * real + imaginary * imaginary

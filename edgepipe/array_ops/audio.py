"""Sound: 16-bit PCM WAV bytes to float samples, and the MFCC front end of small keyword spotters."""

from __future__ import annotations

import functools
import io
import wave

import numpy as np

from edgepipe.data import AudioPreprocess
from edgepipe.errors import DataError

_INT16_RANGE = 32768.0  # 2**15: one least significant bit is 1/32768
_LOG_FLOOR = 1e-6  # keeps ln finite on digital silence; the constant the published front end adds


def decode_wav(content: bytes, *, where: str, sample_rate: int) -> np.ndarray:
    """The bytes of a mono 16-bit PCM WAV file -> (samples,) float32 in [-1, 1).

    Nothing is resampled or mixed down: another rate, width or channel count is a DataError that
    names ``where``, what was expected and what is there.
    """
    try:
        with wave.open(io.BytesIO(content)) as stream:
            channels, width, rate = (
                stream.getnchannels(),
                stream.getsampwidth(),
                stream.getframerate(),
            )
            raw = stream.readframes(stream.getnframes())
    except (wave.Error, EOFError, ValueError, RuntimeError, OSError) as exc:
        raise DataError(
            f"{where} is not a readable WAV file: {exc}",
            hint="expected uncompressed 16-bit PCM; remove the file or convert it",
            code="unreadable-sample",
        ) from exc
    if (channels, width, rate) != (1, 2, sample_rate):
        raise DataError(
            f"{where}: expected mono 16-bit PCM at {sample_rate} Hz,"
            f" got {channels} channel(s) of {8 * width} bits at {rate} Hz",
            hint=f"convert it (sox IN -r {sample_rate} -b 16 -c 1 OUT) or set audio.sample_rate",
        )
    samples = np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<i2")
    return (samples / np.float32(_INT16_RANGE)).astype(np.float32)


def fit_length(samples: np.ndarray, length: int) -> np.ndarray:
    """(n,) -> (length,): cut at the end, or padded there with zeros."""
    return np.pad(samples[:length], (0, max(0, length - samples.shape[0])))


def mel_filters(*, n_fft: int, sample_rate: int, mel_bins: int) -> np.ndarray:
    """(n_fft // 2 + 1, mel_bins) float64 triangles whose corners are whole FFT bins.

    Corners are evenly spaced from 0 to ``sample_rate / 2`` on the HTK scale
    ``mel = 2595 log10(1 + f / 700)`` (Young et al., The HTK Book, section 5.6) and go to bin
    ``floor((n_fft + 1) f / sample_rate)``. Worked example: n_fft 640 at 16 kHz, corner at 1000 Hz:
    ``floor(641 * 1000 / 16000) = 40``.
    """
    top_mel = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners_hz = 700 * (10 ** (np.linspace(0, top_mel, mel_bins + 2) / 2595) - 1)
    corners = np.floor((n_fft + 1) * corners_hz / sample_rate).astype(int)
    filters = np.zeros((n_fft // 2 + 1, mel_bins))
    for index in range(mel_bins):
        left, centre, right = corners[index : index + 3]
        filters[left:centre, index] = (np.arange(left, centre) - left) / max(centre - left, 1)
        filters[centre:right, index] = (right - np.arange(centre, right)) / max(right - centre, 1)
    return filters


@functools.lru_cache(maxsize=4)
def _tables(
    n_fft: int, sample_rate: int, mel_bins: int, coefficients: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)  # periodic Hann
    filters = mel_filters(n_fft=n_fft, sample_rate=sample_rate, mel_bins=mel_bins)
    # DCT-II without normalisation: y[k] = sum_n x[n] cos(pi k (2n + 1) / 2N)
    angles = np.outer(2 * np.arange(mel_bins) + 1, np.arange(coefficients))
    return window, filters, np.cos(np.pi * angles / (2 * mel_bins))


def mfcc(samples: np.ndarray, options: AudioPreprocess) -> np.ndarray:
    """(samples,) float -> (1, frames, coefficients) float32, as `AudioPreprocess` describes.

    Frame *i* is centred on sample ``i * hop``; the ends are continued by reflection. Raises
    DataError where the clip is too short for the frames asked for.
    """
    n_fft, hop = options.n_fft, options.hop
    available = samples.shape[0] // hop + 1
    if samples.shape[0] <= n_fft // 2 or available < options.frames:
        raise DataError(
            f"a clip of {samples.shape[0]} samples gives {available} frames of {n_fft} samples"
            f" every {hop}, but audio.frames is {options.frames}",
            hint="lengthen audio.seconds or lower audio.frames",
        )
    window, filters, dct = _tables(
        n_fft, options.sample_rate, options.mel_bins, options.coefficients
    )
    padded = np.pad(samples.astype(np.float64), n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][: options.frames]
    power = np.abs(np.fft.rfft(frames * window)) ** 2  # (frames, n_fft // 2 + 1)
    features = np.log(power @ filters + _LOG_FLOOR) @ dct  # (frames, coefficients)
    return features[None].astype(np.float32)


def prepare_clip(content: bytes, options: AudioPreprocess, *, where: str) -> np.ndarray:
    """The bytes of one WAV file -> features: raw (1, samples) or mfcc (1, frames, coefficients)."""
    samples = decode_wav(content, where=where, sample_rate=options.sample_rate)
    if samples.size == 0:
        raise DataError(f"{where} holds no sound", hint="remove the file")
    samples = fit_length(samples, round(options.seconds * options.sample_rate))
    return mfcc(samples, options) if options.features == "mfcc" else samples[None]

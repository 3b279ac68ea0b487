"""Compare the saved models with classical denoisers: the same noisy arrays, one run, one machine.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark_denoisers.py                          # first 60 CIFAR-10 test images, 5 minutes
    python tests/benchmark_denoisers.py --dataset my_pictures/ --noise jpeg   # what training leaves out

Prints PSNR, SSIM and images per second, and writes `figures/benchmark_DATASET_time.png` (PSNR at sigma 25
against the time for an image). The classical methods are told the true sigma, and get one image at a time.
"""

import argparse
import time
from collections import defaultdict

import benchmark_common as common
import load_data
import simple_autoencoder as simple
import util

import bm3d
import cv2
import numpy as np
from matplotlib.figure import Figure
from skimage.restoration import denoise_tv_chambolle, denoise_wavelet

SHOWN_SIGMA = 25  # of the figure of times


def block_matching(noisy, sigma):
    """BM3D: Dabov et al., "Image Denoising by Sparse 3-D Transform-Domain Collaborative Filtering", 2007."""
    if (noisy == noisy[..., :1]).all():  # bm3d_rgb fails where there is no colour
        return np.repeat(bm3d.bm3d(noisy[..., 0], sigma / 255)[..., None], 3, axis=2)
    return bm3d.bm3d_rgb(noisy, sigma / 255)


def non_local_means(noisy, sigma):
    """Buades, Coll, Morel, "A Non-Local Algorithm for Image Denoising", CVPR 2005."""
    strength = 0.6 * sigma
    bgr = util.to_uint8(noisy)[..., ::-1].copy()  # OpenCV's order of colours
    return cv2.fastNlMeansDenoisingColored(bgr, None, strength, strength, 3, 11)[..., ::-1] / 255


def total_variation(noisy, sigma):
    """Chambolle, "An Algorithm for Total Variation Minimization and Applications", 2004."""
    return denoise_tv_chambolle(noisy, weight=0.9 * sigma / 255, channel_axis=-1)


def wavelet(noisy, sigma):
    """BayesShrink: Chang, Yu, Vetterli, "Adaptive Wavelet Thresholding for Image Denoising", 2000."""
    return denoise_wavelet(noisy, sigma=sigma / 255, channel_axis=-1, rescale_sigma=False)


CLASSICAL = {
    "BM3D": block_matching,
    "non-local means": non_local_means,
    "total variation": total_variation,
    "wavelet": wavelet,
}


def timed(denoise, label, seconds):
    """A denoiser that adds the time it takes to `seconds[label]`."""

    def call(noisy, sigma):
        started = time.perf_counter()
        denoised = denoise(noisy, sigma)
        seconds[label] += time.perf_counter() - started
        return denoised

    return call


def time_figure(table, seconds, title):
    """PSNR at SHOWN_SIGMA against the seconds for an image, a point for each label."""
    (row,) = (row for row in table if row["sigma"] == SHOWN_SIGMA)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for label, duration in seconds.items():
        axis.plot(1000 * duration, row[f"{label} PSNR"], "o", label=label)
    axis.set(xscale="log", xlabel="milliseconds for an image", ylabel=f"PSNR in dB at sigma {SHOWN_SIGMA}")
    axis.xaxis.set_major_formatter("{x:g}")  # by default powers in TeX, which util turns off
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # labels at the points would overlap
    figure.suptitle(title, fontsize=10)
    return figure


def test_images(args):
    """What is denoised, arrays (N, H, W, 3) of images of one size."""
    if args.dataset not in load_data.BUILT_IN:
        return [picture[None] for picture in common.held_out_pictures(args.dataset)[: args.images]]
    images = load_data.load_data(args.dataset, args.data_dir, args.size).first("test", args.images)
    return np.split(images, range(util.BATCH, len(images), util.BATCH))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    load_data.add_data_options(parser)
    common.add_options(parser, CLASSICAL, images=60)
    parser.add_argument("--noise", choices=load_data.NOISE_KINDS, default="white", help="default: white")
    args = parser.parse_args()
    clean = test_images(args)
    models = common.model_denoisers(common.chosen_models(args), args.self_ensemble)
    for denoise in models.values():
        for shape in {batch.shape for batch in clean}:  # compile for it before the clock starts
            denoise(np.zeros(shape, np.float32), 0)
    chosen = [label for label in CLASSICAL if label not in args.without]
    denoisers = {label: common.one_by_one(CLASSICAL[label]) for label in chosen} | models
    seconds = defaultdict(float)
    watched = {label: timed(denoise, label, seconds) for label, denoise in denoisers.items()}
    table = simple.evaluate(watched, clean, kind=args.noise)
    count = sum(map(len, clean))
    seconds = {label: total / count / len(table) for label, total in seconds.items()}
    name = load_data.dataset_name(args.dataset) + ("" if args.noise == "white" else f"_{args.noise}")
    title = f"{name}, first {count} test images"
    for measure in ("PSNR", "SSIM"):
        rows = []
        for label in ("noisy", *denoisers):
            rows.append({measure: label} | {str(row["sigma"]): row[f"{label} {measure}"] for row in table})
        common.print_table(f"{title}, {args.noise} noise of seed 0 per sigma", rows)
    print(util.format_table([{"method": label, "images/s": 1 / each} for label, each in seconds.items()]))
    common.write_figures(**{f"{name}_time": time_figure(table, seconds, title)})


if __name__ == "__main__":
    util.run_script(main)

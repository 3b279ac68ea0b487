"""Compare the saved models with classical denoisers: the same noisy arrays, one run, one machine.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark_denoisers.py                          # first 60 CIFAR-10 test images, 5 minutes
    python tests/benchmark_denoisers.py --dataset my_pictures/ --noise jpeg   # what training leaves out

Prints PSNR, SSIM and images per second, and writes `figures/benchmark_DATASET_sigma.png` (PSNR against
sigma, and the models' lead over BM3D) and `figures/benchmark_DATASET_time.png` (PSNR at sigma 25 against the
time for an image). The classical methods are told the true sigma; the models are blind.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
import simple_autoencoder as simple
import util

import bm3d
import cv2
import numpy as np
from benchmark_common import write_figures
from matplotlib.figure import Figure
from skimage.restoration import denoise_tv_chambolle, denoise_wavelet

SHOWN_SIGMA = 25  # of the figure of times
BATCH = 250  # images that a model gets at a time; the classical methods take one by one


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


BM3D = "BM3D"
CLASSICAL = {
    BM3D: block_matching,
    "non-local means": non_local_means,
    "total variation": total_variation,
    "wavelet": wavelet,
}


def one_by_one(denoise):
    """A denoiser of single images in [0, 1] as one of batches, with uint8 output."""
    return lambda noisy, sigma: util.to_uint8(np.stack([denoise(image, sigma) for image in noisy]))


def ensemble_of(model):
    """The self-ensemble of a saved autoencoder as a denoiser of single images."""
    return lambda image, sigma: util.denoise_picture(model, image, ensemble=8)[0]


class Timed:
    """A denoiser that knows how long it took for an image."""

    def __init__(self, denoise):
        self.denoise, self.seconds, self.images = denoise, 0.0, 0

    def __call__(self, noisy, sigma):
        started = time.perf_counter()
        denoised = self.denoise(noisy, sigma)
        self.seconds += time.perf_counter() - started
        self.images += len(noisy)
        return denoised

    @property
    def seconds_per_image(self):
        return self.seconds / self.images


def sigma_figure(table, labels, models, title):
    """PSNR against sigma, a curve for each label; and the models' lead over BM3D, where it was measured."""
    sigmas = [row["sigma"] for row in table]
    psnr = {label: np.array([row[f"{label} PSNR"] for row in table]) for label in labels}
    panels = [("sigma", "PSNR in dB", {label: (sigmas, values) for label, values in psnr.items()})]
    if BM3D in psnr:
        leads = {label: (sigmas, psnr[label] - psnr[BM3D]) for label in (BM3D, *models)}
        panels.append(("sigma", f"PSNR above {BM3D} in dB", leads))
    return util.curves_figure(panels, title)


def time_figure(table, labels, denoisers, title):
    """PSNR at SHOWN_SIGMA against the time for an image, a point for each denoiser, coloured as its curve."""
    (row,) = (row for row in table if row["sigma"] == SHOWN_SIGMA)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for label, denoiser in denoisers.items():
        x, y = 1000 * denoiser.seconds_per_image, row[f"{label} PSNR"]
        axis.plot(x, y, "o", color=f"C{labels.index(label)}", label=label)
    axis.set(xscale="log", xlabel="milliseconds for an image", ylabel=f"PSNR in dB at sigma {SHOWN_SIGMA}")
    axis.xaxis.set_major_formatter("{x:g}")  # by default powers in TeX, which util turns off
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # labels at the points would overlap
    figure.suptitle(title, fontsize=10)
    return figure


def add_options(parser, methods, images):
    """Add the options that this benchmark shares with `benchmark_noise.py`."""
    add = parser.add_argument
    add("--out", type=Path, default=util.HERE, help="where models/, weights/, figures/ are")
    add("--images", type=int, default=images, help=f"test images to use, at most (default: {images})")
    add("--models", nargs="+", metavar="NAME", help="runs (default: all autoencoders in models/)")
    add("--self-ensemble", action="store_true", help="measure the models' self-ensemble, too")
    add("--without", nargs="+", default=[], choices=methods, help="methods to leave out")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    load_data.add_data_options(parser)
    add_options(parser, CLASSICAL, images=60)
    parser.add_argument("--noise", choices=load_data.NOISE_KINDS, default="white", help="default: white")
    return parser.parse_args(argv)


def chosen_models(args):
    """Saved autoencoders by name."""
    names = args.models or util.saved_runs(args.out, "autoencoder")
    return {name: util.load_model(args.out, name, "autoencoder") for name in names}


def held_out_pictures(folder):
    """The photographs of a folder that training leaves out, whole, sorted by name: uint8 (H, W, 3)."""
    files = load_data.image_files(Path(folder))
    if len(files) < load_data.FEWEST_TO_HOLD_OUT:
        raise load_data.DataError(f"{folder}: its {len(files)} images are all trained on in part; add some")
    splits = load_data.split_pictures(list(load_data.classes_of(files, Path(folder)).values()))
    held_out = [path for path, split in zip(files, splits, strict=True) if split == "test"]
    return [load_data.read_picture(path) for path in held_out]


def test_images(args):
    """What is denoised, as `simple.evaluate` takes it."""
    if args.dataset in load_data.BUILT_IN:
        images = load_data.load_data(args.dataset, args.data_dir, args.size).first("test", args.images)
        return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return [picture[None] for picture in held_out_pictures(args.dataset)[: args.images]]


def main(argv=None):
    args = parse_args(argv)
    clean = test_images(args)
    models = chosen_models(args)
    for denoise in simple.blind(models).values():
        for shape in {batch.shape for batch in clean}:  # compile for it before the clock starts
            denoise(np.zeros(shape, np.float32), 0)
    denoisers = {label: one_by_one(CLASSICAL[label]) for label in CLASSICAL if label not in args.without}
    denoisers |= simple.blind(models)
    if args.self_ensemble:
        denoisers |= {
            f"{name}, self-ensemble": one_by_one(ensemble_of(model)) for name, model in models.items()
        }
    denoisers = {label: Timed(denoise) for label, denoise in denoisers.items()}
    table = simple.evaluate(denoisers, clean, kind=args.noise)
    hardware = util.environment()["hardware"]
    name = load_data.dataset_name(args.dataset) + ("" if args.noise == "white" else f"_{args.noise}")
    labels = ("noisy", *denoisers)
    title = f"{name}, first {sum(map(len, clean))} test images"
    print(f"{title}, {args.noise} noise of seed 0 per sigma; {hardware}")
    for measure in ("PSNR", "SSIM"):
        rows = []
        for label in labels:
            rows.append({measure: label} | {str(row["sigma"]): row[f"{label} {measure}"] for row in table})
        print(util.format_table(rows))
    speeds = {label: float(1 / denoise.seconds_per_image) for label, denoise in denoisers.items()}
    print(util.format_table([{"method": label, "images/s": speed} for label, speed in speeds.items()]))
    figures = {
        f"{name}_sigma": sigma_figure(table, labels, models, title),
        f"{name}_time": time_figure(table, labels, denoisers, title),
    }
    write_figures(args.out, figures)


if __name__ == "__main__":
    util.run_script(main)

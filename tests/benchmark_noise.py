"""Compare the saved models with classical denoisers on every kind of noise.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark_noise.py --dataset data/photographs      # half an hour

Denoises square parts of the photographs that training leaves out. The models are told nothing; each classical
method is given, for every kind and strength, the one of its parameters that is best on these very pictures.
Prints PSNR and writes `figures/benchmark_noise.png`; and `benchmark_noise_pictures.png`, which shows what the
last model makes of each kind.
"""

import argparse

import benchmark_common as common
import simple_autoencoder as simple
import util
from benchmark_denoisers import block_matching, non_local_means
from load_data import NOISE_KINDS, SPLIT_SEED, absolute_path, add_noise, clean_of

import cv2
import numpy as np
from matplotlib.figure import Figure

SIGMAS = (10, 25)
SIDE = 160  # of the part of each photograph, in pixels
SHOWN_KINDS = ("white", "camera", "correlated", "jpeg", "impulse")


def gaussian_blur(noisy, deviation):
    return cv2.GaussianBlur(noisy, (0, 0), deviation)


def median(noisy, side):
    return cv2.medianBlur(util.to_uint8(noisy), side) / 255


def bilateral(noisy, sigma):
    """Tomasi, Manduchi, "Bilateral Filtering for Gray and Color Images", 1998."""
    return cv2.bilateralFilter(noisy, 7, 3 * sigma / 255, 2)


# each with the parameters to choose from
CLASSICAL = {
    "Gaussian blur": (gaussian_blur, (0.4, 0.6, 0.8, 1.0, 1.4, 2.0)),
    "median": (median, (3, 5)),
    "bilateral": (bilateral, (5, 10, 15, 25, 40)),
    "non-local means": (non_local_means, (5, 10, 15, 25, 40)),
    "BM3D": (block_matching, (5, 10, 15, 25, 40)),
}


def measure(clean, kind, denoisers, methods):
    """Rows of the table, one for each strength: PSNR of the noisy images and of what each denoiser makes.

    Of each of the classical methods it is that of the best parameter.
    """
    tried = {
        f"{label} {value}": common.one_by_one(
            lambda image, _, label=label, value=value: CLASSICAL[label][0](image, value)
        )
        for label in methods
        for value in CLASSICAL[label][1]
    }
    rows = []
    for found in simple.evaluate(tried | denoisers, clean, SIGMAS, kind):
        row = {"noise": kind, "strength": found["sigma"], "noisy": found["noisy PSNR"]}
        for label in methods:
            row[label] = max(found[f"{label} {value} PSNR"] for value in CLASSICAL[label][1])
        rows.append(row | {label: found[f"{label} PSNR"] for label in denoisers})
    return rows


def kinds_figure(rows, title):
    """PSNR gained on each kind and strength of noise, a mark for each method."""
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1.6), layout="constrained")
    axis = figure.subplots()
    for index, label in enumerate(list(rows[0])[3:]):
        gains = [row[label] - row["noisy"] for row in rows]
        axis.plot(gains, range(len(rows)), "osD^vP*"[index % 7], label=label)
    axis.set_yticks(range(len(rows)), [f"{row['noise']} {row['strength']}" for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel="PSNR gained in dB", xlim=(-1, None))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def pictures_figure(clean, name, model, sigma=SIGMAS[-1]):
    """A noisy and a denoised picture of some kinds of noise."""
    pictures = [(clean[[index % len(clean)]], kind) for index, kind in enumerate(SHOWN_KINDS)]
    truth = np.concatenate([clean_of(picture, kind) for picture, kind in pictures])
    noisy = np.concatenate([add_noise(picture, sigma, kind=kind) for picture, kind in pictures])
    rows = []
    for label, images in (("noisy", util.to_uint8(noisy)), (name, util.denoise(model, noisy))):
        psnr = util.psnr(truth, images)
        captions = [f"{kind}, {value:.1f} dB" for kind, value in zip(SHOWN_KINDS, psnr, strict=True)]
        rows.append((label, images, captions))
    return util.rows_figure([*rows, ("clean", truth, None)], f"Noise of strength {sigma}", cell=2.2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=absolute_path, required=True, help="folder of photographs")
    common.add_options(parser, CLASSICAL, images=8)
    args = parser.parse_args()
    models = common.chosen_models(args)
    pictures = common.held_out_pictures(args.dataset)
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(pictures))[: args.images]
    clean = []
    for picture in (pictures[index] for index in chosen):
        top, left = ((length - SIDE) // 2 for length in picture.shape[:2])
        clean.append(picture[top : top + SIDE, left : left + SIDE])
    clean = np.stack(clean)
    methods = [label for label in CLASSICAL if label not in args.without]
    denoisers = common.model_denoisers(models, args.self_ensemble)
    rows = []
    for kind in NOISE_KINDS:
        print(f"{kind} noise", flush=True)
        rows += measure(clean, kind, denoisers, methods)
    title = f"{len(clean)} held-out photographs, {SIDE}x{SIDE} of each"
    common.print_table(f"{title}, PSNR in dB", rows)
    shown = pictures_figure(clean, *list(models.items())[-1])
    common.write_figures(noise=kinds_figure(rows, title), noise_pictures=shown)


if __name__ == "__main__":
    util.run_script(main)

"""Compare the saved models with classical denoisers on every kind of noise.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark_noise.py --dataset data/photographs      # half an hour

Denoises square parts of the photographs that training leaves out. The models are told nothing; each classical
method is given, for every kind and strength, the one of its parameters that is best on these very pictures.
Prints PSNR and writes `figures/benchmark_noise.png`; and `benchmark_noise_pictures.png`, which shows what the
last model makes of each kind.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util
from load_data import NOISE_KINDS, SPLIT_SEED, TEST_NOISE_SEED, absolute_path, add_noise, clean_of

import benchmark_denoisers as denoisers
import cv2
import numpy as np
from benchmark_common import write_figures
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
    "non-local means": (denoisers.non_local_means, (5, 10, 15, 25, 40)),
    "BM3D": (denoisers.block_matching, (5, 10, 15, 25, 40)),
}


def mean_psnr(clean, denoised):
    """Mean PSNR in dB of images of one size."""
    return float(util.psnr(clean, util.to_uint8(np.stack(denoised))).mean())


def measure(clean, kind, sigma, models, classical, ensembles=False):
    """Row of the table: PSNR of the noisy images (N, SIDE, SIDE, 3) and of what each method makes of them."""
    noisy = add_noise(clean, sigma, np.random.default_rng(TEST_NOISE_SEED), kind)
    clean = clean_of(clean, kind)
    row = {"noise": kind, "strength": sigma, "noisy": mean_psnr(clean, noisy)}
    for label, (denoise, parameters) in classical.items():
        row[label] = max(mean_psnr(clean, [denoise(image, value) for image in noisy]) for value in parameters)
    row |= {name: mean_psnr(clean, util.denoise(model, noisy) / 255) for name, model in models.items()}
    if ensembles:
        for name, model in models.items():
            denoise = denoisers.ensemble_of(model)
            row[f"{name}, self-ensemble"] = mean_psnr(clean, [denoise(image, sigma) for image in noisy])
    return row


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


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=absolute_path, required=True, help="folder of photographs")
    denoisers.add_options(parser, CLASSICAL, images=8)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    models = denoisers.chosen_models(args)
    pictures = denoisers.held_out_pictures(args.dataset)
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(pictures))[: args.images]
    clean = []
    for picture in (pictures[index] for index in chosen):
        top, left = ((length - SIDE) // 2 for length in picture.shape[:2])
        clean.append(picture[top : top + SIDE, left : left + SIDE])
    classical = {label: CLASSICAL[label] for label in CLASSICAL if label not in args.without}
    rows = []
    advance = util.progress(len(NOISE_KINDS) * len(SIGMAS), "kinds and strengths of noise")
    for kind in NOISE_KINDS:
        for sigma in SIGMAS:
            rows.append(measure(np.stack(clean), kind, sigma, models, classical, args.self_ensemble))
            advance()
    title = f"{len(clean)} held-out photographs, {SIDE}x{SIDE} of each"
    print(f"{title}, PSNR in dB; {util.environment()['hardware']}")
    print(util.format_table(rows))
    shown = pictures_figure(np.stack(clean), *list(models.items())[-1])
    write_figures(args.out, {"noise": kinds_figure(rows, title), "noise_pictures": shown})


if __name__ == "__main__":
    util.run_script(main)

"""Train with clean photographs and without (Neighbor2Neighbor), in equal steps, and compare with BM3D.

    pip install -r tests/requirements-benchmark.txt
    python tests/benchmark_without_clean.py --dataset data/photographs --to noisy   # four hours of two cores

For each kind of noise, of sigma 25, writes noisy versions of all photographs to the folder `noisy/KIND`, PNG
files of 8 bits; trains `simple_autoencoder.py` on it with `--noise own`, and with fresh noise of that kind
on the clean ones, for --epochs. Prints PSNR of the held-out photographs' noisy files. BM3D is told the sigma.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
import simple_autoencoder as simple
import util
from benchmark_common import held_out_pictures
from benchmark_denoisers import block_matching

import numpy as np

SIGMA = 25


def write_noisy(folder, target, kind):
    """Write noisy versions of the pictures of a folder, the same names in another one."""
    for index, path in enumerate(load_data.image_files(folder)):
        written = (target / path.relative_to(folder)).with_suffix(".png")
        if not written.exists():
            written.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng((3, index))
            noisy = load_data.add_noise(load_data.read_picture(path)[None], SIGMA, rng, kind)[0]
            load_data.write_pixels(written, util.to_uint8(noisy))


def trained(folder, noise, options, name):
    """Autoencoder trained on patches of a folder's pictures in their own size."""
    own = ["--dataset", str(folder), "--noise", noise, "--sigma", str(SIGMA), str(SIGMA), "--name", name]
    args = simple.parse_args([*own, "--detail-epochs", "0", "--size", "96", *options])
    data = load_data.load_data(folder, size=96, margin=load_data.MARGIN, shrinking=())
    with util.training(__file__, args, data.checksums):
        return util.portable_copy(simple.train(args, data)[2])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help="folder of clean photographs")
    add("--to", type=Path, required=True, help="folder to write the noisy ones to, and the working files")
    add("--noise", nargs="+", choices=load_data.NOISE_KINDS, default=["white", "poisson", "speckle"])
    add("--epochs", default="1")
    add("--distance", default="1")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    options, table = ["--epochs", args.epochs, "--distance", args.distance, "--out", str(args.to)], []
    for kind in args.noise:
        noisy_folder = args.to / kind
        write_noisy(args.dataset, noisy_folder, kind)
        clean, noisy = (held_out_pictures(folder) for folder in (args.dataset, noisy_folder))
        models = {
            "with clean": trained(args.dataset, kind, options, f"simple_{kind}"),
            "without clean": trained(noisy_folder, "own", options, f"simple_own_{kind}"),
        }
        outputs = {
            "noisy": noisy,
            "BM3D": [util.to_uint8(block_matching(picture / 255, SIGMA)) for picture in noisy],
        }
        for label, model in models.items():
            outputs[label] = [util.denoise_picture(model, picture)[0] for picture in noisy]
        row = {"noise": f"{kind} {SIGMA}"}
        for label, pictures in outputs.items():
            pairs = zip(clean, pictures, strict=True)
            row[label] = float(np.mean([util.psnr(true[None], picture[None]) for true, picture in pairs]))
        table.append(row)
        print(f"{len(clean)} held-out photographs, PSNR in dB")
        print(util.format_table(table), flush=True)


if __name__ == "__main__":
    util.run_script(main)

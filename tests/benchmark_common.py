"""What several benchmarks share; they are run by hand. Importing it makes the scripts importable."""

import itertools
import math
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
import simple_autoencoder as simple
import stack_autoencoder as stack
import util

import numpy as np
from keras import layers


def untrained(kind="simple"):
    """Encoder and decoder of `simple_autoencoder.py`, or of `stack_autoencoder.py` for the kind `stacked`."""
    encoder, decoder = simple.build_encoder(), simple.build_decoder()
    simple.start_as_identity(encoder, decoder)
    if kind == "stacked":
        return stack.stack_encoder(encoder), stack.stack_decoder(decoder)
    return encoder, decoder


def multiply_accumulates(model):
    """Millions of multiply-accumulates in a model's convolutions and dense layers for an image of 32x32."""
    counts, call = [], layers.Layer.__call__

    def call_and_count(layer, *args, **kwargs):
        outputs = call(layer, *args, **kwargs)
        if hasattr(layer, "kernel"):
            # a kernel is applied at each output position, a transposed convolution's at each input position
            grid = args[0] if isinstance(layer, layers.Conv2DTranspose) else outputs
            counts.append(math.prod(grid.shape[1:-1]) * math.prod(layer.kernel.shape))
        return outputs

    with mock.patch.object(layers.Layer, "__call__", call_and_count):
        model(np.zeros((1, 32, 32, 3), np.float32))
    return sum(counts) / 1e6


def add_options(parser, methods, images):
    """Add the options of the benchmarks that compare saved models with classical methods."""
    add = parser.add_argument
    add("--images", type=int, default=images, help=f"test images to use, at most (default: {images})")
    add("--models", nargs="+", metavar="NAME", help="runs (default: all autoencoders in models/)")
    words = "measure the models' self-ensembles of so many positions, too"
    add("--self-ensemble", type=int, nargs="+", default=[], choices=(2, 4, 8), help=words)
    add("--without", nargs="+", default=[], choices=methods, help="methods to leave out")


def chosen_models(args):
    """Saved autoencoders by name."""
    names = args.models or util.saved_runs(util.HERE, "autoencoder")
    return {name: util.load_model(util.HERE, name, "autoencoder") for name in names}


def one_by_one(denoise):
    """A denoiser of single images in [0, 1] as one of batches, with uint8 output."""
    return lambda noisy, sigma: util.to_uint8(np.stack([denoise(image, sigma) for image in noisy]))


def self_ensemble(model, count):
    """The self-ensemble of so many positions as a denoiser of batches."""
    return one_by_one(lambda image, _: util.denoise_picture(model, image, ensemble=count)[0])


def model_denoisers(models, ensembles):
    """Saved autoencoders, and their self-ensembles, as what `simple.evaluate` measures, by label."""
    denoisers = simple.blind(models)
    for (name, model), count in itertools.product(models.items(), ensembles):
        denoisers[f"{name}, self-ensemble {count}"] = self_ensemble(model, count)
    return denoisers


def held_out_pictures(folder):
    """The photographs of a folder that training leaves out, whole, sorted by name: uint8 (H, W, 3)."""
    files = load_data.image_files(Path(folder))
    if len(files) < load_data.FEWEST_TO_HOLD_OUT:
        raise load_data.DataError(f"{folder}: its {len(files)} images are all trained on in part; add some")
    splits = load_data.split_pictures(list(load_data.classes_of(files, Path(folder)).values()))
    held_out = [path for path, split in zip(files, splits, strict=True) if split == "test"]
    return [load_data.read_picture(path) for path in held_out]


def print_table(title, rows):
    """Print what was measured, on which machine, and the numbers."""
    print(f"{title}; {util.environment()['hardware']}")
    print(util.format_table(rows))


def write_figures(**figures):
    """Write figures by name, to `figures/benchmark_NAME.png`."""
    for name, figure in figures.items():
        path = util.HERE / f"figures/benchmark_{name}.png"
        util.save_figure(figure, path)
        print(f"Written: {path}")
